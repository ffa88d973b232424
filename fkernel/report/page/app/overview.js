"use strict";
/* The first thing that is seen: the verdict (which stands in the file as HTML), its numbers, and what moved most. */
fk.verdict = document.getElementById("verdict");

fk.overview = {
  mount(place, state) {
    place.append(fk.verdict);
    const group = fk.group(state);
    this.sections = fk.sections();
    if (fk.data.verdict.checks.length) this.checks(place);
    const left = fk.el("div"),
      columns = fk.el("div.columns.wide", {}, left);
    place.append(columns);
    this.most(left, group);
    if (fk.isRun) this.functions(left, group);
    if (fk.isRun) this.steps(columns, group);
    else if (group.measured && group.rows.ids.length > 1) this.agreement(columns, group);
    this.sections.redraw();
  },
  update() {},
  checks(place) {
    const section = fk.el("section.panel", {}, fk.el("h3", {}, "Requests: prediction against measurement"));
    place.append(section);
    const columns = [
      { title: "request", field: "request", kind: "text", grow: 1, width: this.widest(fk.data.verdict.checks) },
      { title: "probes", field: "sequences", kind: "number" },
      {
        title: "r",
        field: "r",
        kind: "fixed",
        digits: 6,
        note: "Pearson's correlation of predicted and measured changes",
      },
      { title: "slope", field: "slope", kind: "fixed", digits: 4 },
      { title: "relative error", field: "error", kind: "share", note: "‖predicted − measured‖ / ‖measured‖" },
      { title: "ledger's remainder", field: "remainder", kind: "share", note: "of the change" },
      { title: "rounding", field: "floor", kind: "share", note: "what rounding alone would leave" },
      {
        title: "unexplained",
        field: "unexplained",
        kind: "share",
        note: "what the step really taken has beyond the one executed here",
      },
      { title: "measured on", field: "measured", kind: "text", grow: 2 },
    ];
    fk.table(section, {
      columns,
      rows: fk.data.verdict.checks,
      search: false,
      label: "requests",
      open: (row) => fk.address.write({ request: row.request }),
      current: (row) => row.request === fk.group().name,
      note: "click a request to see it on all pages",
    });
  },
  /** Pixels that the longest name of a request needs. */
  widest: (checks) => Math.min(260, 34 + 8 * Math.max(...checks.map((check) => check.request.length), 7)),
  /** The probes that moved most, and who moved each. */
  most(place, group) {
    const section = fk.el(
      "section.panel",
      {},
      fk.el("h3", {}, `What moved most${fk.isRun ? "" : ` in ${group.name}`}`),
    );
    place.append(section);
    const rows = fk.probes
      .rows(group)
      .slice(0, 10)
      .map((row) => ({ ...row, ...this.mover(group, row.index) }));
    const measured = rows.some((row) => row.measured !== null);
    fk.table(section, {
      rows,
      search: false,
      label: "what moved most",
      open: (row) => fk.probes.open(row.id),
      columns: [
        { title: "probe", field: "text", kind: "text", grow: 2 },
        { title: measured ? "measured" : "predicted", field: measured ? "measured" : "predicted", kind: "change" },
        { title: "most by", field: "who", kind: "text", grow: 2 },
        { title: "its part", field: "bestValue", kind: "change" },
        ...(rows.some((row) => row.bestP !== null)
          ? [{ title: "p", field: "bestP", kind: "p", note: "how often shuffled advantages would do as much by chance" }]
          : []),
      ],
      note: `${fk.unit}; click a probe to see why`,
    });
  },
  /** The sequence, or the identical ones together, that did most of a probe's change, in the direction that it moved. */
  mover(group, e) {
    const way = Math.sign(fk.changes(group).values[e]),
      all = fk.groupIdentical(fk.contributionsTo(group, e)),
      most = all.reduce((best, each) => (way * each.value > (best ? way * best.value : 0) ? each : best), null);
    if (!most) return { who: null, bestValue: null, bestP: null };
    const { u, value, count, p } = most;
    return { who: `${count > 1 ? `× ${count}  ` : ""}${fk.line(fk.update, u, 34)}`, bestValue: value, bestP: p };
  },
  agreement(place, group) {
    const section = fk.el("section.panel", {}, fk.el("h3", {}, "Predicted and measured"));
    place.append(section);
    const scaled = (packed) => Array.from(fk.array(packed).values, fk.scaled);
    const points = {
      kind: "points",
      x: scaled(group.predicted),
      y: scaled(group.measured),
      ids: group.rows.ids,
      axes: [`predicted (${fk.unit})`, `measured (${fk.unit})`],
      diagonal: true,
      opens: "probe",
      note: "a point is a probe; click it to see why it moved",
    };
    this.sections.add(section, () => fk.block(section, points, fk.open, group));
  },
  /** The course of the probe that moved most. */
  steps(place, group) {
    const e = fk.bySize(fk.changes(group).values)[0],
      probe = fk.sequence(group.rows, e);
    const section = fk.el("section.panel", {}, fk.el("h3", {}, "Over the run: ", fk.both(probe, 40)));
    place.append(section);
    this.sections.add(section, () =>
      fk.timeline(section, group, e, (step) => fk.address.write({ view: "probes", probe: probe.id, step })),
    );
  },
  functions(place, group) {
    for (const panel of group.panels.filter((each) => each.key === "rewards" && each.blocks)) {
      const { section, fill } = fk.panel({ ...panel, blocks: panel.blocks.slice(0, 1) }, group);
      place.append(section);
      this.sections.add(section, fill);
    }
  },
};
