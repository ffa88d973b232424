"use strict";
/* Axes of the map: which rows and columns are named, where groups end, and the cell that the keys have reached. */

/** The layout of what is seen. */
fk.mapLayout = (map) => {
  const { x, y } = map,
    table = map.group.rows,
    shownRows = y[1] - y[0];
  const every = Math.ceil(shownRows / Math.max(8, Math.floor((map.height || 560) / 20))),
    places = [];
  for (let i = y[0]; i < y[1]; i += every) places.push(i);
  const rowText = (i) => fk.chartText(fk.tail(fk.both(fk.sequence(table, map.rows[i]), 26), 28));
  const columns = fk.columnTicks(map),
    rowTexts = places.map(rowText),
    longest = (texts) => Math.max(0, ...(texts || []).map((text) => text.length));
  const margin = {
    l: 16 + 7.4 * longest(rowTexts),
    r: 10,
    t: 10,
    b: 46 + (columns.ticks.tickangle ? 5 * longest(columns.ticks.ticktext) : 16),
  };
  const rowRuns = fk.runsOf(map.rows.slice(y[0], y[1]), (e) => table.prompt_id[e]);
  const lines = [];
  const edge = (axis, at) =>
    lines.push({
      type: "line",
      [`${axis}0`]: at,
      [`${axis}1`]: at,
      [axis === "x" ? "yref" : "xref"]: "paper",
      [axis === "x" ? "y0" : "x0"]: 0,
      [axis === "x" ? "y1" : "x1"]: 1,
      line: { color: "#777777", width: 0.6 },
    });
  if (columns.edges.length < 120) columns.edges.forEach((at) => edge("x", at));
  if (rowRuns.length < 60 && rowRuns.length < 0.6 * shownRows)
    rowRuns.slice(1).forEach((run) => edge("y", y[0] + run.from - 0.5));
  if (map.cursor) {
    const [i, k] = map.cursor;
    lines.push({
      type: "rect",
      x0: k - 0.5,
      x1: k + 0.5,
      y0: i - 0.5,
      y1: i + 0.5,
      line: { color: "#e69f00", width: 3 },
    });
  }
  const size = map.height ? { height: map.height } : {};
  return fk.layout({
    ...size,
    shapes: lines,
    dragmode: "zoom",
    margin,
    xaxis: {
      range: [x[0] - 0.5, x[1] - 0.5],
      title: { text: columns.title },
      showgrid: false,
      zeroline: false,
      automargin: false,
      ...columns.ticks,
    },
    yaxis: {
      range: [y[1] - 0.5, y[0] - 0.5],
      tickmode: "array",
      tickvals: places,
      ticktext: rowTexts,
      showgrid: false,
      zeroline: false,
      automargin: false,
      ticks: "",
    },
  });
};

/** Ticks, edges between groups and the title of the columns. */
fk.columnTicks = (map) => {
  const { x } = map,
    seen = map.columns.slice(x[0], x[1]),
    count = x[1] - x[0];
  const array = (vals, texts) => ({
    tickmode: "array",
    tickvals: vals,
    ticktext: texts,
    tickangle: vals.length > 12 ? -40 : 0,
    ticks: "",
  });
  if (map.matrix.steps) {
    const every = Math.ceil(count / 24),
      vals = [];
    for (let k = x[0]; k < x[1]; k += every) vals.push(k);
    return {
      edges: [],
      title: "step",
      ticks: {
        ...array(
          vals,
          vals.map((k) => String(fk.data.steps.step[k])),
        ),
        tickangle: 0,
      },
    };
  }
  if (count <= 36) {
    const vals = seen.map((_, i) => x[0] + i),
      runs = map.grouped ? fk.runsOf(seen, (u) => fk.update.prompt_id[u]) : [];
    return {
      edges: runs.slice(1).map((run) => x[0] + run.from - 0.5),
      title: "",
      ticks: array(
        vals,
        seen.map((u) => fk.chartText(fk.both(fk.sequence(fk.update, u), 20))),
      ),
    };
  }
  const by = map.grouped
    ? (u) => fk.update.prompt_id[u]
    : fk.isRun && !map.grouped
      ? (u) => fk.update.numbers.step[u]
      : () => 0;
  const runs = fk.runsOf(seen, by),
    every = Math.ceil(runs.length / 30);
  const named = runs.filter((_, i) => i % every === 0),
    vals = named.map((run) => x[0] + (run.from + run.to) / 2);
  if (map.grouped)
    return {
      edges: runs.slice(1).map((run) => x[0] + run.from - 0.5),
      title: `${count} sequences, by prompt`,
      ticks: array(
        vals,
        named.map((run) => fk.chartText(fk.tail(fk.oneLine(fk.update.prompts[fk.update.prompt[seen[run.from]]]), 14))),
      ),
    };
  if (runs.length > 1 && runs.length < count / 2)
    return {
      edges: [],
      title: `${count} sequences, by step`,
      ticks: {
        ...array(
          vals,
          named.map((run) => String(run.value)),
        ),
        tickangle: 0,
      },
    };
  return { edges: [], title: `${count} sequences`, ticks: { showticklabels: false, ticks: "" } };
};
