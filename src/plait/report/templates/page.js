// Shows a payload of plait/page.py: replaces the pieces of HTML, and hands the charts to plotly.
"use strict";

const values = document.getElementById("values");
const live = values.dataset.live === "yes";
const payloads = JSON.parse(values.textContent);
const byId = (id) => document.getElementById(id);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 760px)");
const still = window.matchMedia("(prefers-reduced-motion: reduce)");

// Okabe and Ito's colours, lifted where they would drown in a dark page, lowered on a light one.
const ON_DARK = {"#0072B2": "#3A86E0", "#000000": "#E8EAED", "#009E73": "#1FC496",
                 "#D55E00": "#F0792A", "#CC79A7": "#DE95BE", "#56B4E9": "#A6E1FF",
                 "#666666": "#A3AAB3"};
const ON_LIGHT = {"#E69F00": "#C08400", "#56B4E9": "#2E96D2", "#888888": "#7A7A7A"};

let shown = null;      // the payload on the page
let runName = null;    // the run looked at closely
let round = -1;        // the round of its topology; -1 follows the last
let timer = null;

// -- charts

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function recoloured(chart) {
  let text = JSON.stringify(chart);
  for (const [from, to] of Object.entries(dark.matches ? ON_DARK : ON_LIGHT)) {
    text = text.replaceAll(from, to);
  }
  return JSON.parse(text);
}

function layoutOf(chart) {
  const axis = {gridcolor: colour("--grid"), zerolinecolor: colour("--line"),
                linecolor: colour("--line"), automargin: true};
  const title = (one) => ({...one, title: {...(one.title || {}), standoff: 8, font: {size: 13}}});
  return {
    showlegend: chart.data ? chart.data.filter((one) => one.showlegend !== false).length > 1 : false,
    margin: {l: 12, r: 16, t: 12, b: 12},
    hovermode: "closest",
    ...chart.layout,
    font: {family: "system-ui, sans-serif", size: 13, color: colour("--text")},
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: {font: {family: "system-ui, sans-serif"}},
    legend: {orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom"},
    xaxis: {...axis, ...title(chart.layout.xaxis || {})},
    yaxis: {...axis, ...title(chart.layout.yaxis || {})},
  };
}

const CONFIG = {responsive: true, displaylogo: false, displayModeBar: "hover",
                modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};

// A long label or title in lines of about so many letters.
function wrapped(text, letters) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const line = lines[lines.length - 1];
    if (line && (line + " " + word).length > letters) lines.push(word);
    else lines[lines.length - 1] = line ? line + " " + word : word;
  }
  return lines.join("<br>");
}

const cut = (name) => name.length > 16 ? name.slice(0, 15) + "…" : name;
const linesIn = (text) => text.split("<br>").length;

// Room for what is written beside the lines: labels of an axis, or a legend below the plot.
function makeRoom(plot, chart, layout) {
  const letters = narrow.matches ? 24 : 30, names = chart.data[0].x, under = layout.xaxis.title;
  under.text = wrapped(under.text, narrow.matches ? 30 : 44);
  if (chart.layout.xaxis.type === "category" && names.some((one) => one.length > 4)) {
    Object.assign(layout.xaxis, {tickvals: names, ticktext: names.map(cut)});
  }
  if (chart.layout.yaxis.type === "category") {
    const labels = chart.layout.yaxis.categoryarray, texts = labels.map((one) => wrapped(one, letters));
    Object.assign(layout.yaxis, {tickvals: labels, ticktext: texts});
    layout.height = 90 + texts.length * Math.max(42, 14 + 18 * Math.max(...texts.map(linesIn)));
    plot.style.height = `${layout.height}px`;
  } else if (layout.showlegend) {
    const entries = chart.data.filter((one) => one.showlegend !== false);
    entries.forEach((one) => { one.name = wrapped(one.name, 44); });
    const widths = entries.map((one) => 44 + 7.2 * Math.max(...one.name.split("<br>").map((line) => line.length)));
    const fits = widths.reduce((sum, one) => sum + one, 0) < plot.clientWidth;
    const inRow = fits ? entries.length : Math.max(1, Math.floor(plot.clientWidth / Math.max(...widths)));
    const tallest = Math.max(...entries.map((one) => linesIn(one.name)));
    plot.style.height = "";
    plot.style.height = `${plot.clientHeight + (Math.ceil(entries.length / inRow) - 1) * (4 + 17 * tallest)}px`;
  }
}

function draw(figure, chart) {
  figure.hidden = !chart;
  if (!chart) return;
  let plot = figure.querySelector(".plot"), note = figure.querySelector(".beside");
  if (!plot) {
    note = document.createElement("p");
    plot = document.createElement("div");
    note.className = "beside";
    plot.className = "plot";
    figure.append(note, plot, numbersOf(plot));
  }
  note.textContent = chart.note;
  note.hidden = !chart.note;
  plot.hidden = figure.querySelector("details").hidden = !chart.data.length;
  if (plot.hidden) return;
  plot.chart = chart;
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", chart.alt + ". The numbers are in the table below it.");
  const coloured = recoloured(chart), layout = layoutOf(coloured);
  for (const one of coloured.data) if (one.type === "bar") one.marker.line = {width: 1, color: colour("--card")};
  makeRoom(plot, coloured, layout);
  Plotly.react(plot, coloured.data, layout, CONFIG);
}

// The chart's own points as a table, made when it is asked for.
function numbersOf(plot) {
  const details = document.createElement("details");
  details.innerHTML = "<summary>The numbers</summary>";
  const box = document.createElement("div");
  box.className = "scroll";
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  details.append(box);
  details.addEventListener("toggle", () => {
    if (!details.open) return;
    box.setAttribute("aria-label", plot.chart.alt);
    const [head, ...rows] = plot.chart.table || pointsOf(plot.chart);
    box.replaceChildren(tableOf(head, rows));
  });
  return details;
}

// The points of the lines, a row for each place; a level line that goes all along has none.
function pointsOf(chart) {
  const traces = chart.data.filter((one) => one.fill !== "toself" && one.name !== "majority class");
  const xs = [...new Set(traces.flatMap((one) => one.x))];
  return [[chart.layout.xaxis.title.text, ...traces.map((one) => one.name)],
          ...xs.map((x) => [x, ...traces.map((one) => one.y[one.x.indexOf(x)])])];
}

function tableOf(head, rows) {
  const table = document.createElement("table");
  const add = (parent, tag, text) => {
    const cell = document.createElement(tag);
    cell.textContent = text ?? "";
    if (cell.textContent.length > 24) cell.className = "long";
    if (tag === "th") cell.scope = parent.parentNode.tagName === "THEAD" ? "col" : "row";
    parent.append(cell);
  };
  const top = table.createTHead().insertRow();
  head.forEach((text) => add(top, "th", String(text).replace(/<[^>]*>/g, "")));
  const body = table.createTBody();
  for (const [first, ...rest] of rows) {
    const line = body.insertRow();
    add(line, "th", first);
    rest.forEach((value) => add(line, "td", value));
  }
  return table;
}

// -- one run: who met whom

// The one that was chosen, or the first that goes on.
function runNow() {
  return shown.runs.find((one) => one.key === runName) || shown.runs.find((one) => !one.finished)
    || shown.runs[0];
}

const clientOf = (t, i) => t.names.length ? t.names[i] : `client ${i}`;
const shortOf = (t, i) => t.names.length ? t.names[i] : String(i);
const pairOf = (t, i, j) => t.names.length ? `${t.names[i]} and ${t.names[j]}` : `clients ${i} and ${j}`;

const unpacked = new WeakMap();
function bytesOf(code) {
  return Uint8Array.from(atob(code), (c) => c.charCodeAt(0));
}

// The meetings of a round: [i, j, share of the run's largest weight].
function pairsOf(topology, at) {
  if (!unpacked.has(topology)) unpacked.set(topology, new Map());
  const known = unpacked.get(topology), number = topology.drawn[at];
  if (!known.has(number)) {
    const ends = new Uint16Array(bytesOf(topology.pairs[number]).buffer);
    const weights = bytesOf(topology.weights[number]);
    known.set(number, Array.from(weights, (w, k) => [ends[2 * k], ends[2 * k + 1], w / 255]));
  }
  return known.get(number);
}

// The distances of all pairs in a round: level(i, j) is null where not known, else from 0, for none
// but rounding, to 1, for the largest of the run, on a logarithmic scale.
function betweenOf(t, at) {
  const bytes = bytesOf(t.between[at]), n = t.clients;
  const level = (i, j) => {
    if (i === j || !bytes.length) return null;
    const [a, b] = i < j ? [i, j] : [j, i];
    const byte = bytes[a * n - a * (a + 1) / 2 + b - a - 1];
    return byte ? Math.max(0, byte - 2) / 253 : null;
  };
  const distance = (i, j) => {
    const at = level(i, j);
    return at === null ? null : t.least * (t.most / t.least) ** at;
  };
  return {known: bytes.length > 0, level, distance};
}

// Of each client: who is farthest from it, [other, distance].
function farthest(t, at) {
  const {known, distance} = betweenOf(t, at);
  if (!known) return null;
  return Array.from({length: t.clients}, (_, i) => {
    let most = [null, null];
    for (let j = 0; j < t.clients; j += 1) {
      const far = distance(i, j);
      if (far !== null && far > (most[1] ?? -1)) most = [j, far];
    }
    return most;
  });
}

function place(client, clients) {
  const angle = Math.PI / 2 - 2 * Math.PI * client / clients;
  return [Math.cos(angle), Math.sin(angle)];
}

function drawTopology() {
  const run = runNow(), box = byId("topology");
  box.hidden = !run || !run.topology.rounds.length;
  if (box.hidden) return;
  const t = run.topology, last = t.rounds.length - 1;
  const at = round < 0 ? last : Math.min(round, last);
  const slider = byId("round");
  slider.max = last;
  slider.value = at;
  const words = sentence(t, at);
  slider.setAttribute("aria-valuetext", `round ${t.rounds[at]}`);
  byId("said").textContent = words;
  byId("drawn").textContent = drawnWords(t);
  const hasApart = t.apart[at].length > 0;
  const select = byId("colour");
  select.options[0].disabled = !hasApart;
  if (!hasApart) select.value = "scores";
  drawGraph(t, at, select.value, words);
  drawBetween(t, at);
  byId("round-table").replaceChildren(roundTable(t, at));
}

function sentence(t, at) {
  const trains = t.trains[at].replace("AB", "A|B").replace("HEAD", "the head").split("|");
  let words = `Round ${t.rounds[at]}: ${trains.join(", ").replace(/, ([^,]*)$/, " and $1")} train${trains.length > 1 ? "" : "s"}, `
    + `${t.count[at]} ${t.count[at] === 1 ? "pair" : "pairs"} met`;
  const far = t.apart[at];
  if (far.length && Math.max(...far) > 1e-4) {
    words += `; farthest from the mean${t.clients < t.all_clients ? " of those drawn" : ""}: `
      + clientOf(t, far.indexOf(Math.max(...far)));
  }
  const most = farthest(t, at);
  if (most) {
    const one = most.reduce((best, next, i) => (next[1] ?? 0) > (most[best][1] ?? 0) ? i : best, 0);
    if (most[one][0] !== null) words += `; farthest from each other: ${pairOf(t, one, most[one][0])}`;
  }
  return words + ".";
}

function drawnWords(t) {
  const parts = [];
  if (t.clients < t.all_clients) {
    parts.push(`the first ${t.clients} of ${t.all_clients} clients and the meetings among them`);
  }
  if (t.step > 1) parts.push(`every ${t.step}th round`);
  if (t.most !== null) parts.push("colour of a line: how far apart the two were as they met");
  parts.push(`width: weight in mixing, up to ${t.heaviest}`);
  return `a line: the two exchanged their factors; ${parts.join("; ")}`;
}

// From agreement, which hardly shows, to the largest distance, which stands out.
function heat() {
  return dark.matches ? ["#3b4650", "#c2571a", "#ffd7ab"] : ["#d3dbe2", "#e08a4f", "#7d2600"];
}

function heatOf(level) {
  const stops = heat().map((hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)));
  const at = Math.min(.999, level) * 2, [from, to] = stops.slice(Math.floor(at));
  return `rgb(${from.map((c, k) => Math.round(c + (to[k] - c) * (at % 1))).join(",")})`;
}

// A trace has one colour and one width: the lines are sorted into a few of each.
function linesOf(t, at) {
  const {level} = betweenOf(t, at), few = t.clients <= 24, groups = new Map();
  for (const [i, j, weight] of pairsOf(t, at)) {
    const far = level(i, j), step = far === null ? null : Math.min(6, Math.floor(7 * far));
    const width = (few ? 1.5 : .6) * Math.max(1, Math.round(3 * weight));
    const key = `${step} ${width}`;
    if (!groups.has(key)) groups.set(key, {step, width, x: [], y: []});
    const [a, b] = [place(i, t.clients), place(j, t.clients)], group = groups.get(key);
    group.x.push(a[0], b[0], null);
    group.y.push(a[1], b[1], null);
  }
  // Who disagrees most is drawn last, on top.
  return [...groups.values()].sort((a, b) => a.step - b.step).map(({step, width, x, y}) => ({
    type: "scatter", mode: "lines", hoverinfo: "skip", x, y,
    line: {width, color: step === null ? colour("--soft") : heatOf(step / 6)},
    opacity: few ? 1 : step === null ? .45 : .8,
  }));
}

function drawBetween(t, at) {
  const box = byId("between"), n = t.clients;
  box.hidden = t.most === null;
  if (box.hidden) return;
  const {level, distance} = betweenOf(t, at);
  const clients = Array.from({length: n}, (_, i) => i), names = clients.map((i) => shortOf(t, i));
  const row = (what) => clients.map((i) => clients.map((j) => what(i, j)));
  const ticks = [0, 1 / 3, 2 / 3, 1];
  const stops = heat();
  const trace = {
    type: "heatmap", x: names, y: names, z: row(level), zmin: 0, zmax: 1, xgap: n <= 24 ? 2 : 0,
    ygap: n <= 24 ? 2 : 0, hoverongaps: false,
    text: row((i, j) => `${pairOf(t, i, j)}<br>distance about ${rounded(distance(i, j), 2)}`),
    hovertemplate: "%{text}<extra></extra>",
    colorscale: [[0, stops[0]], [.5, stops[1]], [1, stops[2]]],
    colorbar: {thickness: 12, len: .8, outlinewidth: 0, tickvals: ticks, title: {text: "of a pair", side: "top"},
               ticktext: ticks.map((tick) => rounded(t.least * (t.most / t.least) ** tick, 2))},
  };
  const title = {title: {text: t.names.length ? "" : "client"}};
  const layout = layoutOf({layout: {xaxis: title, yaxis: title}});
  Object.assign(layout, {showlegend: false, margin: {l: 8, r: 8, t: 8, b: 8}});
  const axis = {showgrid: false, zeroline: false, fixedrange: true, constrain: "domain", type: "category",
                range: [-.5, n - .5]};
  // Names stand on one side, which is enough for both.
  const sides = {tickvals: names, ticktext: names.map(cut)};
  Object.assign(layout.xaxis, axis, t.names.length ? {showticklabels: false} : {});
  Object.assign(layout.yaxis, axis, t.names.length ? sides : {}, {scaleanchor: "x", range: [n - .5, -.5]});
  const plot = byId("between-plot");
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `The distance of each pair of clients in round ${t.rounds[at]}, before `
    + "mixing. The table below has who disagrees with whom the most.");
  Plotly.react(plot, [trace], layout, {...CONFIG, displayModeBar: false});
}

function drawGraph(t, at, by, words) {
  const spots = Array.from({length: t.clients}, (_, i) => place(i, t.clients));
  const all = t[by].flat().filter((one) => one !== null);
  const few = t.clients <= 24;
  const size = few ? 30 : Math.max(9, 18 - t.clients / 10);
  const shade = t[by][at];
  const hover = spots.map((_, i) => `${clientOf(t, i)}<br>distance from the mean ${t.apart[at][i] ?? "unknown"}`
    + `<br>score ${t.scores[at][i] ?? "unknown"}`);
  const low = by === "apart" ? 0 : Math.min(...all), high = Math.max(...all);
  const nodes = (those, ink, marker) => ({
    type: "scatter", mode: few && !t.names.length ? "markers+text" : "markers", hoverinfo: "text",
    hovertext: those.map((i) => hover[i]), x: those.map((i) => spots[i][0]), y: those.map((i) => spots[i][1]),
    text: those.map(String), textfont: {size: 12, color: those.map(ink)},
    marker: {size, line: {width: 1.5, color: colour("--soft")}, ...marker},
  });
  const clients = spots.map((_, i) => i), isKnown = (i) => (shade[i] ?? null) !== null;
  const known = clients.filter(isKnown), unknown = clients.filter((i) => !isKnown(i));
  const inkOf = (i) => (shade[i] - low) / (high - low || 1) > .55 ? "#111" : "#fff";
  const discs = [
    nodes(unknown, () => colour("--text"), {color: colour("--card")}),
    nodes(known, inkOf, {
      color: known.map((i) => shade[i]), cmin: low, cmax: high > low ? high : low + 1,
      colorscale: "Cividis", showscale: known.length > 0,
      colorbar: {thickness: 12, tickformat: ".2~g", len: .8, outlinewidth: 0,
                 title: {text: by === "apart" ? "from mean" : "score", side: "top"}},
    }),
  ];
  // Names stand beside their discs, away from the middle.
  const named = few ? t.names.map((name, i) => ({
    x: spots[i][0], y: spots[i][1], text: cut(name), showarrow: false,
    yshift: Math.sign(Math.round(spots[i][1] * 5) || 1) * 26, font: {size: 12},
  })) : [];
  const reach = t.names.length ? 1.35 : 1.15, hide = {visible: false, range: [-reach, reach], fixedrange: true};
  const layout = {
    ...layoutOf({layout: {}}), margin: {l: 8, r: 8, t: 8, b: 8}, annotations: named,
    xaxis: {...hide, scaleanchor: "y"}, yaxis: hide,
  };
  const graph = byId("graph");
  graph.setAttribute("role", "img");
  graph.setAttribute("aria-label", `Clients on a circle. ${words}`);
  Plotly.react(graph, [...linesOf(t, at), ...discs], layout, {...CONFIG, displayModeBar: false});
}

function rounded(value, digits = 3) {
  return value == null ? "" : String(+value.toPrecision(digits));
}

function roundTable(t, at) {
  const met = Array.from({length: t.clients}, () => []);
  for (const [i, j] of pairsOf(t, at)) { met[i].push(j); met[j].push(i); }
  const most = farthest(t, at);
  const rows = met.map((those, i) => [shortOf(t, i), those.map((j) => shortOf(t, j)).join(", ") || "nobody", rounded(t.apart[at][i]),
                                      rounded(t.scores[at][i])]);
  if (most) rows.forEach((row, i) => row.push(most[i][0] === null ? "" : shortOf(t, most[i][0]), rounded(most[i][1], 2)));
  const head = ["client", "met", "distance from the mean", "score",
                ...(most ? ["farthest client", "distance from it"] : [])];
  const known = head.map((_, k) => k).filter((k) => rows.some((row) => row[k] !== ""));
  return tableOf(known.map((k) => head[k]), rows.map((row) => known.map((k) => row[k])));
}

function moveTo(next) {
  const last = runNow().topology.rounds.length - 1;
  // At the end of a run that goes on, stay with its latest round.
  round = next >= last && !shown.finished ? -1 : next;
  drawTopology();
}

function stop() {
  clearInterval(timer);
  timer = null;
  byId("play").textContent = "Play";
  byId("play").setAttribute("aria-pressed", "false");
  byId("said").setAttribute("aria-live", "polite");
}

function play() {
  if (timer) return stop();
  const slider = byId("round");
  if (+slider.value === +slider.max) moveTo(0);
  byId("play").textContent = "Stop";
  byId("play").setAttribute("aria-pressed", "true");
  byId("said").setAttribute("aria-live", "off");
  timer = setInterval(() => {
    if (+slider.value >= +slider.max) return stop();
    moveTo(+slider.value + 1);
  }, still.matches ? 1500 : 500);
}

// -- one run: class by class

function drawClasses() {
  const run = runNow(), box = byId("classes");
  box.hidden = !run || !run.classes.length;
  if (box.hidden) return;
  const [head, ...lines] = run.classes;
  box.querySelector(".scroll").replaceChildren(tableOf(head, lines));
}

// -- the page

// One chart for each turn of the event loop, from the top: the page can be read and used meanwhile.
// What comes while charts are being drawn waits for the last of them, or none at the end would
// ever be drawn of a run with quick rounds.
let tasks = [], later = null, timing = false;

function work() {
  timing = false;
  const task = tasks.shift();
  if (task) task();
  if (!tasks.length && later) { tasks = later; later = null; }
  if (tasks.length) tick();
}

function tick() {
  if (!timing) setTimeout(work);
  timing = true;
}

function drawSoon(next) {
  if (tasks.length) later = next;
  else tasks = next;
  tick();
}

function finishDrawing() {
  while (tasks.length || later) {
    tasks.forEach((task) => task());
    tasks = later || [];
    later = null;
  }
}

function runTasks() {
  const run = runNow();
  const figures = [...document.querySelectorAll("figure[data-of=run]")];
  return [drawTopology, drawClasses,
          ...figures.map((figure) => () => draw(figure, run && run.charts[figure.dataset.chart]))];
}

function allTasks() {
  const figures = [...document.querySelectorAll("figure[data-chart]:not([data-of])")];
  return [...figures.map((figure) => () => {
    const choice = figure.querySelector("select[data-switch]");
    draw(figure, shown.charts[choice ? choice.value : figure.dataset.chart]);
  }), ...runTasks()];
}

function drawRun() { finishDrawing(); drawSoon(runTasks()); }
function drawAll() { drawSoon(allTasks()); }

function show(payload) {
  shown = payload;
  for (const place of document.querySelectorAll("[data-piece]")) {
    const html = payload.pieces[place.dataset.piece];
    if (place.shownHtml !== html) {
      const open = [...place.querySelectorAll("details")].map((one) => one.open);
      place.innerHTML = html;
      place.querySelectorAll("details").forEach((one, i) => { one.open = open[i] || false; });
      place.shownHtml = html;
    }
  }
  const select = byId("run");
  const names = payload.runs.map((one) => one.key);
  if (select.dataset.names !== names.join("\n")) {
    select.replaceChildren(...payload.runs.map((one) => new Option(one.key, one.key)));
    select.dataset.names = names.join("\n");
    if (!payload.runs.some((one) => one.key === runName)) runName = null;
  }
  select.value = (runNow() || {}).key;
  document.title = `${payload.title} · plait`;
  drawAll();
}

document.querySelectorAll("select[data-switch]").forEach((one) => one.addEventListener("change", drawAll));
byId("run").addEventListener("change", (event) => {
  stop();
  runName = event.target.value;
  round = -1;
  drawRun();
});
byId("round").addEventListener("input", (event) => { stop(); moveTo(+event.target.value); });
byId("colour").addEventListener("change", drawTopology);
byId("play").addEventListener("click", play);
window.addEventListener("beforeprint", finishDrawing);
dark.addEventListener("change", () => shown && drawAll());
narrow.addEventListener("change", () => shown && drawAll());

if (live) {
  follow();
} else {
  const study = byId("study");
  if (study) {
    study.addEventListener("change", () => {
      stop();
      runName = null;
      round = -1;
      show(payloads[+study.value]);
    });
  }
  show(payloads[0]);
}

// -- live

function follow() {
  const study = byId("study"), state = byId("state");
  let source = null;
  const say = (word, kind) => {
    if (state.textContent !== word) state.textContent = word;
    state.dataset.state = kind;
  };
  const listen = () => {
    if (source) source.close();
    source = new EventSource("events?study=" + encodeURIComponent(study.value || ""));
    source.addEventListener("studies", (event) => {
      const titles = JSON.parse(event.data), chosen = study.value;
      study.replaceChildren(...titles.map((title) => new Option(title, title)));
      if (titles.includes(chosen)) study.value = chosen;
      byId("which").hidden = titles.length < 2;
    });
    source.addEventListener("study", (event) => {
      const payload = JSON.parse(event.data);
      if (payload.title !== (shown || {}).title) { runName = null; round = -1; }
      show(payload);
      if (study.value !== payload.title) study.value = payload.title;
      say(payload.finished ? "finished" : "live", payload.finished ? "finished" : "live");
    });
    source.addEventListener("error", () => say("connection lost, trying again", "lost"));
  };
  study.addEventListener("change", () => { stop(); listen(); });
  listen();
}
