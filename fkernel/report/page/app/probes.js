"use strict";
/* Probes: a list to search and sort, and one of them in full. */
fk.probes = {
  rows(group) {
    const changes = fk.changes(group).values,
      predicted = fk.array(group.predicted).values;
    const measured = group.measured && fk.array(group.measured).values;
    return fk.bySize(changes).map((e) => {
      const sequence = fk.sequence(group.rows, e),
        best = fk.probes.best(group, e);
      return {
        ...sequence,
        text: fk.both(sequence, 32),
        predicted: predicted[e],
        measured: measured ? measured[e] : null,
        best: best ? fk.update.ids[best.u] : null,
        bestValue: best ? best.value : null,
      };
    });
  },
  /** The largest contributor. */
  best(group, e) {
    if (group.top) {
      const columns = fk.array(group.top.columns).row(e);
      return columns.length ? { u: columns[0], value: fk.array(group.top.values).row(e)[0] } : null;
    }
    if (!group.contributions) return null;
    const values = fk.array(group.contributions).row(e);
    let u = 0;
    for (let k = 1; k < values.length; k++) if (Math.abs(values[k]) > Math.abs(values[u])) u = k;
    return { u, value: values[u] };
  },
  mount(place, state) {
    this.group = fk.group(state);
    this.list = fk.el("aside.list");
    this.detail = fk.el("section.detail", { "aria-live": "polite" });
    place.append(fk.el("div.split", {}, this.list, this.detail));
    const rows = this.rows(this.group),
      has = (name) => rows.some((row) => row[name] !== null && row[name] !== undefined);
    this.table = fk.table(this.list, {
      rows,
      label: "probes",
      height: Math.max(360, innerHeight - 190),
      search: true,
      open: (row) => this.open(row.id),
      current: (row) => row.id === this.shown,
      text: (row) => `${row.id} ${row.prompt} ${row.response} ${row.promptId}`,
      columns: [
        { title: "prompt → response", field: "text", kind: "text", grow: 3 },
        {
          title: has("measured") ? "measured" : "predicted",
          field: has("measured") ? "measured" : "predicted",
          kind: "change",
          note: `change of ${fk.isRun ? "the run" : "log π"}, ${fk.unit}`,
        },
        ...(has("reward") ? [{ title: "reward", field: "reward", kind: "number" }] : []),
        { title: "id", field: "id", kind: "text" },
      ],
    });
    this.list.append(fk.el("p.note", {}, `${fk.unit}; positive: the probe became more likely`));
    this.first = rows.length ? rows[0].id : null;
    this.shown = null;
    this.update(state);
  },
  open(id) {
    fk.address.write({ view: "probes", probe: id, pair: null, step: null });
  },
  update(state) {
    const id = fk.place(this.group.rows, state.probe) >= 0 ? state.probe : this.first;
    const which = [state.sign, state.alike, state.step].join("|"),
      moved = id !== this.shown,
      other = which !== this.which;
    this.which = which;
    this.shown = id;
    if (id === null) return;
    if (moved) {
      this.show(fk.place(this.group.rows, id));
      this.table.refresh();
    } else if (other && this.who.isConnected) this.contributors(fk.place(this.group.rows, id));
  },
  /** The next or previous probe, in the order of the list. */
  step(by) {
    this.table.forget();
    const row = this.table.step(by);
    if (row) this.open(row.getData().id);
  },
  /** Who moved the probe, as the address asks. */
  contributors(e) {
    this.who.replaceChildren();
    fk.contributors(this.who, this.group, e, fk.address.read(), (id) =>
      fk.address.write({ probe: this.group.rows.ids[e], pair: id }),
    );
  },
  show(e) {
    const group = this.group,
      sequence = fk.sequence(group.rows, e),
      place = this.detail;
    const predicted = fk.array(group.predicted).values[e],
      measured = group.measured ? fk.array(group.measured).values[e] : null;
    const tasks = [];
    this.who = fk.el("div");
    const section = (title, note, height, fill) => {
      const own = fk.el(
        "section",
        { style: `min-height: ${height}px` },
        fk.el("h3", {}, title),
        note ? fk.el("p.note", {}, note) : null,
      );
      place.append(own);
      tasks.push(() => {
        fill(own);
        own.style.minHeight = "";
      });
    };
    place.replaceChildren();
    place.append(
      fk.el(
        "div.bar",
        {},
        fk.el("h2", {}, fk.el("code", {}, sequence.id)),
        fk.el(
          "span.steps",
          {},
          fk.el("button", { type: "button", title: "previous (k)", click: () => this.step(-1) }, "↑ previous"),
          fk.el("button", { type: "button", title: "next (j)", click: () => this.step(1) }, "↓ next"),
        ),
      ),
      fk.text(sequence, group, e),
    );
    if (group.tokens) place.append(fk.tokenScale(group));
    place.append(
      fk.el(
        "div.numbers",
        {},
        [
          ["measured", measured],
          ["predicted", predicted],
        ]
          .filter(([, x]) => x !== null)
          .map(([name, x]) =>
            fk.el(
              "div",
              { title: `${x} nats` },
              fk.el("b", { class: x < 0 ? "lower" : "raise", "data-nats": x }, fk.change(x)),
              fk.el("small", {}, `${name}, ${fk.unit}`),
            ),
          ),
        sequence.logprob === undefined || sequence.logprob === null
          ? null
          : fk.el("div", {}, fk.el("b", {}, fk.number(sequence.logprob, 4)), fk.el("small", {}, "log π before, nats")),
        sequence.reward === undefined || sequence.reward === null
          ? null
          : fk.el("div", {}, fk.el("b", {}, fk.number(sequence.reward)), fk.el("small", {}, "reward")),
      ),
    );
    if (!group.tokens && !fk.isRun)
      place.append(fk.el("p.note", {}, "Tokens are coloured where the plan asks for analyses: {tokens: true}."));
    section(
      "Where its change came from",
      `terms add up to what was ${measured === null ? "predicted" : "measured"}; the whisker is rounding`,
      330,
      (own) => fk.waterfall(own, group, e),
    );
    if (group.stepwise)
      section("Over the run", "click a step to see who did it", 600, (own) =>
        fk.timeline(own, group, e, (step) => fk.address.write({ step }, true)),
      );
    section(
      fk.isRun ? "Sequences that moved it" : "Sequences of the update batch that moved it",
      "click one to see both texts",
      540,
      (own) => {
        this.who = fk.el("div");
        own.append(this.who);
        this.contributors(e);
      },
    );
    for (const [name, title] of [
      ["rewards", "By reward function"],
      ["parts", "By part of the loss"],
    ]) {
      if (group.split && group.split[name])
        section(title, "running sums, counted at the step that trained on a sequence", 340, (own) =>
          fk.splitTimeline(own, group.split[name], e),
        );
    }
    if (group.ages)
      section("By age of the gradients", "steps after a sequence's own", 300, (own) =>
        fk.block(own, {
          kind: "bars",
          labels: group.ages[e].map((share) => share.id).reverse(),
          series: [{ name: "age", values: group.ages[e].map((share) => fk.scaled(share.value)).reverse() }],
          axis: fk.unit,
          signs: true,
        }),
      );
    if (group.contributions)
      section("Prompts, each over all its sequences", "", 380, (own) => fk.promptTable(own, group, e));
    fk.inTurns(tasks);
  },
};
