"use strict";
/* Probes: a list to search and sort, and one of them in full. */

/** ✓ or ✗ where the plan says which rewards are of right answers. */
fk.mark = (group, { reward }) =>
  typeof group.correct !== "number" || typeof reward !== "number" ? "" : reward >= group.correct ? " ✓" : " ✗";

fk.probes = {
  rows(group) {
    const changes = fk.changes(group).values,
      predicted = fk.array(group.predicted).values;
    const measured = group.measured && fk.array(group.measured).values;
    return fk.bySize(changes).map((e) => {
      const sequence = fk.sequence(group.rows, e);
      return {
        ...sequence,
        text: fk.both(sequence, 32) + fk.mark(group, sequence),
        predicted: predicted[e],
        measured: measured ? measured[e] : null,
      };
    });
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
    this.head = fk.el("div");
    this.who = fk.el("div.who");
    this.detail.append(this.head);
    this.sections = this.sectioned(this.group);
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
    } else if (other && this.who.isConnected) this.contributors();
  },
  /** The next or previous probe, in the order of the list. */
  step(by) {
    this.table.forget();
    const row = this.table.step(by);
    if (row) this.open(row.getData().id);
  },
  /** The sections of a probe, made once and drawn anew for each. */
  sectioned(group) {
    const sections = fk.sections();
    const section = (title, note, height, draw) => {
      const body = fk.el("div");
      const own = fk.el(
        "section",
        { style: `min-height: ${height}px` },
        fk.el("h3", {}, title),
        note ? fk.el("p.note", {}, note) : null,
        body,
      );
      this.detail.append(own);
      sections.add(own, () => draw(body, fk.place(group.rows, this.shown)));
    };
    section(
      "Where its change came from",
      `terms add up to what was ${group.measured ? "measured" : "predicted"}; the whisker is rounding` +
        (fk.terms(group, 0).terms.some((term) => term.name === "part.lowered")
          ? "; the batch is split by the sign of its sequences' advantages"
          : ""),
      330,
      (body, e) => fk.waterfall(body, group, e),
    );
    if (group.stepwise)
      section("Over the run", "click a step to see who did it", 600, (body, e) =>
        fk.timeline(body, group, e, (step) => fk.address.write({ step }, true)),
      );
    section(
      fk.isRun ? "Sequences that moved it" : "Sequences of the update batch that moved it",
      "click one to see both texts",
      540,
      (body) => {
        if (!body.contains(this.who)) body.append(this.who);
        this.contributors();
      },
    );
    for (const [name, title] of [
      ["rewards", "By reward function"],
      ["parts", "By part of the loss"],
    ]) {
      if (group.split && group.split[name])
        section(title, "running sums, counted at the step that trained on a sequence", 460, (body, e) => {
          const [chart, table] = body.children.length ? body.children : [fk.el("div"), fk.el("div")];
          body.replaceChildren(chart, table);
          fk.splitTimeline(chart, group.split[name], e);
          table.replaceChildren();
          fk.splitTable(table, group.split[name], e);
        });
    }
    if (group.ages)
      section("By age of the gradients", "steps after a sequence's own", 300, (body, e) => {
        const ages = [...group.ages[e]].reverse();
        body.replaceChildren();
        fk.block(body, {
          kind: "bars",
          labels: ages.map((share) => share.id),
          series: [{ name: "age", values: ages.map((share) => fk.scaled(share.value)) }],
          axis: fk.unit,
          signs: true,
        });
      });
    if (group.contributions)
      section("Prompts, each over all its sequences", fk.isRun ? "p: how often a fair coin would split the steps that trained on it so unevenly" : "", 380, (body, e) => {
        body.replaceChildren();
        fk.promptTable(body, group, e);
      });
    return sections;
  },
  /** Who moved the probe that is shown, as the address asks. */
  contributors() {
    fk.contributors(this.who, this.group, fk.place(this.group.rows, this.shown), fk.address.read(), (id) =>
      fk.address.write({ probe: this.shown, pair: id }),
    );
  },
  /** Its text and numbers at once; its charts and tables in turns after it. */
  show(e) {
    const group = this.group,
      sequence = fk.sequence(group.rows, e);
    const predicted = fk.array(group.predicted).values[e],
      measured = group.measured ? fk.array(group.measured).values[e] : null;
    this.head.replaceChildren();
    this.head.append(
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
    if (group.tokens) this.head.append(fk.tokenScale(group));
    this.head.append(
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
        group.batch_p
          ? fk.el(
              "div",
              { title: "how often the whole batch would do as much if advantages were shuffled within prompts" },
              fk.el("b", {}, fk.p(fk.array(group.batch_p).values[e])),
              fk.el("small", {}, "p of the batch's part"),
            )
          : null,
      ),
    );
    if (!group.tokens && !fk.isRun)
      this.head.append(fk.el("p.note", {}, "Tokens are coloured where the plan asks for analyses: {tokens: true}."));
    this.sections.redraw();
  },
};
