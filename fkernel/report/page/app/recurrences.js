"use strict";
/* What came back in several steps: prompts and reward functions, and whether they moved a probe the same way each time. */

/** The sign test: probability that a fair coin splits n as unevenly as up : n − up, or more. */
fk.signTest = (up, n) => {
  let term = 2 ** -n,
    tail = 0;
  for (let k = 0; k <= Math.min(up, n - up); k++) {
    tail += term;
    term *= (n - k) / (k + 1);
  }
  return Math.min(1, 2 * tail);
};

/** Of sums by step: in how many steps it raised and lowered the probe, and p of so uneven a split. */
fk.recurrence = (sums) => {
  const raised = sums.filter((value) => value > 0).length,
    lowered = sums.filter((value) => value < 0).length,
    steps = raised + lowered;
  return { raised, lowered, p: steps > 1 ? fk.signTest(raised, steps) : null };
};

/** Columns of what `fk.recurrence` counts. */
fk.recurrenceColumns = [
  { title: "steps raised", field: "raised", kind: "number", note: "that trained on it and in which it raised the probe" },
  { title: "steps lowered", field: "lowered", kind: "number", note: "that trained on it and in which it lowered the probe" },
  { title: "p", field: "p", kind: "p", note: "sign test: of so uneven a split of steps, were both as likely" },
];

/** Sums over prompts, largest first, with p-values where they are known. */
fk.promptRows = (group, e) => {
  const known = group.prompts && new Map(group.prompts.ids.map((id, i) => [id, fk.array(group.prompts.p).row(e)[i]]));
  const sums = new Map();
  for (const { u, value } of fk.contributionsTo(group, e)) {
    const g = fk.update.prompt_id[u],
      own = sums.get(g) || { value: 0, count: 0, steps: new Map(), prompt: fk.update.prompts[fk.update.prompt[u]] },
      step = fk.isRun ? fk.update.numbers.step[u] : 0;
    own.value += value;
    own.count += 1;
    own.steps.set(step, (own.steps.get(step) || 0) + value);
    sums.set(g, own);
  }
  const rows = [...sums].map(([g, own]) => ({
    id: fk.update.prompt_ids[g],
    prompt: own.prompt,
    value: own.value,
    count: own.count,
    ...(fk.isRun ? fk.recurrence([...own.steps.values()]) : {}),
    ...(known ? { p: known.get(fk.update.prompt_ids[g]) ?? null } : {}),
  }));
  return rows.filter((row) => row.value !== 0).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
};

fk.promptTable = (place, group, e) => {
  const rows = fk.promptRows(group, e);
  const columns = [
    { title: "sum", field: "value", kind: "change" },
    ...(group.prompts
      ? [{ title: "p", field: "p", kind: "p", note: "against advantages permuted within prompts" }]
      : []),
    { title: "prompt", field: "prompt", kind: "text", grow: 3 },
    { title: "sequences", field: "count", kind: "number" },
    ...(fk.isRun ? fk.recurrenceColumns : []),
    ...(rows.some((row) => fk.givenId(row.id)) ? [{ title: "id", field: "id", kind: "text" }] : []),
  ];
  fk.table(place, { columns, rows, label: "prompts", height: 300 });
};

/** What each reward function, or part of the loss, did over the run, and in how many steps. */
fk.splitTable = (place, split, e) => {
  const { values, shape } = fk.array(split.values),
    [, T, R] = shape;
  const rows = split.names.map((name, r) => {
    const own = Array.from({ length: T }, (_, t) => values[(e * T + t) * R + r]);
    return { name, value: own.reduce((sum, value) => sum + value, 0), ...fk.recurrence(own) };
  });
  rows.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const columns = [
    { title: "name", field: "name", kind: "text", grow: 3 },
    { title: "contribution", field: "value", kind: "change" },
    ...fk.recurrenceColumns,
  ];
  fk.table(place, { columns, rows, search: false, label: "steps for and against" });
};
