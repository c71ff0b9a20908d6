/* The page: asks the server what it does, and tells it what to do with sessions and requests. */
'use strict';

const KEY = 'agent-memory-admin-key';
const EVERY = 2000;
/* The list of sessions may be long, so it is asked for when a turn has ended, and now and then. */
const ROUNDS_OF_SESSIONS = 15;

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(method, path, body) {
  const headers = { 'X-Admin-Key': sessionStorage.getItem(KEY) || '' };
  if (body) headers['Content-Type'] = 'application/json';
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok && answer.status !== 503) {
    throw new Refused(answer.status, found.error?.message || `${method} ${path}: ${answer.status}`);
  }
  return found;
}

function tilesOf(stats) {
  const { memory, store } = stats;
  const held = memory.block_bytes + memory.live_bytes + memory.reserved_bytes;
  return [
    {
      label: 'Reused', value: words.share(stats.cache_read, stats.prompt_tokens), share: null,
      note: `${words.count(stats.cache_read)} of ${words.count(stats.prompt_tokens)} prompt tokens`,
    },
    {
      label: 'Turns', value: words.count(stats.turns), share: null,
      note: `${stats.running} running, ${stats.waiting} waiting, ${stats.failed} failed`,
    },
    {
      label: 'KV in memory', value: words.bytes(held), share: share(held, memory.budget_bytes),
      note: `of ${words.bytes(memory.budget_bytes)}`,
    },
    {
      label: 'KV on disk', value: words.bytes(store.bytes), share: share(store.bytes, store.quota),
      note: store.quota ? `of ${words.bytes(store.quota)}` : 'no store',
    },
    {
      label: 'Memory of MLX', value: words.bytes(memory.active_bytes), share: null,
      note: `${words.bytes(memory.peak_bytes)} at most`,
    },
  ];
}

function share(part, whole) {
  return whole > 0 ? Math.min(1, part / whole) : null;
}

/* Turns by tier, as a tile of their own: which share of the turns had to compute their whole prompt. */
function tierTile(turns) {
  const count = (tier) => turns.filter((turn) => turn.hit_tier === tier).length;
  const hits = count('hot') + count('warm');
  return {
    label: 'Turns with a hit', value: words.share(hits, turns.length), share: null,
    note: `${count('hot')} hot, ${count('warm')} warm, ${count('none')} none`,
  };
}

function requestRow(request) {
  const done = Math.min(request.prompt_tokens_done, request.prompt_tokens);
  return {
    ...request,
    session: request.session_id || '–',
    share: request.prompt_tokens ? done / request.prompt_tokens : 0,
    progress: `${words.count(done)} of ${words.count(request.prompt_tokens)}, ${words.count(request.cached_tokens)} reused`,
    seconds: request.seconds.toFixed(1),
  };
}

function sessionRow(session, sure) {
  const turn = session.last_turn;
  const key = JSON.stringify([session.namespace, session.session_id]);
  return {
    key,
    session_id: session.session_id,
    namespace: session.namespace,
    pinned: session.pinned,
    where: [session.namespace === 'default' ? '' : session.namespace, session.pinned ? 'pinned' : '']
      .filter(Boolean).join(', '),
    tokens: words.count(session.tokens),
    bytes: words.bytes(session.nbytes),
    tier: turn ? turn.hit_tier : 'disk',
    miss: (turn && turn.miss_reason) || '–',
    first: turn ? words.seconds(turn.time_to_first_token) : '–',
    used: words.ago(session.last_use),
    sure: sure === key,
  };
}

function names(session) {
  return { namespace: session.namespace, session_id: session.session_id };
}

document.addEventListener('alpine:init', () => {
  Alpine.data('page', () => ({
    open: false, typed: '', problem: '', model: '', state: '', ready: false,
    tiles: [], requests: [], turns: [], sessions: [], wanted: '', sure: '', rounds: 0,

    init() {
      this.plot = new Plot(document.getElementById('plot'));
      addEventListener('resize', () => this.plot.draw(this.turns));
      this.round();
    },

    async round() {
      if (!document.hidden) await this.refresh(this.rounds++ % ROUNDS_OF_SESSIONS === 0);
      setTimeout(() => this.round(), EVERY);
    },

    async enter() {
      sessionStorage.setItem(KEY, this.typed);
      this.typed = '';
      await this.refresh();
    },

    async refresh(withSessions = true) {
      await this.tried(async () => {
        const paths = ['/admin/stats', '/admin/requests', '/admin/turns', '/health/ready'];
        const [stats, live, recent, health] = await Promise.all(paths.map((path) => ask('GET', path)));
        const isNew = recent.turns.at(-1)?.ended !== this.turns.at(-1)?.ended;
        if (withSessions || isNew || !this.open) this.sessions = (await ask('GET', '/admin/caches')).sessions;
        this.open = true;
        this.show(stats, live.requests, recent.turns, health);
        this.$nextTick(() => this.plot.draw(this.turns));
      });
    },

    show(stats, requests, turns, health) {
      const [reused, count, ...rest] = tilesOf(stats);
      this.tiles = [reused, tierTile(turns), count, ...rest];
      this.model = stats.model;
      this.ready = health.status === 'ok';
      this.state = this.ready ? 'ready' : health.reason || health.error?.message || 'not ready';
      this.requests = requests.map(requestRow);
      this.turns = turns;
    },

    get shown() {
      const wanted = this.wanted.toLowerCase();
      return this.sessions
        .filter((session) => `${session.namespace} ${session.session_id}`.toLowerCase().includes(wanted))
        .slice(0, 200).map((session) => sessionRow(session, this.sure));
    },

    get counted() {
      const all = words.count(this.sessions.length);
      return this.shown.length < this.sessions.length ? `${this.shown.length} of ${all}` : all;
    },

    async cancel(row) {
      await this.act('DELETE', `/admin/requests/${encodeURIComponent(row.request_id)}`);
    },

    async pin(row) {
      await this.act('POST', '/admin/caches/pin', { ...names(row), pinned: !row.pinned });
    },

    async fork(row) {
      const taken = new Set(this.sessions.map((session) => session.session_id));
      let number = 2;
      while (taken.has(`${row.session_id}-${number}`)) number += 1;
      await this.act('POST', '/admin/caches/fork', { ...names(row), new_session_id: `${row.session_id}-${number}` });
    },

    /* Nothing brings it back, so the first press only asks. */
    async forget(row) {
      if (this.sure !== row.key) {
        this.sure = row.key;
        setTimeout(() => { if (this.sure === row.key) this.sure = ''; }, 4000);
        return;
      }
      this.sure = '';
      await this.act('DELETE', '/admin/caches', { ...names(row), scope: 'all', confirm: true });
    },

    async act(method, path, body) {
      await this.tried(() => ask(method, path, body));
      const said = this.problem;
      await this.refresh();
      this.problem ||= said;
    },

    async tried(work) {
      try {
        await work();
        this.problem = '';
      } catch (error) {
        const shut = error instanceof Refused && (error.status === 401 || error.status === 403);
        this.open = this.open && !shut;
        const first = shut && !sessionStorage.getItem(KEY) && error.status === 401;
        this.problem = first ? '' : error instanceof Refused ? error.message : 'The server does not answer.';
      }
    },
  }));
});
