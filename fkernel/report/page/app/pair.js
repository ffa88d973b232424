"use strict";
/* A probe and a sequence side by side: texts, numbers, the kernel's entry, its parts, and token × token. */

/** An id that somebody gave; null of a hash, which tells a reader nothing that the text beside it does not. */
fk.givenId = (id) => (/-[0-9a-f]{12,}$/.test(id) ? null : id);

/** Facts of one side. */
fk.sideFacts = (sequence) =>
  fk.facts([
    ["step", sequence.step],
    ["reward", sequence.reward === undefined ? null : fk.number(sequence.reward)],
    ...Object.entries(fk.update.rewards || {})
      .filter(() => sequence.step !== undefined)
      .map(([name, values]) => [`reward, ${name}`, fk.number(values[sequence.index])]),
    [
      "advantage",
      sequence.advantage === undefined || sequence.advantage === null ? null : fk.signed(sequence.advantage, 4),
    ],
    ["weight", sequence.weight === undefined || sequence.weight === null ? null : fk.number(sequence.weight, 4)],
    [
      "log π before",
      sequence.logprob === undefined || sequence.logprob === null ? null : `${fk.number(sequence.logprob, 5)} nats`,
    ],
    ["prompt", fk.givenId(sequence.promptId)],
  ]);

/** The identical sequences that one stands for, together. */
fk.together = (group, e, u) => {
  const like = (v) => fk.update.prompt[v] === fk.update.prompt[u] && fk.update.responses[v] === fk.update.responses[u],
    all = fk.contributionsTo(group, e).filter((each) => like(each.u)),
    sum = all.reduce((total, each) => total + each.value, 0);
  return all.length > 1 ? [`the ${all.length} identical sequences together`, fk.withUnit(fk.change(sum), fk.unit)] : null;
};

/** What is known of a pair: contribution, p, K and cosine. */
fk.pairFacts = (group, e, u) => {
  const found = fk.contribution(group, e, u);
  const together = fk.together(group, e, u);
  const facts = [
    [together ? "contribution of this one" : "contribution", found ? fk.withUnit(fk.change(found.value), fk.unit) : "not kept"],
    ["p", found && found.p !== null ? fk.p(found.p) : null],
    ...(together ? [together] : []),
  ];
  if (group.kernel) {
    const K = fk.array(group.kernel).row(e)[u],
      [rows, columns] = group.diagonals.map((each) => fk.array(each).values);
    facts.push(["kernel K", fk.number(K, 5)], ["cosine", fk.signed(K / Math.sqrt(rows[e] * columns[u]), 4)]);
  }
  return facts;
};

/** The contribution by kind of parameter and by layer, where the pair is among the largest. */
fk.pairParts = (place, group, e, u) => {
  if (!group.top || !group.top.parts) return;
  const k = Array.from(fk.array(group.top.columns).row(e)).indexOf(u),
    [n, width] = group.top.columns.shape;
  if (k < 0) return;
  const known = [
    ["kind", "By kind of parameter"],
    ["layer", "By layer"],
  ].filter(([view]) => group.top.parts[view]);
  const holders = known.map(() => fk.el("div"));
  place.append(...holders);
  known.forEach(([view, title], i) => {
    const part = group.top.parts[view];
    const values = fk.array(part.values).values;
    const own = part.names.map((_, g) => fk.scaled(values[(g * n + e) * width + k]));
    fk.block(holders[i], {
      kind: "bars",
      title,
      labels: [...part.names].reverse(),
      series: [{ name: title, values: own.reverse() }],
      axis: fk.unit,
      signs: true,
    });
  });
};

fk.pair = {
  dialog: fk.el("dialog.pair", { "aria-label": "a probe and a sequence side by side" }),
  /** Show the pair that the address names, or close. */
  show(group, probe, sequence) {
    const e = fk.place(group.rows, probe),
      u = fk.place(fk.update, sequence);
    if (e < 0 || u < 0) {
      this.close();
      return;
    }
    const [E, U] = [fk.sequence(group.rows, e), fk.sequence(fk.update, u)];
    const parts = fk.el("div.columns"),
      pair = fk.tokenPair(group, E.id, U.id),
      tokens = fk.el("div");
    const side = (title, sequence, text) =>
      fk.el("section", {}, fk.el("h3", {}, title, " ", fk.el("code", {}, sequence.id)), text, fk.sideFacts(sequence));
    this.dialog.replaceChildren(
      fk.el(
        "div.bar",
        {},
        fk.el("h2", {}, "Side by side"),
        fk.el("button", { type: "button", "aria-label": "close", click: () => this.leave() }, "✕"),
      ),
      fk.el(
        "div.numbers",
        {},
        fk
          .pairFacts(group, e, u)
          .filter(([, value]) => value !== null)
          .map(([name, value]) => fk.el("div", {}, fk.el("b", {}, value), fk.el("small", {}, name))),
      ),
      fk.el(
        "div.columns",
        {},
        side("Probe", E, fk.text(E, group, e)),
        side(fk.isRun ? "Sequence of the run" : "Sequence of the update batch", U, fk.text(U)),
      ),
      parts,
      tokens,
    );
    if (!this.dialog.open) this.dialog.showModal();
    fk.pairParts(parts, group, e, u);
    if (pair) fk.tokenKernel(tokens, group, e, pair);
    else if (!fk.isRun)
      tokens.append(
        fk.el(
          "p.note",
          {},
          `The token × token kernel of this pair was not computed. Ask for it in the plan: analyses: {tokens: {pairs: [["${E.id}", "${U.id}"]]}}`,
        ),
      );
  },
  leave() {
    this.close(); // at once: a key that follows is the page's
    fk.address.write({ pair: null });
  },
  close() {
    if (this.dialog.open) this.dialog.close();
    this.dialog.replaceChildren();
  },
};
fk.pair.dialog.addEventListener("cancel", (event) => {
  event.preventDefault();
  fk.pair.leave();
});
fk.pair.dialog.addEventListener("click", (event) => {
  if (event.target === fk.pair.dialog) fk.pair.leave();
});
document.body.append(fk.pair.dialog);
