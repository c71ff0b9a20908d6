/* Numbers as people read them. */
'use strict';

const words = {
  bytes(count) {
    const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
    let unit = 0;
    while (count >= 1024 && unit < units.length - 1) {
      count /= 1024;
      unit += 1;
    }
    return `${count >= 100 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
  },

  count(number) {
    return number.toLocaleString('en');
  },

  share(part, whole) {
    return whole > 0 ? `${Math.round((100 * part) / whole)} %` : '–';
  },

  seconds(seconds) {
    return seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  },

  /* How long ago a time was, in seconds since the epoch. */
  ago(time) {
    const seconds = Math.max(0, Date.now() / 1000 - time);
    for (const [unit, size] of [['d', 86400], ['h', 3600], ['min', 60]]) {
      if (seconds >= size) return `${Math.floor(seconds / size)} ${unit} ago`;
    }
    return `${Math.floor(seconds)} s ago`;
  },
};
