"use strict";
/* Who moved a probe: sequences of the update batch or of the run, and prompts. */

/** Contributions to a probe: [{u, value, p}], all of them where they were kept, or else the largest. */
fk.contributionsTo = (group, e) => {
  const top = group.top && {
    columns: fk.array(group.top.columns).row(e),
    values: fk.array(group.top.values).row(e),
    p: group.top.p && fk.array(group.top.p).row(e),
  };
  if (group.contributions) {
    const values = fk.array(group.contributions).row(e),
      p = group.p && fk.array(group.p).row(e);
    const known = new Map(top && top.p ? Array.from(top.columns, (u, k) => [u, top.p[k]]) : []);
    return Array.from(values, (value, u) => ({ u, value, p: p ? p[u] : (known.get(u) ?? null) }));
  }
  return top ? Array.from(top.columns, (u, k) => ({ u, value: top.values[k], p: top.p ? top.p[k] : null })) : [];
};

/** What one sequence did to a probe, as {value, p}; undefined where it was not kept. */
fk.contribution = (group, e, u) => {
  if (!group.contributions || (group.top && group.top.p && !group.p))
    return fk.contributionsTo(group, e).find((each) => each.u === u);
  return { value: fk.array(group.contributions).row(e)[u], p: group.p ? fk.array(group.p).row(e)[u] : null };
};

/** Sequences with the same prompt and response as one, with sums of what they did and the smallest p. */
fk.groupIdentical = (contributions, sums = []) => {
  const groups = new Map();
  for (const each of contributions) {
    const key = `${fk.update.prompt[each.u]}\u0000${fk.update.responses[each.u]}`;
    const own = groups.get(key);
    if (own) {
      own.value += each.value;
      own.count += 1;
      for (const name of sums) own[name] += each[name];
      own.p = own.p === null || each.p === null ? null : Math.min(own.p, each.p);
      if (Math.abs(each.value) > own.most) {
        own.most = Math.abs(each.value);
        own.u = each.u;
      }
    } else groups.set(key, { ...each, count: 1, most: Math.abs(each.value) });
  }
  return [...groups.values()];
};

/** The choice whether identical sequences are one line. */
fk.alike = (state) =>
  fk.choice(
    "identical sequences",
    [
      ["yes", "identical as one"],
      ["no", "each alone"],
    ],
    state.alike === "no" ? "no" : "yes",
    (value) => fk.address.write({ alike: value === "no" ? "no" : null }, true),
  );

/** Contributors as rows of a table: largest first, of one sign or both, of one step or all. */
fk.contributorRows = (group, e, { identical, sign, step }) => {
  let given = fk.contributionsTo(group, e);
  if (step !== null) given = given.filter(({ u }) => String(fk.update.numbers.step[u]) === step);
  if (identical) given = fk.groupIdentical(given);
  const kept = given.filter(({ value }) =>
    sign === "raised" ? value > 0 : sign === "lowered" ? value < 0 : value !== 0,
  );
  kept.sort((a, b) => Math.abs(b.value) - Math.abs(a.value) || a.u - b.u);
  const columns = Object.entries(fk.update.numbers);
  Object.values(fk.update.rewards || {}).forEach((values, r) => columns.push([`reward${r}`, values]));
  return kept.map(({ u, value, p, count }) => {
    const row = { u, id: fk.update.ids[u], value, p, text: fk.line(fk.update, u, 60) };
    row.times = count > 1 ? `× ${count}` : "";
    for (const [name, values] of columns) row[name] = values[u];
    return row;
  });
};

fk.contributorColumns = (rows, identical) => {
  const has = (name) => rows.some((row) => row[name] !== null && row[name] !== undefined);
  const single = Object.keys(fk.update.rewards || {});
  return [
    { title: "contribution", field: "value", kind: "change", note: `${fk.unit}; what it did to the probe` },
    ...(has("p")
      ? [
          {
            title: "p",
            field: "p",
            kind: "p",
            note: identical
              ? "smallest of the identical ones, against permuted advantages"
              : "against permuted advantages",
          },
        ]
      : []),
    { title: "prompt → response", field: "text", kind: "text", grow: 3 },
    ...(identical && rows.some((row) => row.times)
      ? [
          {
            title: "alike",
            field: "times",
            kind: "text",
            width: 76,
            note: "identical sequences: the contribution is their sum, the rest is of the one that did most",
          },
        ]
      : []),
    ...(has("reward") ? [{ title: "reward", field: "reward", kind: "number" }] : []),
    ...(single.length > 1 ? single.map((name, r) => ({ title: name, field: `reward${r}`, kind: "number" })) : []),
    ...(has("advantage") ? [{ title: "advantage", field: "advantage", kind: "signed", digits: 3 }] : []),
    ...(fk.isRun ? [{ title: "step", field: "step", kind: "number" }] : []),
    { title: "sequence", field: "id", kind: "text", width: fk.isRun ? 132 : 100 },
  ];
};

/** A sentence on a batch of so few sequences that no p could be small. */
fk.weakTest = (group) => {
  const least = group.least ? Math.min(...group.least) : 0;
  return least > 0.05 ? ` No sequence's p can be below ${fk.p(least)} here: too few advantages of a prompt differ.` : "";
};

/** Whether what sequences did could be chance: what p says, or why there is none and how to get it. */
fk.chance = (group, rows) => {
  const key = fk.isRun ? "p" : "uncertainty",
    { left_out, blocks, ask } = group.panels.find((panel) => panel.key === key) || {};
  const tested = rows.filter((row) => row.p !== null);
  if (tested.length) {
    const clear = tested.filter((row) => row.p <= 0.05).length,
      known = `p ≤ 0.05 for ${clear} of ${tested.length}`;
    return fk.isRun
      ? `Is that chance? p is how often any sequence of the run would do as much if advantages were shuffled within prompts: ${known}. What prompts and reward functions did in many steps is tested further down.`
      : `Is that chance? p is how often any sequence would do as much if advantages were shuffled within prompts: ${known}${tested.length < rows.length ? "; –: not computed for this one" : ""}.${fk.weakTest(group)} Sums over prompts, below, are tested as well, and find more where many responses are alike.`;
  }
  if (left_out) return `Is that chance? There is no p: ${left_out}.`;
  if (blocks) return "Is that chance? p is known of sums over prompts alone, on the page Analyses.";
  return ask ? `Is that chance? Nobody asked; p-values come with ${ask.replace(/\s+/g, " ")} in the plan.` : "";
};

fk.contributorTables = new WeakMap();
/** The table of contributors, with its choices; `open` takes the id of a sequence. A table that is there gets other rows. */
fk.contributors = (place, group, e, state, open) => {
  const options = { identical: state.alike !== "no", sign: state.sign || "both", step: fk.isRun ? (state.step ?? null) : null };
  const rows = fk.contributorRows(group, e, options);
  const note = [
    fk.chance(group, rows),
    group.contributions ? "" : "Only the largest were kept; all of them with capture: {kernel: true} in the plan.",
  ].join(" ");
  const tools = fk.el(
    "div.tools",
    {},
    fk.choice(
      "which contributors",
      [
        ["both", "both"],
        ["raised", "raised it"],
        ["lowered", "lowered it"],
      ],
      options.sign,
      (value) => fk.address.write({ sign: value === "both" ? null : value }, true),
    ),
    fk.alike(state),
    options.step === null
      ? null
      : fk.el(
          "button",
          { type: "button", click: () => fk.address.write({ step: null }, true) },
          `only step ${options.step} ✕`,
        ),
  );
  const columns = fk.contributorColumns(rows, options.identical),
    known = fk.contributorTables.get(place),
    shape = [options.identical, rows.length > 11, ...columns.map((column) => column.field)].join("|");
  if (known && known.shape === shape && rows.length && !fk.printing) {
    known.tools.replaceWith(tools);
    known.tools = tools;
    known.table.replace(rows, note);
    return;
  }
  fk.contributorTables.delete(place);
  place.replaceChildren(tools);
  if (!rows.length) {
    place.append(fk.el("p.note", {}, "No sequence did anything to it here."));
    return;
  }
  const table = fk.table(place, {
    columns,
    rows,
    open: (row) => open(row.id),
    label: "contributors",
    height: 400,
    search: true,
    text: ({ u }) => {
      const sequence = fk.sequence(fk.update, u);
      return `${sequence.prompt} ${sequence.response} ${sequence.id} ${sequence.promptId}`;
    },
    current: (row) => row.id === fk.address.read().pair,
    note,
  });
  fk.contributorTables.set(place, { table, tools, shape });
};
