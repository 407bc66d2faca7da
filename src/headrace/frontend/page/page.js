// Asks the server once a second for its counts and shows the differences. Text only ever goes in as textContent.

import { decades, distribution, line, place } from "./charts.js";
import { HISTORY_S, RATE_S, WINDOW_S, age, before, grown, quantile, sized } from "./numbers.js";
import { count, duration, gigabytes, percent, rate } from "./numbers.js";

const EVERY_MS = 1000;
const PATIENCE_MS = 4000; // for one answer
const GAP_S = 4; // between two samples, beyond which nothing is known of the time between

const STAGES = {
  before: ["before the queue", "read in by the frontend, until the backend took it"],
  queue: ["queue", "until its batch was launched on a lane"],
  compute: ["compute", "on a lane: copied in, computed, copied out"],
  respond: ["respond", "until the frontend was told"],
  after: ["after", "read out and encoded by the frontend"],
};
const FAILURES = {
  full: ["refused: no room", "the server held as many rows as it has room for"],
  invalid: ["invalid request", "the model cannot take it"],
  deadline: ["deadline passed", "it waited longer than it allowed"],
  cancelled: ["client left", "the connection was closed before the answer"],
  model: ["model raised", "the model raised an error on it"],
  lost: ["backend ended", "the backend ended while it held it"],
  unavailable: ["not ready", "no backend was ready"],
  internal: ["server error", "a fault of the server"],
};

const find = (root, name) => root.querySelector(`[data-is="${name}"]`);
const page = document.body;
const models = new Map();
let started = null;
let paused = false;
let timer = null;
let lastAnswer = null;

function set(root, name, text) {
  const element = find(root, name);
  if (element.textContent !== text) element.textContent = text;
}

function state(root, name, mood, text) {
  find(root, name).dataset.mood = mood;
  set(root, name, text);
}

function make(tag, text, title) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (title) element.title = title;
  return element;
}

function measured(cell, ns) {
  if (ns === null) cell.replaceChildren("–");
  else {
    const [value, unit] = duration(ns);
    cell.replaceChildren(value, " ", make("small", unit));
  }
}

function header(text, title) {
  const cell = make("th", text, title);
  cell.scope = "row";
  return cell;
}

/** Rows of name, bar and number; bars are relative to the largest value, or to `least` where all are smaller. */
function bars(body, entries, least) {
  const top = Math.max(...entries.map((entry) => entry.value), least);
  body.replaceChildren(
    ...entries.map(({ name, value, text }) => {
      const bar = make("i");
      bar.style.width = `${top ? (100 * value) / top : 0}%`;
      const middle = make("td");
      middle.append(bar);
      const row = make("tr");
      row.append(header(name), middle, make("td", text));
      row.toggleAttribute("data-empty", !value);
      return row;
    }),
  );
}

/** Rows per second between each two samples, but for gaps, after which a new line begins. */
function rates(samples) {
  const points = [];
  let gap = false;
  samples.slice(1).forEach((sample, index) => {
    const last = samples[index];
    const seconds = sample.at - last.at;
    if (seconds <= GAP_S) points.push({ at: sample.at, value: (sample.totals.rows - last.totals.rows) / seconds, gap });
    gap = seconds > GAP_S;
  });
  return points;
}

/** One model's part of the page, and the samples it is drawn from: {at (seconds), totals}. */
class Model {
  constructor(key) {
    this.key = key;
    this.samples = [];
    this.article = find(document, "model").content.cloneNode(true).firstElementChild;
    find(document, "models").append(this.article);
  }

  show(told, at) {
    set(this.article, "name", told.name);
    const about = [
      told.version && `version ${told.version}`,
      told.max_batch_size && `batches of up to ${count(told.max_batch_size)} rows`,
    ];
    if (told.totals && told.totals.restarts) about.push(`backend restarted ${count(told.totals.restarts)} times`);
    const lost = told.ready && told.engines_ready < told.engines;
    if (told.engines > 1) about.push(`${count(told.engines_ready)} of ${count(told.engines)} engines`);
    set(this.article, "about", about.filter(Boolean).join(" · "));
    const mood = lost ? "waiting" : told.ready ? "good" : "bad";
    state(this.article, "ready", mood, lost ? "degraded" : told.ready ? "ready" : "not ready");
    if (!told.totals) return;
    this.samples.push({ at, totals: told.totals });
    this.samples = this.samples.filter((sample) => sample.at >= at - HISTORY_S - 1);
    this.throughput();
    const old = before(this.recent(), WINDOW_S);
    const seconds = at - old.at;
    this.held(told.totals, old.totals, seconds);
    this.times(told.totals, old.totals);
    this.stages(told.totals, old.totals);
    this.batches(told, old.totals, seconds);
    this.lanes(told.totals, old.totals, seconds);
    this.failures(told.totals, old.totals);
  }

  /** The samples since the last gap. */
  recent() {
    let first = this.samples.length - 1;
    while (first > 0 && this.samples[first].at - this.samples[first - 1].at <= GAP_S) first -= 1;
    return this.samples.slice(first);
  }

  throughput() {
    const recent = this.recent();
    const now = recent[recent.length - 1];
    const old = before(recent, RATE_S);
    const seconds = now.at - old.at;
    const perSecond = (what) => (seconds ? rate((now.totals[what] - old.totals[what]) / seconds) : "–");
    set(this.article, "rows-rate", perSecond("rows"));
    set(this.article, "requests-rate", perSecond("requests"));
    const points = rates(this.samples);
    const top = Math.max(...points.map((point) => point.value), 0);
    const chart = find(this.article, "rate-chart");
    line(chart, points, HISTORY_S, top);
    chart.setAttribute("aria-label", `Rows per second over the last two minutes, at most ${rate(top)}`);
    set(this.article, "rate-peak", points.length ? `most ${rate(top)} rows/s` : "");
  }

  held(now, old, seconds) {
    const { rows_free: free, rows_room: room } = now;
    const spent = (totals) => Object.values(totals.stages_ns).reduce((sum, ns) => sum + ns, 0);
    set(this.article, "in-flight", count(now.in_flight));
    // Little's law: the time that requests took, over the time that passed, is how many there were at once.
    const mean = seconds ? ((spent(now) - spent(old)) / 1e9 / seconds).toFixed(1) : "–";
    set(this.article, "in-flight-mean", `${mean} on average, last 10 s`);
    find(this.article, "room-bar").style.width = `${room ? (100 * (room - free)) / room : 0}%`;
    set(this.article, "room", `${count(room - free)} of ${count(room)} rows in use`);
    set(this.article, "total-requests", `${count(now.requests)} requests answered`);
    set(this.article, "total-rows", `${count(now.rows)} rows answered`);
  }

  times(now, old) {
    const buckets = grown(now.responses, old.responses, "lower_ns", "count");
    const shares = { p50: 0.5, p90: 0.9, p99: 0.99, p999: 0.999 };
    const values = Object.entries(shares).map(([name, share]) => {
      const value = quantile(buckets, share);
      measured(find(this.article, name), value);
      return value;
    });
    const axis = decades(buckets);
    const chart = find(this.article, "times-chart");
    distribution(chart, buckets, axis, values.filter((value) => value !== null));
    const [half, , most] = values.map((value) => duration(value || 0).join(" "));
    const told = values[0] === null ? "no requests" : `half within ${half}, 99 % within ${most}`;
    chart.setAttribute("aria-label", `How response times of the last ten seconds are distributed: ${told}`);
    const ticks = [];
    for (let ns = axis[0]; ns <= axis[1] * 1.001; ns *= 10) {
      const [value, unit] = duration(ns);
      const tick = make("span", `${Number(value)} ${unit}`);
      tick.className = "tick";
      tick.style.left = `${100 * place(ns, axis)}%`;
      ticks.push(tick);
    }
    find(this.article, "times-axis").replaceChildren(...ticks);
  }

  stages(now, old) {
    const requests = now.requests - old.requests;
    const spent = Object.keys(STAGES).map((stage) => now.stages_ns[stage] - old.stages_ns[stage]);
    const all = spent.reduce((sum, ns) => sum + ns, 0);
    const [mean, unit] = duration(requests ? all / requests : 0);
    set(this.article, "stages-about", requests ? `${mean} ${unit} on average` : "no requests");
    const rows = [];
    const parts = [];
    Object.entries(STAGES).forEach(([stage, [name, title]], index) => {
      const swatch = make("span");
      swatch.className = "swatch";
      swatch.dataset.stage = stage;
      const head = header("", title);
      head.append(swatch, name);
      const time = make("td");
      measured(time, requests ? spent[index] / requests : null);
      const row = make("tr");
      row.append(head, time, make("td", all ? percent(spent[index] / all) : "–"));
      rows.push(row);
      const part = make("i");
      part.dataset.stage = stage;
      part.style.flexGrow = all ? spent[index] / all : 0;
      parts.push(part);
    });
    find(this.article, "stages").replaceChildren(...rows);
    find(this.article, "stack").replaceChildren(...parts);
  }

  batches(told, old, seconds) {
    const changes = grown(told.totals.batches, old.batches, "rows", "count");
    const all = changes.reduce((sum, change) => sum + change.count, 0);
    const rows = told.totals.rows - old.rows;
    set(this.article, "batches-about", all > 0 ? `${rate(rows / all)} rows in a batch, on average` : "none");
    const entries = sized(changes, told.max_batch_size).map(({ name, count: n }) => ({
      name,
      value: n,
      text: rate(seconds ? n / seconds : 0),
    }));
    bars(find(this.article, "batches"), entries, 0);
  }

  lanes(now, old, seconds) {
    const changes = grown(now.lanes, old.lanes, "lane", "batches", "busy_ns");
    const used = changes.filter((change) => change.batches > 0).length;
    const entries = changes.map(({ lane, busy_ns: ns }) => {
      const value = seconds ? ns / 1e9 / seconds : 0;
      return { name: `${lane}`, value, text: value.toFixed(2) };
    });
    set(this.article, "lanes-about", used ? `${used} in use` : "none in use");
    bars(find(this.article, "lanes"), entries, 1);
  }

  failures(now, old) {
    const total = Object.values(now.failures).reduce((sum, n) => sum + n, 0);
    set(this.article, "failures-about", total ? `${count(total)} requests` : "every request was answered");
    const rows = Object.entries(FAILURES).map(([kind, [name, title]]) => {
      const row = make("tr");
      const all = now.failures[kind];
      row.append(header(name, title), make("td", count(all - old.failures[kind])), make("td", count(all)));
      row.toggleAttribute("data-empty", !all);
      return row;
    });
    find(this.article, "failures").replaceChildren(...rows);
  }
}

function showGpu(section, gpu) {
  const known = (value, text) => (value === null ? "–" : text(value));
  set(section, "gpu-name", gpu.name || "GPU");
  set(section, "gpu-busy", known(gpu.utilization_pct, count));
  set(section, "gpu-memory", known(gpu.memory_used_bytes, gigabytes));
  set(section, "gpu-memory-of", known(gpu.memory_total_bytes, (bytes) => `of ${gigabytes(bytes)} GB`));
  set(section, "gpu-power", known(gpu.power_w, count));
  set(section, "gpu-power-of", known(gpu.power_limit_w, (watts) => `of ${count(watts)} W`));
  set(section, "gpu-heat", known(gpu.temperature_c, count));
}

function show(told) {
  if (started !== told.server.started_ns) {
    for (const model of models.values()) model.article.remove();
    models.clear();
    started = told.server.started_ns;
  }
  delete page.dataset.stale;
  const lost = told.server.ready && told.server.degraded;
  const mood = lost ? "waiting" : told.server.ready ? "good" : "bad";
  if (!paused) state(page, "state", mood, lost ? "Degraded" : told.server.ready ? "Ready" : "Not ready");
  set(page, "version", told.server.version);
  set(page, "uptime", age(told.server.uptime_s));
  set(page, "frontends", count(told.server.frontends));
  const known = new Set(told.models.map((model) => `${model.name}\n${model.version}`));
  for (const [key, model] of models) {
    if (!known.has(key)) {
      model.article.remove();
      models.delete(key);
    }
  }
  for (const model of told.models) {
    const key = `${model.name}\n${model.version}`;
    if (!models.has(key)) models.set(key, new Model(key));
    models.get(key).show(model, told.at_ns / 1e9);
  }
  const sections = [...find(page, "gpus").children];
  sections.slice(told.gpus.length).forEach((section) => section.remove());
  told.gpus.forEach((gpu, index) => {
    if (!sections[index]) {
      sections[index] = find(document, "gpu").content.cloneNode(true).firstElementChild;
      find(page, "gpus").append(sections[index]);
    }
    showGpu(sections[index], gpu);
  });
}

async function ask() {
  try {
    const answer = await fetch("/live.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
    lastAnswer = Date.now();
  } catch {
    page.dataset.stale = "";
    const since = lastAnswer === null ? "" : `, for ${age((Date.now() - lastAnswer) / 1000)}`;
    state(page, "state", "bad", `No answer from the server${since}`);
  }
}

async function round() {
  const began = performance.now();
  await ask();
  if (wanted()) timer = setTimeout(round, Math.max(0, EVERY_MS - (performance.now() - began)));
  else timer = null;
}

const wanted = () => !paused && !document.hidden;

function follow() {
  if (wanted() && timer === null) {
    timer = 0; // a round is under way
    round();
  }
  if (!wanted()) {
    clearTimeout(timer || undefined);
    if (timer) timer = null;
  }
}

find(page, "pause").addEventListener("click", (event) => {
  paused = !paused;
  event.currentTarget.setAttribute("aria-pressed", String(paused));
  event.currentTarget.textContent = paused ? "Resume" : "Pause";
  if (paused) state(page, "state", "waiting", "Paused");
  follow();
});
document.addEventListener("visibilitychange", follow);
follow();
