"use strict";
/* The map: probes × sequences, or probes × steps, as a heatmap to zoom into. White is zero.
   Where there are more cells than can be seen, a cell of the picture stands for several, and shows the largest of them. */
fk.MOST_COLUMNS = 500;
fk.MOST_ROWS = 200;

/** The symmetric end of the colour scale: all but the largest 0.5 % of values lie within. */
fk.limits = new WeakMap();
fk.limitOf = (values) => {
  if (!fk.limits.has(values)) fk.limits.set(values, fk.quantile(values));
  return fk.limits.get(values);
};

fk.quantile = (values) => {
  const every = Math.max(1, Math.floor(values.length / 100000)), sample = [];
  for (let i = 0; i < values.length; i += every) if (values[i] !== 0) sample.push(Math.abs(values[i]));
  sample.sort((a, b) => a - b);
  return sample.length ? sample[Math.min(sample.length - 1, Math.floor(0.995 * sample.length))] : 1;
};

/** Runs of equal values in an order: [{from, to, value}]. */
fk.runsOf = (order, value) => {
  const runs = [];
  order.forEach((i, place) => {
    const last = runs[runs.length - 1];
    if (last && last.value === value(i)) last.to = place;
    else runs.push({ from: place, to: place, value: value(i) });
  });
  return runs;
};

/**
 * What is seen of a matrix through a window, in at most so many cells.
 * @returns z [rows][columns], and for each cell the place in the matrix of the value that it shows
 */
fk.windowed = (value, rows, columns, [x0, x1], [y0, y1]) => {
  const bx = Math.ceil((x1 - x0) / fk.MOST_COLUMNS) || 1, by = Math.ceil((y1 - y0) / fk.MOST_ROWS) || 1;
  const nx = Math.ceil((x1 - x0) / bx), ny = Math.ceil((y1 - y0) / by), z = [], where = [];
  for (let r = 0; r < ny; r++) {
    const own = new Float32Array(nx), at = new Int32Array(2 * nx);
    for (let c = 0; c < nx; c++) {
      let most = -1;
      for (let i = y0 + r * by; i < Math.min(y1, y0 + (r + 1) * by); i++) {
        for (let k = x0 + c * bx; k < Math.min(x1, x0 + (c + 1) * bx); k++) {
          const x = value(rows[i], columns[k]), size = Math.abs(x);
          if (size > most) { most = size; own[c] = x; at[2 * c] = i; at[2 * c + 1] = k; }
        }
      }
    }
    z.push(own); where.push(at);
  }
  return { z, where, bx, by };
};

fk.map = {
  /** The matrices that can be shown: [key, title]. */
  kinds(group) {
    const kinds = [];
    if (group.stepwise) kinds.push(["steps", "probes × steps"]);
    if (group.contributions) kinds.push(["sequences", "probes × sequences"]);
    if (group.kernel) kinds.push(["cosine", "cosines of the kernel"]);
    return kinds;
  },
  /** A matrix: value(e, k), number of columns, unit, whether columns are steps. */
  matrix(group, kind) {
    if (kind === "steps") {
      const { values, shape } = fk.array(group.stepwise.by_step), T = shape[1];
      return { value: (e, t) => fk.data.unit.scale * values[e * T + t], width: T, unit: fk.unit, limit: fk.scaled(fk.limitOf(values)), steps: true };
    }
    if (kind === "cosine") {
      const { values, shape } = fk.array(group.kernel), [rows, columns] = group.diagonals.map((each) => fk.array(each).values), N = shape[1];
      return { value: (e, u) => values[e * N + u] / (Math.sqrt(rows[e] * columns[u]) || 1), width: N, unit: "cosine", limit: 1 };
    }
    const { values, shape } = fk.array(group.contributions), N = shape[1], scale = fk.data.unit.scale;
    return { value: (e, u) => scale * values[e * N + u], width: N, unit: fk.unit, limit: fk.scaled(fk.limitOf(values)) };
  },
  mount(place, state) {
    this.group = fk.group(state);
    this.place = place;
    this.kind = null;
    this.update(state);
  },
  update(state) {
    const kinds = this.kinds(this.group);
    if (!kinds.length) {
      this.place.replaceChildren(fk.el("p.note", {}, `The request ${this.group.name} kept no kernel and no contributions. Ask for them in the plan: capture: {kernel: true}`));
      return;
    }
    const kind = kinds.some(([key]) => key === state.map) ? state.map : kinds[0][0];
    const order = state.order || "prompt", rows = state.rows || "prompt", key = [kind, order, rows].join("|");
    if (key !== this.kind) { this.kind = key; this.draw(state, kinds, kind, order, rows); }
  },
  draw(state, kinds, kind, order, rowOrder) {
    const group = this.group, matrix = this.matrix(group, kind);
    const all = Array.from({ length: matrix.width }, (_, k) => k), n = group.rows.ids.length;
    const changes = fk.changes(group).values, byPrompt = (table) => (a, b) => table.prompt_id[a] - table.prompt_id[b] || a - b;
    this.matrix_ = matrix;
    this.rows = rowOrder === "size" ? fk.bySize(changes) : Array.from({ length: n }, (_, e) => e).sort(rowOrder === "given" ? (a, b) => a - b : byPrompt(group.rows));
    if (!matrix.steps && order === "influence") {
      const totals = all.map((k) => { let sum = 0; for (let e = 0; e < n; e++) sum += Math.abs(matrix.value(e, k)); return sum; });
      all.sort((a, b) => totals[b] - totals[a] || a - b);
    } else if (!matrix.steps && order === "prompt") all.sort(byPrompt(fk.update));
    this.columns = all;
    this.grouped = !matrix.steps && order === "prompt";
    const write = (name) => (value) => fk.address.write({ [name]: value, x: null, y: null });
    const status = fk.el("p.status", { "aria-live": "polite" }, "Drag to zoom, double click to see all; arrow keys move, Enter opens.");
    const tools = fk.el("div.tools", {},
      kinds.length > 1 ? fk.choice("matrix", kinds, kind, write("map")) : null,
      matrix.steps ? null : fk.select("sequences ", [["prompt", "by prompt"], ["given", fk.isRun ? "by step" : "as given"], ["influence", "by influence"]], order, write("order")),
      fk.select("probes ", [["prompt", "by prompt"], ["size", "by change"], ["given", "as given"]], rowOrder, write("rows")),
      fk.el("button", { type: "button", click: () => this.show([0, this.columns.length], [0, this.rows.length]) }, "see all"));
    this.status = status;
    this.holder = fk.el("div.matrix", { tabindex: "0", role: "application", "aria-label": "map; arrow keys move, Enter opens" });
    this.place.replaceChildren(tools, this.holder, status);
    const range = (text, most) => { const [a, b] = (text || "").split("-").map(Number); return b > a && b <= most ? [a, b] : [0, most]; };
    this.x = range(state.x, this.columns.length);
    this.y = range(state.y, this.rows.length);
    this.cursor = null;
    this.chart = null;
    this.redraw();
    this.holder.addEventListener("keydown", (event) => this.key(event));
  },
  show(x, y) {
    const clamp = ([a, b], most) => { const from = Math.max(0, Math.min(most - 1, Math.floor(a))); return [from, Math.max(from + 1, Math.min(most, Math.ceil(b)))]; };
    this.x = clamp(x, this.columns.length);
    this.y = clamp(y, this.rows.length);
    this.redraw();
    const whole = ([a, b], most) => (a === 0 && b === most ? null : `${a}-${b}`);
    fk.address.write({ x: whole(this.x, this.columns.length), y: whole(this.y, this.rows.length) }, true);
  },
  redraw() {
    const { x, y, matrix_: matrix } = this, seen = fk.windowed(matrix.value, this.rows, this.columns, x, y);
    this.seen = seen;
    const trace = {
      type: "heatmap", z: seen.z, x0: x[0] + (seen.bx - 1) / 2, dx: seen.bx, y0: y[0] + (seen.by - 1) / 2, dy: seen.by, zmin: -matrix.limit, zmax: matrix.limit, colorscale: fk.DIVERGING,
      hoverinfo: "none", colorbar: fk.colourBar(matrix.unit),
    };
    const layout = this.layout();
    if (this.chart) { Plotly.react(this.chart, [trace], layout); return; }
    const height = Math.max(320, Math.min(innerHeight - 250, 130 + 22 * this.rows.length));
    this.chart = fk.chart(this.holder, [trace], { ...layout, height }, { height, label: "map", config: { doubleClick: false } });
    this.height = height;
    this.chart.on("plotly_relayout", (event) => {
      if (event["xaxis.range[0]"] === undefined && event["yaxis.range[0]"] === undefined) return;
      const a = event["xaxis.range[0]"] ?? this.x[0] - 0.5, b = event["xaxis.range[1]"] ?? this.x[1] - 0.5;
      const c = event["yaxis.range[1]"] ?? this.y[0] - 0.5, d = event["yaxis.range[0]"] ?? this.y[1] - 0.5;
      this.show([Math.round(a + 0.5), Math.round(b + 0.5)], [Math.round(c + 0.5), Math.round(d + 0.5)]);
    });
    this.chart.on("plotly_doubleclick", () => this.show([0, this.columns.length], [0, this.rows.length]));
    this.chart.on("plotly_hover", (event) => {
      const cell = this.cell(...event.points[0].pointNumber);
      fk.tip.show(this.lines(cell), event.event.clientX, event.event.clientY);
    });
    this.chart.on("plotly_unhover", () => fk.tip.hide());
    this.chart.on("plotly_click", (event) => this.open(this.cell(...event.points[0].pointNumber)));
  },
  layout() {
    const { x, y } = this, table = this.group.rows, shownRows = y[1] - y[0];
    const every = Math.ceil(shownRows / Math.max(8, Math.floor((this.height || 560) / 20))), places = [];
    for (let i = y[0]; i < y[1]; i += every) places.push(i);
    const rowText = (i) => fk.chartText(fk.tail(fk.both(fk.sequence(table, this.rows[i]), 26), 28));
    const columns = this.columnTicks(), rowTexts = places.map(rowText), longest = (texts) => Math.max(0, ...(texts || []).map((text) => text.length));
    const margin = { l: 16 + 7.4 * longest(rowTexts), r: 10, t: 10, b: 46 + (columns.ticks.tickangle ? 5 * longest(columns.ticks.ticktext) : 16) };
    const rowRuns = fk.runsOf(this.rows.slice(y[0], y[1]), (e) => table.prompt_id[e]);
    const lines = [];
    const edge = (axis, at) => lines.push({ type: "line", [`${axis}0`]: at, [`${axis}1`]: at, [axis === "x" ? "yref" : "xref"]: "paper", [axis === "x" ? "y0" : "x0"]: 0, [axis === "x" ? "y1" : "x1"]: 1, line: { color: "#777777", width: 0.6 } });
    if (columns.edges.length < 120) columns.edges.forEach((at) => edge("x", at));
    if (rowRuns.length < 60 && rowRuns.length < 0.6 * shownRows) rowRuns.slice(1).forEach((run) => edge("y", y[0] + run.from - 0.5));
    if (this.cursor) {
      const [i, k] = this.cursor;
      lines.push({ type: "rect", x0: k - 0.5, x1: k + 0.5, y0: i - 0.5, y1: i + 0.5, line: { color: "#e69f00", width: 3 } });
    }
    const size = this.height ? { height: this.height } : {};
    return fk.layout({
      ...size, shapes: lines, dragmode: "zoom", margin,
      xaxis: { range: [x[0] - 0.5, x[1] - 0.5], title: { text: columns.title }, showgrid: false, zeroline: false, automargin: false, ...columns.ticks },
      yaxis: { range: [y[1] - 0.5, y[0] - 0.5], tickmode: "array", tickvals: places, ticktext: rowTexts, showgrid: false, zeroline: false, automargin: false, ticks: "" },
    });
  },
  /** Ticks, edges between groups and the title of the columns. */
  columnTicks() {
    const { x } = this, seen = this.columns.slice(x[0], x[1]), count = x[1] - x[0];
    const array = (vals, texts) => ({ tickmode: "array", tickvals: vals, ticktext: texts, tickangle: vals.length > 12 ? -40 : 0, ticks: "" });
    if (this.matrix_.steps) {
      const every = Math.ceil(count / 24), vals = [];
      for (let k = x[0]; k < x[1]; k += every) vals.push(k);
      return { edges: [], title: "step", ticks: { ...array(vals, vals.map((k) => String(fk.data.steps.step[k]))), tickangle: 0 } };
    }
    if (count <= 36) {
      const vals = seen.map((_, i) => x[0] + i), runs = this.grouped ? fk.runsOf(seen, (u) => fk.update.prompt_id[u]) : [];
      return { edges: runs.slice(1).map((run) => x[0] + run.from - 0.5), title: "", ticks: array(vals, seen.map((u) => fk.chartText(fk.both(fk.sequence(fk.update, u), 20)))) };
    }
    const by = this.grouped ? (u) => fk.update.prompt_id[u] : fk.isRun && !this.grouped ? (u) => fk.update.numbers.step[u] : () => 0;
    const runs = fk.runsOf(seen, by), every = Math.ceil(runs.length / 30);
    const named = runs.filter((_, i) => i % every === 0), vals = named.map((run) => x[0] + (run.from + run.to) / 2);
    if (this.grouped) return { edges: runs.slice(1).map((run) => x[0] + run.from - 0.5), title: `${count} sequences, by prompt`, ticks: array(vals, named.map((run) => fk.chartText(fk.tail(fk.oneLine(fk.update.prompts[fk.update.prompt[seen[run.from]]]), 14)))) };
    if (runs.length > 1 && runs.length < count / 2) return { edges: [], title: `${count} sequences, by step`, ticks: { ...array(vals, named.map((run) => String(run.value))), tickangle: 0 } };
    return { edges: [], title: `${count} sequences`, ticks: { showticklabels: false, ticks: "" } };
  },
  /** The place in the matrix that a cell of the picture shows: [row, column] in the order that is seen. */
  cell(r, c) { const at = this.seen.where[r]; return [at[2 * c], at[2 * c + 1]]; },
  lines([i, k]) {
    const e = this.rows[i], probe = fk.sequence(this.group.rows, e), { value, unit, steps, limit } = this.matrix_;
    const number = `${fk.signed(value(e, this.columns[k]), Math.max(2, fk.digitsFor(limit)))} ${unit}`;
    const several = this.seen.bx * this.seen.by > 1 ? `; the largest of ${this.seen.bx * this.seen.by} here` : "";
    if (steps) return [`${number}, step ${fk.data.steps.step[k]}${several}`, `${probe.id}  ${fk.both(probe, 60)}`];
    const sequence = fk.sequence(fk.update, this.columns[k]);
    const about = [["reward", sequence.reward], ["advantage", sequence.advantage], ["step", sequence.step]].filter(([, x]) => x !== undefined && x !== null).map(([name, x]) => `${name} ${fk.number(x)}`);
    return [`${number}${several}`, `probe ${probe.id}  ${fk.both(probe, 60)}`, `sequence ${sequence.id}  ${fk.both(sequence, 60)}`, about.join(", ")];
  },
  open([i, k]) {
    fk.tip.hide();
    const probe = this.group.rows.ids[this.rows[i]];
    if (this.matrix_.steps) fk.address.write({ view: "probes", probe, step: String(fk.data.steps.step[k]) });
    else fk.address.write({ probe, pair: fk.update.ids[this.columns[k]] });
  },
  key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Enter" && this.cursor) { this.open(this.cursor); return; }
    if (!moves[event.key]) return;
    event.preventDefault();
    const [di, dk] = moves[event.key], within = (at, [a, b]) => Math.max(a, Math.min(b - 1, at));
    const [i, k] = this.cursor || [this.y[0] - di, this.x[0] - dk];
    this.cursor = [within(i + di, this.y), within(k + dk, this.x)];
    Plotly.relayout(this.chart, { shapes: this.layout().shapes });
    this.status.textContent = this.lines(this.cursor).filter(Boolean).join(" · ");
  },
};
