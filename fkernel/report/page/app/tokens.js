"use strict";
/* Texts with every token coloured by its change, and token × token kernels. */

fk.tokenLimits = new WeakMap();
/** The largest change of a token in a request: the end of its colour scale. */
fk.tokenLimit = (group) => {
  if (!fk.tokenLimits.has(group)) {
    let most = 0;
    for (const row of group.tokens.logprob) for (const x of row) most = Math.max(most, Math.abs(x));
    fk.tokenLimits.set(group, most || 1);
  }
  return fk.tokenLimits.get(group);
};

/** A token as it is shown: what cannot be seen is named. */
fk.tokenText = (text) => (text === "" ? "∅" : text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥"));

/** A response, every token coloured by its change; the tip has nats. */
fk.tokens = (group, e) => {
  const { texts, logprob, entropy } = group.tokens,
    limit = fk.tokenLimit(group);
  return fk.el(
    "span.tokens",
    {},
    texts[e].map((text, t) => {
      const { background, color } = fk.colourOf(logprob[e][t], limit);
      const lines = [
        `token ${t + 1} of ${texts[e].length}: ${JSON.stringify(text)}`,
        `Δ log π ${fk.signed(logprob[e][t], 6)} nats`,
        `Δ entropy ${fk.signed(entropy[e][t], 6)} nats`,
      ];
      return fk.el(
        "span.token",
        {
          style: `background: ${background}; color: ${color}`,
          tabindex: "0",
          "data-nats": logprob[e][t],
          "aria-label": lines.join(", "),
          mousemove: (event) => fk.tip.show(lines, event.clientX, event.clientY),
          mouseleave: () => fk.tip.hide(),
          focus: (event) => {
            const box = event.target.getBoundingClientRect();
            fk.tip.show(lines, box.left, box.bottom - 14);
          },
          blur: () => fk.tip.hide(),
        },
        fk.tokenText(text),
      );
    }),
  );
};

/** The scale of coloured tokens. */
fk.tokenScale = (group) => {
  const end = fk.scaled(fk.tokenLimit(group));
  return fk.el(
    "p.scale",
    {},
    fk.el("span", {}, fk.signed(-end, 2)),
    fk.el("span.ramp", { "aria-hidden": "true" }),
    fk.el("span", {}, fk.signed(end, 2)),
    `  (${fk.unit} a token; blue lowers, red raises)`,
  );
};

/** Prompt and response of a sequence; the response in coloured tokens, where they are known. */
fk.text = (sequence, group = null, e = -1) =>
  fk.el(
    "div.text",
    {},
    fk.el("span.prompt", {}, sequence.prompt),
    group && group.tokens ? fk.tokens(group, e) : fk.el("span.response", {}, sequence.response || "∅"),
  );

/** All responses of a request in coloured tokens, the ones that changed most first. */
fk.tokenRows = (place, group, open, most = 40) => {
  const changes = fk.changes(group).values,
    order = fk.bySize(changes).slice(0, most);
  place.append(
    fk.tokenScale(group),
    fk.el(
      "div.tokenrows",
      {},
      order.map((e) =>
        fk.el(
          "div.tokenrow",
          {},
          fk.el("button.link", { type: "button", click: () => open("probe", group.rows.ids[e]) }, group.rows.ids[e]),
          fk.el("span.sum", {}, fk.change(changes[e])),
          fk.text(fk.sequence(group.rows, e), group, e),
        ),
      ),
    ),
  );
  if (order.length < changes.length)
    place.append(fk.el("p.note", {}, `the ${order.length} that changed most of ${changes.length}`));
};

/** The token × token kernel of a pair, as nats of the contribution; null where it was not computed. */
fk.tokenPair = (group, rowId, columnId) =>
  group.tokens && group.tokens.pairs.find((pair) => pair.row === rowId && pair.column === columnId);

fk.tokenKernel = (place, group, e, pair) => {
  const { values, shape } = fk.array(pair.values),
    [rows, columns] = shape;
  const numbered = (texts) => texts.map((text, i) => `${i + 1} ${fk.oneLine(text)}`);
  const cells = Array.from({ length: rows }, (_, i) =>
    Array.from(values.subarray(i * columns, (i + 1) * columns), fk.scaled),
  );
  fk.block(place, {
    kind: "heat",
    title: `Token × token (${fk.unit}; rows: the probe, columns: the sequence)`,
    rows: numbered(group.tokens.texts[e]),
    columns: numbered(pair.texts),
    values: cells,
  });
};
