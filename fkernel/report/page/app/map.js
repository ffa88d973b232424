"use strict";
/* The map: probes × sequences, or probes × steps, as a heatmap to zoom into. White is zero. */
fk.map = {
  mount(place, state) {
    this.group = fk.group(state);
    this.place = place;
    this.kind = null;
    this.update(state);
  },
  update(state) {
    const kinds = fk.matrixKinds(this.group);
    if (!kinds.length) {
      this.place.replaceChildren(
        fk.el(
          "p.note",
          {},
          `The request ${this.group.name} kept no kernel and no contributions. Ask for them in the plan: capture: {kernel: true}`,
        ),
      );
      return;
    }
    const kind = kinds.some(([key]) => key === state.map) ? state.map : kinds[0][0];
    const order = state.order || "prompt",
      rows = state.rows || "prompt",
      key = [kind, order, rows].join("|");
    if (key !== this.kind) {
      this.kind = key;
      this.draw(state, kinds, kind, order, rows);
    }
  },
  draw(state, kinds, kind, order, rowOrder) {
    const group = this.group,
      matrix = fk.matrixOf(group, kind);
    const all = Array.from({ length: matrix.width }, (_, k) => k),
      n = group.rows.ids.length;
    const changes = fk.changes(group).values,
      byPrompt = (table) => (a, b) => table.prompt_id[a] - table.prompt_id[b] || a - b;
    this.matrix = matrix;
    this.rows =
      rowOrder === "size"
        ? fk.bySize(changes)
        : Array.from({ length: n }, (_, e) => e).sort(rowOrder === "given" ? (a, b) => a - b : byPrompt(group.rows));
    if (!matrix.steps && order === "influence") {
      const totals = all.map((k) => {
        let sum = 0;
        for (let e = 0; e < n; e++) sum += Math.abs(matrix.value(e, k));
        return sum;
      });
      all.sort((a, b) => totals[b] - totals[a] || a - b);
    } else if (!matrix.steps && order === "prompt") all.sort(byPrompt(fk.update));
    this.columns = all;
    this.grouped = !matrix.steps && order === "prompt";
    const write = (name) => (value) => fk.address.write({ [name]: value, x: null, y: null });
    const status = fk.el(
      "p.status",
      { "aria-live": "polite" },
      "Drag to zoom, double click to see all; arrow keys move, Enter opens.",
    );
    const tools = fk.el(
      "div.tools",
      {},
      kinds.length > 1 ? fk.choice("matrix", kinds, kind, write("map")) : null,
      matrix.steps
        ? null
        : fk.select(
            "sequences ",
            [
              ["prompt", "by prompt"],
              ["given", fk.isRun ? "by step" : "as given"],
              ["influence", "by influence"],
            ],
            order,
            write("order"),
          ),
      fk.select(
        "probes ",
        [
          ["prompt", "by prompt"],
          ["size", "by change"],
          ["given", "as given"],
        ],
        rowOrder,
        write("rows"),
      ),
      fk.el(
        "button",
        { type: "button", click: () => this.show([0, this.columns.length], [0, this.rows.length]) },
        "see all",
      ),
    );
    this.status = status;
    this.holder = fk.el("div.matrix", {
      tabindex: "0",
      role: "application",
      "aria-label": "map; arrow keys move, Enter opens",
    });
    this.place.replaceChildren(tools, this.holder, status);
    const range = (text, most) => {
      const [a, b] = (text || "").split("-").map(Number);
      return Number.isInteger(a) && Number.isInteger(b) && a >= 0 && b > a && b <= most ? [a, b] : [0, most];
    };
    this.x = range(state.x, this.columns.length);
    this.y = range(state.y, this.rows.length);
    this.cursor = null;
    this.chart = null;
    this.holder.addEventListener("keydown", (event) => this.key(event));
    const holder = this.holder;
    const here = () => holder.isConnected && holder === this.holder;
    fk.afterFrame(() => {
      if (!here()) return;
      this.look();
      if (fk.printing) this.redraw();
      else setTimeout(() => here() && this.redraw()); // in a turn of its own
    });
  },
  /** What is seen through the window. */
  look() {
    this.seen = fk.windowed(this.matrix.value, this.rows, this.columns, this.x, this.y);
  },
  show(x, y) {
    const clamp = ([a, b], most) => {
      const from = Math.max(0, Math.min(most - 1, Math.floor(a)));
      return [from, Math.max(from + 1, Math.min(most, Math.ceil(b)))];
    };
    this.x = clamp(x, this.columns.length);
    this.y = clamp(y, this.rows.length);
    this.look();
    this.redraw();
    const whole = ([a, b], most) => (a === 0 && b === most ? null : `${a}-${b}`);
    fk.address.write({ x: whole(this.x, this.columns.length), y: whole(this.y, this.rows.length) }, true);
  },
  redraw() {
    const { x, y, matrix, seen } = this;
    const trace = {
      type: "heatmap",
      z: seen.z,
      x0: x[0] + (seen.bx - 1) / 2,
      dx: seen.bx,
      y0: y[0] + (seen.by - 1) / 2,
      dy: seen.by,
      zmin: -matrix.limit,
      zmax: matrix.limit,
      colorscale: fk.DIVERGING,
      hoverinfo: "none",
      colorbar: fk.colourBar(matrix.unit),
    };
    const layout = fk.mapLayout(this);
    if (this.chart) {
      Plotly.react(this.chart, [trace], layout);
      return;
    }
    const height = Math.max(320, Math.min(innerHeight - 250, 130 + 22 * this.rows.length));
    this.chart = fk.chart(
      this.holder,
      [trace],
      { ...layout, height },
      { height, label: "map", config: { doubleClick: false } },
    );
    this.height = height;
    this.chart.on("plotly_relayout", (event) => {
      if (event["xaxis.range[0]"] === undefined && event["yaxis.range[0]"] === undefined) return;
      const a = event["xaxis.range[0]"] ?? this.x[0] - 0.5,
        b = event["xaxis.range[1]"] ?? this.x[1] - 0.5;
      const c = event["yaxis.range[1]"] ?? this.y[0] - 0.5,
        d = event["yaxis.range[0]"] ?? this.y[1] - 0.5;
      // In a turn of its own: what Plotly shows of the zoom is seen first.
      setTimeout(() =>
        this.show([Math.round(a + 0.5), Math.round(b + 0.5)], [Math.round(c + 0.5), Math.round(d + 0.5)]),
      );
    });
    this.chart.on("plotly_doubleclick", () => this.show([0, this.columns.length], [0, this.rows.length]));
    this.chart.on("plotly_hover", (event) => {
      const cell = this.cell(...event.points[0].pointNumber);
      fk.tip.show(this.lines(cell), event.event.clientX, event.event.clientY);
    });
    this.chart.on("plotly_unhover", () => fk.tip.hide());
    this.chart.on("plotly_click", (event) => this.open(this.cell(...event.points[0].pointNumber)));
  },
  /** The place in the matrix that a cell of the picture shows: [row, column] in the order that is seen. */
  cell(r, c) {
    const at = this.seen.where[r];
    return [at[2 * c], at[2 * c + 1]];
  },
  lines([i, k]) {
    const e = this.rows[i],
      probe = fk.sequence(this.group.rows, e),
      { value, unit, steps, limit } = this.matrix;
    const number = `${fk.signed(value(e, this.columns[k]), Math.max(2, fk.digitsFor(limit)))} ${unit}`;
    const several = this.seen.bx * this.seen.by > 1 ? `; the largest of ${this.seen.bx * this.seen.by} here` : "";
    if (steps) return [`${number}, step ${fk.data.steps.step[k]}${several}`, `${probe.id}  ${fk.both(probe, 60)}`];
    const sequence = fk.sequence(fk.update, this.columns[k]);
    const about = [
      ["reward", sequence.reward],
      ["advantage", sequence.advantage],
      ["step", sequence.step],
    ]
      .filter(([, x]) => x !== undefined && x !== null)
      .map(([name, x]) => `${name} ${fk.number(x)}`);
    return [
      `${number}${several}`,
      `probe ${probe.id}  ${fk.both(probe, 60)}`,
      `sequence ${sequence.id}  ${fk.both(sequence, 60)}`,
      about.join(", "),
    ];
  },
  open([i, k]) {
    fk.tip.hide();
    const probe = this.group.rows.ids[this.rows[i]];
    if (this.matrix.steps) fk.address.write({ view: "probes", probe, step: String(fk.data.steps.step[k]) });
    else fk.address.write({ probe, pair: fk.update.ids[this.columns[k]] });
  },
  key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Enter" && this.cursor) {
      this.open(this.cursor);
      return;
    }
    if (!moves[event.key] || !this.chart) return;
    event.preventDefault();
    const [di, dk] = moves[event.key],
      within = (at, [a, b]) => Math.max(a, Math.min(b - 1, at));
    const [i, k] = this.cursor || [this.y[0] - di, this.x[0] - dk];
    this.cursor = [within(i + di, this.y), within(k + dk, this.x)];
    Plotly.relayout(this.chart, { shapes: fk.mapLayout(this).shapes });
    this.status.textContent = this.lines(this.cursor).filter(Boolean).join(" · ");
  },
};
