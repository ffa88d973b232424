"use strict";
/* Sequences of the update batch, or of the run, by what they did to all probes of a request together. */
fk.sequences = {
  /** Σ |C| and Σ C over the probes, of every sequence. */
  totals(group) {
    const N = fk.update.ids.length,
      size = new Float64Array(N),
      sum = new Float64Array(N);
    const add = (u, value) => {
      size[u] += Math.abs(value);
      sum[u] += value;
    };
    group.rows.ids.forEach((_, e) => {
      if (group.contributions) fk.array(group.contributions).row(e).forEach((value, u) => add(u, value));
      else fk.contributionsTo(group, e).forEach(({ u, value }) => add(u, value));
    });
    return { size, sum };
  },
  mount(place, state) {
    this.group = fk.group(state);
    this.list = fk.el("aside.list.broad");
    this.detail = fk.el("section.detail", { "aria-live": "polite" });
    place.append(fk.el("div.split.broad", {}, this.list, this.detail));
    const { size, sum } = this.totals(this.group),
      has = (name) => Boolean(fk.update.numbers[name]);
    this.alike = state.alike;
    const each = fk.bySize(size).map((u) => ({ u, value: sum[u], size: size[u], p: null }));
    const rows = (state.alike === "no" ? each : fk.groupIdentical(each, ["size"]))
      .sort((a, b) => b.size - a.size)
      .map((row) => {
        return {
          ...fk.sequence(fk.update, row.u),
          text: fk.line(fk.update, row.u, 60),
          size: row.size,
          sum: row.value,
          times: row.count > 1 ? `× ${row.count}` : "",
        };
      });
    this.list.append(fk.alike(state));
    this.table = fk.table(this.list, {
      rows,
      label: "sequences",
      height: Math.max(360, innerHeight - 190),
      search: true,
      open: (row) => fk.address.write({ sequence: row.id, pair: null }),
      current: (row) => row.id === this.shown,
      text: (row) => `${row.id} ${row.prompt} ${row.response} ${row.promptId}`,
      columns: [
        {
          title: "Σ |contribution|",
          field: "size",
          kind: "size",
          note: `over the probes of ${this.group.name}, ${fk.unit}`,
        },
        { title: "Σ", field: "sum", kind: "change", note: "the same with signs" },
        { title: "prompt → response", field: "text", kind: "text", grow: 3 },
        ...(rows.some((row) => row.times)
          ? [
              {
                title: "alike",
                field: "times",
                kind: "text",
                width: 76,
                note: "identical sequences, of which the numbers are sums",
              },
            ]
          : []),
        ...(has("reward") ? [{ title: "reward", field: "reward", kind: "number" }] : []),
        ...(has("advantage") ? [{ title: "advantage", field: "advantage", kind: "signed", digits: 3 }] : []),
        ...(has("step") ? [{ title: "step", field: "step", kind: "number" }] : []),
        { title: "id", field: "id", kind: "text" },
      ],
      note: this.group.contributions
        ? `${fk.unit}, over the ${this.group.rows.ids.length} probes of ${this.group.name}`
        : "Of the largest contributors of each probe alone; all with capture: {kernel: true} in the plan.",
    });
    this.first = rows.length ? rows[0].id : null;
    this.shown = null;
    fk.afterFrame(() => place.isConnected && this.update(fk.address.read()));
  },
  update(state) {
    if (state.alike !== this.alike) {
      const place = this.list.parentElement.parentElement;
      place.replaceChildren();
      this.mount(place, state);
      return;
    }
    const id = fk.place(fk.update, state.sequence) >= 0 ? state.sequence : this.first;
    if (id === this.shown || id === null) return;
    this.shown = id;
    const u = fk.place(fk.update, id),
      sequence = fk.sequence(fk.update, u),
      group = this.group,
      rows = [];
    group.rows.ids.forEach((_, e) => {
      const found = fk.contribution(group, e, u);
      if (found && found.value) {
        const probe = fk.sequence(group.rows, e);
        rows.push({ ...probe, text: fk.both(probe, 50), value: found.value });
      }
    });
    rows.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    this.detail.replaceChildren(
      fk.el("div.bar", {}, fk.el("h2", {}, fk.el("code", {}, id))),
      fk.text(sequence),
      fk.sideFacts(sequence),
      fk.el("h3", {}, "Probes that it moved"),
    );
    fk.table(this.detail, {
      rows,
      label: "probes that it moved",
      height: 420,
      open: (row) => fk.address.write({ probe: row.id, pair: id }),
      columns: [
        { title: "contribution", field: "value", kind: "change" },
        { title: "prompt → response", field: "text", kind: "text", grow: 3 },
        { title: "probe", field: "id", kind: "text" },
      ],
    });
    this.table.refresh();
  },
};
