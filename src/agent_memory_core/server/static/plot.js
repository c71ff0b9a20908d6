/* The plot of times to the first token: a point for each turn, in the colour of its tier. */
'use strict';

class Plot {
  static TIERS = ['none', 'warm', 'hot'];

  constructor(element) {
    this.element = element;
    this.chart = null;
  }

  draw(turns) {
    const width = this.element.clientWidth;
    if (!turns.length || !width) return;
    const data = Plot.columns(turns);
    if (this.chart === null) this.chart = new uPlot(this.options(width), data, this.element);
    else this.chart.setData(data);
    if (this.chart.width !== width) this.chart.setSize({ width, height: 220 });
  }

  /* One column of times, and one of milliseconds for each tier, with gaps where a turn is of another one. */
  static columns(turns) {
    const tiers = Plot.TIERS.map((tier) => turns.map(
      (turn) => (turn.hit_tier === tier ? Math.max(0.1, 1000 * turn.time_to_first_token) : null)));
    return [turns.map((turn) => turn.ended), ...tiers];
  }

  options(width) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const line = { stroke: colour('--line'), width: 1 };
    const axis = { stroke: colour('--soft'), grid: line, ticks: line };
    const series = Plot.TIERS.map((tier) => ({
      label: tier,
      stroke: colour(`--${tier}`),
      paths: () => null,
      points: { show: true, size: 7, fill: colour(`--${tier}`) },
      value: (_, value) => (value === null ? '–' : words.seconds(value / 1000)),
    }));
    return {
      width,
      height: 220,
      scales: { x: { range: Plot.times }, y: { distr: 3, range: Plot.decades } },
      axes: [{ ...axis, values: (_, ticks) => ticks.map(Plot.clock) }, {
        ...axis, size: 64, splits: Plot.powers, values: (_, ticks) => ticks.map((tick) => words.seconds(tick / 1000)),
      }],
      series: [{ label: 'ended', value: (_, value) => (value === null ? '–' : Plot.clock(value)) }, ...series],
    };
  }

  /* At least a minute, so that one turn is not the whole width. */
  static times(_, first, last) {
    const spare = Math.max(30 - (last - first) / 2, (last - first) * 0.02);
    return [first - spare, last + spare];
  }

  static clock(time) {
    return new Date(1000 * time).toLocaleTimeString('en-GB');
  }

  /* The powers of ten of the axis: lines between them would say nothing. */
  static powers(chart) {
    const { min, max } = chart.scales.y;
    const powers = [];
    for (let power = min; power <= 1.01 * max; power *= 10) powers.push(power);
    return powers;
  }

  /* Whole powers of ten, so that points lie still while they come. */
  static decades(_, least, most) {
    const low = Math.floor(Math.log10(least || 1));
    const high = Math.max(low + 1, Math.ceil(Math.log10(most || 1000)));
    return [10 ** low, 10 ** high];
  }
}
