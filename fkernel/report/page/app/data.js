"use strict";
/* The data of the page: arrays are unpacked when they are first needed. */
fk.data = JSON.parse(document.getElementById("data").textContent);

fk.arrays = new WeakMap();
fk.views = { f: Float32Array, d: Float64Array, i: Int32Array };

/** Bytes of their base64; browsers of before 2025 have no function for it. */
fk.unpacked = (text) =>
  Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (each) => each.charCodeAt(0));

/** A packed array as {values, shape, row(i)}; null where there is none. */
fk.array = (packed) => {
  if (!packed) return null;
  if (!fk.arrays.has(packed)) {
    const bytes = fk.unpacked(packed.bytes);
    const values = new fk.views[packed.type](bytes.buffer);
    const width = packed.shape.slice(1).reduce((a, b) => a * b, 1);
    const row = (i) => values.subarray(i * width, (i + 1) * width);
    fk.arrays.set(packed, { values, shape: packed.shape, row });
  }
  return fk.arrays.get(packed);
};

/** A sequence of a table of sequences, by position. */
fk.sequence = (table, i) => {
  const numbers = Object.fromEntries(Object.entries(table.numbers).map(([name, values]) => [name, values[i]]));
  return {
    ...numbers,
    index: i,
    id: table.ids[i],
    prompt: table.prompts[table.prompt[i]],
    response: table.responses[i],
    promptId: table.prompt_ids[table.prompt_id[i]],
  };
};

fk.placesOf = new WeakMap();
/** The position of an id in a table of sequences, or −1. */
fk.place = (table, id) => {
  if (!fk.placesOf.has(table)) fk.placesOf.set(table, new Map(table.ids.map((name, i) => [name, i])));
  return fk.placesOf.get(table).get(id) ?? -1;
};

fk.lines = new WeakMap();
/** A sequence on one line, as `fk.both`; made once. */
fk.line = (table, i, most) => {
  if (!fk.lines.has(table)) fk.lines.set(table, new Map());
  const known = fk.lines.get(table),
    key = i * 256 + most;
  if (!known.has(key))
    known.set(key, fk.both({ prompt: table.prompts[table.prompt[i]], response: table.responses[i] }, most));
  return known.get(key);
};

fk.update = fk.data.sequences;
fk.isRun = fk.data.kind === "run";
/** A change in the page's unit, as a number and as a text. */
fk.scaled = (nats) => fk.data.unit.scale * nats;
fk.change = (nats) => fk.signed(fk.scaled(nats), fk.data.unit.digits);
fk.unit = fk.data.unit.name;

/** The change of every row of a request: measured, or else predicted. */
fk.changes = (group) => fk.array(group.measured) || fk.array(group.predicted);

/** Positions by the size of a number, largest first. */
fk.bySize = (values) => {
  const order = Array.from(values, (_, i) => i);
  return order.sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]) || a - b);
};
