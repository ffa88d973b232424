"use strict";
/* Tables, by Tabulator: sorted, searched and walked through with the arrow keys. */

fk.cells = {
  text: (x) => (x === null || x === undefined ? "–" : fk.oneLine(String(x))),
  signed: (x, column) => fk.signed(x, column.digits ?? 2),
  number: (x) => fk.number(x),
  share: fk.share,
  p: fk.p,
  change: (x) => fk.change(x),
  size: (x) => fk.fixed(fk.scaled(x), fk.data.unit.digits),
  fixed: (x, column) => fk.fixed(x, column.digits),
};
fk.RIGHT = new Set(["signed", "number", "share", "p", "change", "size", "fixed"]);
fk.NARROW = new Set(["number", "p"]);
fk.PRINTED = 30;

/** What a cell shows: a text, with the whole number or text where the pointer rests. */
fk.cell = (column) => (cell) => {
  const value = cell.getValue(),
    format = fk.cells[column.kind] || fk.cells.text;
  const known = value !== null && value !== undefined;
  const title =
    known && (column.kind === "change" || column.kind === "size")
      ? `${value} nats`
      : known && value === value
        ? String(value)
        : null;
  if (column.kind === "probe" || column.kind === "sequence") return fk.named(column, value);
  const text = format(value, column),
    signed = (column.kind === "signed" || column.kind === "change") && known && text !== "0";
  return fk.el(`span${signed ? (value < 0 ? ".lower" : ".raise") : ""}`, { title }, text);
};

/** The id of a probe or a sequence, and its text. */
fk.named = (column, id) => {
  const table = column.kind === "probe" ? column.group && column.group.rows : fk.update,
    place = table ? fk.place(table, id) : -1;
  if (place < 0) return fk.el("span", {}, fk.cells.text(id));
  const sequence = fk.sequence(table, place);
  return fk.el(
    "span",
    { title: `${sequence.prompt}${sequence.response}` },
    id,
    " ",
    fk.el("span.soft", {}, fk.both(sequence, 32)),
  );
};

fk.missingLast = (a, b) => {
  const [x, y] = [a, b].map((value) =>
    value === null || value === undefined || Number.isNaN(value) ? -Infinity : value,
  );
  return x === y ? 0 : x < y ? -1 : 1;
};

fk.tabulatorColumn = (column) => ({
  title: column.title,
  field: column.field,
  titleFormatter: () => fk.el("span", { title: column.note || column.title }, column.title),
  formatter: fk.cell(column),
  hozAlign: fk.RIGHT.has(column.kind) ? "right" : "left",
  headerHozAlign: fk.RIGHT.has(column.kind) ? "right" : "left",
  sorter: fk.RIGHT.has(column.kind) ? fk.missingLast : "string",
  headerSortStartingDir: fk.RIGHT.has(column.kind) ? "desc" : "asc",
  width: column.width,
  minWidth: Math.max(fk.NARROW.has(column.kind) ? 60 : 80, 30 + 8.2 * column.title.length),
  widthGrow: column.grow || (fk.RIGHT.has(column.kind) ? 0 : 1),
  cssClass: column.kind === "text" && column.grow ? "wide" : "",
});

/** The first rows of a table as plain HTML, for paper. */
fk.printedTable = (place, { columns, rows, note, current }) => {
  const seen = rows.slice(0, fk.PRINTED),
    side = (column) => (fk.RIGHT.has(column.kind) ? "td.right" : "td");
  const cell = (column, row) => fk.el(side(column), {}, fk.cell(column)({ getValue: () => row[column.field] }));
  const body = seen.map((row) =>
    fk.el(
      `tr${current && current(row) ? ".current" : ""}`,
      {},
      columns.map((column) => cell(column, row)),
    ),
  );
  const head = fk.el(
    "tr",
    {},
    columns.map((column) => fk.el(side(column).replace("td", "th"), {}, column.title)),
  );
  place.append(fk.el("table.printed", {}, fk.el("thead", {}, head), fk.el("tbody", {}, body)));
  const told = [note && note.trim(), seen.length < rows.length ? `(the first ${seen.length} of ${rows.length})` : null]
    .filter(Boolean)
    .join(" ");
  if (told) place.append(fk.el("p.note", {}, told));
  return { step: () => null, forget() {}, refresh() {} };
};

/**
 * A table in a place of the page.
 * @param place element to put it in
 * @param options columns [{title, field, kind, note, grow}], rows, open(row), height, search (whether there is a box),
 *   text(row) that is searched, current(row) whether a row is the one shown
 */
fk.table = (place, options) => {
  const { columns, open, search = options.rows.length > 8, text, note } = options;
  let rows = options.rows;
  if (fk.printing) return fk.printedTable(place, options);
  const holder = fk.el("div.table", { tabindex: "0", "aria-label": options.label || "table" });
  const count = fk.el("span.count", { "aria-live": "polite" }, "");
  const box = fk.el("input.search", { type: "search", placeholder: "search", "aria-label": "search this table" });
  const below = fk.el("p.note", { hidden: !note }, note || "");
  place.append(
    ...(search ? [fk.el("div.tools", {}, box, count)] : []),
    holder,
    below,
  );
  const most = options.height || 420;
  const mark = (row) =>
    row.getElement().classList.toggle("current", Boolean(options.current && options.current(row.getData())));
  const table = new Tabulator(holder, {
    data: rows,
    columns: columns.map(fk.tabulatorColumn),
    layout: "fitColumns",
    height: rows.length > 11 ? most : false,
    placeholder: "nothing",
    rowHeight: 30,
    columnDefaults: { resizable: "header" },
    renderVerticalBuffer: 240,
    rowFormatter: mark,
    columnHeaderSortMulti: false,
  });
  const walk = { row: null };
  if (open) {
    holder.classList.add("opens");
    table.on("rowClick", (_, row) => open(row.getData()));
  }
  const said = () => {
    count.textContent = `${table.getDataCount("active")} of ${rows.length}`;
  };
  const searched = (row) => (text ? text(row) : columns.map((column) => row[column.field]).join(" ")).toLowerCase();
  let built = false;
  table.on("tableBuilt", () => {
    built = true;
    said();
  });
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length)
      table.setFilter((row) => {
        const all = searched(row);
        return words.every((word) => all.includes(word));
      });
    else table.clearFilter();
    said();
  });
  /** Move to a row further down or up, in the order that is seen. */
  const step = (by) => {
    if (!built) return null;
    const active = table.getRows("active");
    if (!active.length) return null;
    const from = active.findIndex(
      (row) => row === walk.row || (walk.row === null && options.current && options.current(row.getData())),
    );
    const next = active[Math.max(0, Math.min(active.length - 1, from < 0 ? 0 : from + by))];
    if (walk.row && walk.row !== next) walk.row.getElement().classList.remove("walked");
    walk.row = next;
    next.getElement().classList.add("walked");
    table.scrollToRow(next, "nearest", false).catch(() => {});
    return next;
  };
  holder.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      step(event.key === "ArrowDown" ? 1 : -1);
      event.preventDefault();
    }
    if (event.key === "Enter" && walk.row && open) open(walk.row.getData());
  });
  return {
    table,
    step,
    box,
    forget() {
      walk.row = null;
    },
    /** Other rows of the same columns, in the same order and with the same search, and the note on them. */
    replace(others, note) {
      rows = others;
      below.textContent = note;
      walk.row = null;
      if (built) table.setData(rows).then(said);
      else table.on("tableBuilt", () => table.setData(rows).then(said));
    },
    /** Mark the row that is current now. */
    refresh() {
      if (built) table.getRows("visible").forEach(mark);
    },
  };
};
