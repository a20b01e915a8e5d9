// Shows what the server tells: the map, the figures of the last minutes, and other budgets.

import { ExpertMap } from "./map.js";

const KEPT_SECONDS = 300, GAP_SECONDS = 5;
const $ = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const percent = (share, digits = 0) => (share == null ? "–" : `${(100 * share).toFixed(digits)} %`);
const number = (value) => (value == null ? "–" : value >= 100 ? value.toFixed(0) : value.toFixed(1));
const mega = (bytes) => (bytes == null ? "–" : number(bytes / 1e6));

function size(bytes) {
  const gibi = bytes >= 2 ** 30;
  const value = bytes / 2 ** (gibi ? 30 : 20);
  return `${Number.isInteger(value) ? value : number(value)} ${gibi ? "GiB" : "MiB"}`;
}

function figure(id, value, unit) {
  $(id).innerHTML = "";
  $(id).append(value, " ", Object.assign(document.createElement("small"), { textContent: unit }));
}

const map = new ExpertMap($("map"), (cell) => {
  $("cell").textContent = cell
    ? `Layer ${cell.layer}, expert ${cell.expert}: ${cell.resident ? "in memory" : "on the drive only"}, ` +
      `used by ${cell.uses} tokens since this page was opened`
    : "A row is a layer, a column an expert. Point at one.";
});

// Charts

const LINES = {
  hit_chart: [["hit_rate", "--line"]],
  tokens_chart: [["tokens_per_second", "--line"]],
  read_chart: [["read_bytes_per_second", "--line"], ["best_bytes_per_second", "--limit"]],
  memory_chart: [["resident_bytes", "--line"], ["memory_bytes", "--limit"]],
};
const TICKS = {
  hit_chart: (value) => `${Math.round(100 * value)} %`,
  tokens_chart: (value) => `${value}`,
  read_chart: (value) => `${Math.round(value / 1e6)} MB/s`,
  memory_chart: (value) => size(value),
};
const INCREMENTS = { memory_chart: Array.from({ length: 30 }, (_, i) => 2 ** (17 + i)) };
let points = [], charts = {};

function newChart(id) {
  const axis = { stroke: () => colour("--faint"), grid: { stroke: () => colour("--grid"), width: 1 }, ticks: { show: false },
    font: "11px system-ui, sans-serif" };
  return new uPlot(
    {
      width: $(id).clientWidth, height: 132, legend: { show: false }, padding: [8, 6, 0, 0],
      cursor: { sync: { key: "all" }, y: false, points: { show: false } },
      scales: {
        x: { time: true, range: (_, low, high) => [Math.max(low, high - KEPT_SECONDS), Math.max(high, low + 20)] },
        y: { range: (_, low, high) => (id === "hit_chart" ? [0, 1] : [0, (high || 1) * 1.08]) },
      },
      axes: [
        { ...axis, size: 24, space: 80, values: (_, ticks) => ticks.map((at) => new Date(1000 * at).toLocaleTimeString([], { hourCycle: "h23" })) },
        { ...axis, size: 64, space: 34, incrs: INCREMENTS[id], values: (_, ticks) => ticks.map(TICKS[id]) },
      ],
      series: [{}, ...LINES[id].map(([, name], i) => ({
        stroke: () => colour(name), width: i ? 1.25 : 2, dash: i ? [5, 4] : undefined, points: { show: false },
        fill: i ? undefined : () => colour(name) + "22",
      }))],
    },
    dataOf(id), $(id),
  );
}

function dataOf(id) {
  return [points.map((point) => point.at), ...LINES[id].map(([name]) => points.map((point) => point[name] ?? null))];
}

function add(point) {
  const last = points.at(-1);
  if (last && point.at - last.at < 1) return;
  if (last && point.at - last.at > GAP_SECONDS) points.push({ at: last.at + 1 });
  points.push(point);
  while (points[0].at < point.at - KEPT_SECONDS) points.shift();
  for (const id in charts) charts[id].setData(dataOf(id));
}

new ResizeObserver(() => {
  for (const id in charts) charts[id].setSize({ width: $(id).clientWidth, height: 132 });
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const id in charts) charts[id].redraw();
  map.draw();
});

// What the server tells

let model = {};

function begin(told) {
  model = told;
  document.title = `${told.model} · FlashMoE`;
  $("model").textContent = told.model;
  const same = told.layers.every((n) => n === told.layers[0]);
  const experts = same ? told.layers[0] : `${Math.min(...told.layers)}-${Math.max(...told.layers)}`;
  $("about").textContent = `${told.layers.length} layers of ${experts} experts, ${told.top_k} a token · policy ` +
    `${told.policy} · arithmetic ${told.arithmetic}${told.direct_io ? "" : " · reads through the page cache"}`;
  $("method").textContent = `Hit rate, speed and reads are of the last ${told.window_seconds} seconds. Steps of more than ` +
    `${told.decode_tokens} tokens count as prompts. The drive's best is the highest rate, while it read, that was seen here: ` +
    "the drive may be able to do more. The map is looked at " +
    `${Math.round(1 / told.interval_seconds)} times a second: what came and went in between is not on it.`;
  $("main").hidden = false;
  $("empty").hidden = true;
  map.begin(told.layers);
  for (const id in charts) charts[id].destroy();
  points = [];
  charts = {};
  told.history.forEach(add);
  for (const id in LINES) charts[id] = newChart(id);
}

function show(told) {
  if (told.closed) return state("the model was closed", "bad");
  state("live", "live");
  const now = told.figures;
  map.take(told.map);
  add(now);
  figure("hit_rate", now.hit_rate == null ? "–" : (100 * now.hit_rate).toFixed(1), "%");
  $("hit_note").textContent = `since load ${percent(now.total_hit_rate, 1)}`;
  figure("tokens", number(now.tokens_per_second), "token/s");
  $("tokens_note").textContent = (now.prompt_tokens_per_second ? `prompts ${number(now.prompt_tokens_per_second)} token/s · ` : "") +
    `waits for the drive ${percent(now.waiting)} of the time`;
  figure("read", mega(now.read_bytes_per_second), "MB/s");
  $("read_note").textContent = now.best_bytes_per_second
    ? `${percent(now.read_bytes_per_second / now.best_bytes_per_second)} of ${mega(now.best_bytes_per_second)} MB/s, the best seen`
    : "nothing read since this page looks";
  figure("memory", size(now.resident_bytes), `of ${size(now.memory_bytes)}`);
  $("memory_note").textContent = `${percent(now.resident_bytes / now.memory_bytes)} of the budget` +
    (now.lost_events ? ` · ${now.lost_events} events were too many to look at` : "");
  if (told.shadows) budgets(told.shadows);
}

function budgets(shadows) {
  const present = shadows.memory_bytes;
  $("budgets").replaceChildren(...shadows.budgets.map((one) => {
    const row = document.createElement("li");
    const cell = (name, text = "") => {
      const made = Object.assign(document.createElement("span"), { className: name, textContent: text });
      row.append(made);
      return made;
    };
    const isNow = one.memory_bytes === present;
    if (isNow) row.className = "now";
    cell("size", size(one.memory_bytes));
    cell("times", isNow ? "now" : `${(one.memory_bytes / present).toFixed(2)} ×`);
    const bar = document.createElement("b");
    bar.style.width = percent(one.hit_rate ?? 0, 1).replace(" ", "");
    cell("bar").append(bar);
    cell("rate", percent(one.hit_rate, 1)).title = one.filling ? "its slots are not full yet" : "";
    for (const span of row.children) span.classList.toggle("now", isNow);
    return row;
  }));
  const filling = shadows.budgets.some((one) => one.filling && one.hit_rate != null);
  const of = shadows.layers < model.layers.length ? `${shadows.layers} of ${model.layers.length} layers` : "all layers";
  $("budgets_note").textContent = "Hit rates of the last minutes, replayed and not measured: caches of these sizes see what " +
    `${of} choose` + (shadows.share == null ? ", once there is something." : `; ${percent(shadows.share)} of the tokens were replayed.`) +
    (filling ? " The larger ones are filling still." : "");
}

function state(text, kind = "") {
  $("state").textContent = text;
  $("state").className = `state ${kind}`;
}

// The connection: none while the page is hidden

let key = new URLSearchParams(location.search).get("key") ?? sessionStorage.getItem("key"), source = null;
if (location.search) history.replaceState(null, "", location.pathname);

function connect() {
  source?.close();
  if (document.hidden) return state("paused");
  source = new EventSource("events" + (key ? `?key=${encodeURIComponent(key)}` : ""));
  source.addEventListener("waiting", () => state("waiting for a model"));
  source.addEventListener("model", (event) => begin(JSON.parse(event.data)));
  source.addEventListener("frame", (event) => show(JSON.parse(event.data)));
  source.onopen = () => {
    $("key").hidden = true;
    if (key) sessionStorage.setItem("key", key);
  };
  source.onerror = () => {
    const refused = source.readyState === EventSource.CLOSED;
    state(refused ? "the API key is needed" : "no answer: trying again", "bad");
    $("key").hidden = !refused;
  };
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = new FormData(event.target).get("key");
  connect();
});
document.addEventListener("visibilitychange", connect);
connect();
