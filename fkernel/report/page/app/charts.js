"use strict";
/* Charts, by Plotly: its layout in the page's colours, and the plain blocks of analyses. */

fk.layout = (more = {}) => {
  const ink = fk.css("ink"),
    line = fk.css("line");
  const axis = {
    gridcolor: line,
    zerolinecolor: fk.css("faint"),
    linecolor: line,
    automargin: true,
    ticklabeloverflow: "allow", // else every label is measured, each time
    tickfont: { size: 12 },
  };
  const titled = (given = {}) =>
    given.title
      ? { ...given, title: { font: { size: 13, color: fk.css("soft") }, standoff: 8, ...given.title } }
      : given;
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, family: "system-ui, sans-serif", size: 13 },
    margin: { l: 60, r: 20, t: 16, b: 46 },
    showlegend: false,
    hovermode: "closest",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    colorway: fk.PALETTE,
    hoverlabel: { bgcolor: fk.css("ground"), bordercolor: line, font: { color: ink } },
    ...rest,
    xaxis: { ...axis, ...titled(xaxis) },
    yaxis: { ...axis, ...titled(yaxis) },
  };
};

fk.drawn = new Set();
fk.widths = new WeakMap();
/** Charts are as wide as their place. */
fk.resizing = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (!target.isConnected || !target.clientWidth || target.clientWidth === fk.widths.get(target)) continue;
    fk.widths.set(target, target.clientWidth);
    Plotly.relayout(target, { width: target.clientWidth });
  }
});
/**
 * Draw a chart into a new element of a place, or anew into the one that was drawn `before`; `click` takes the point that
 * was clicked, and stays what it was when the chart is drawn anew.
 */
fk.chart = (place, traces, layout, { height = 320, click, label, before, config = {} } = {}) => {
  if (fk.drawn.has(before)) {
    Plotly.react(before, traces, { ...layout, height, width: before.clientWidth });
    return before;
  }
  const element = fk.el("div.chart", { role: "img", "aria-label": label || "chart", style: `height: ${height}px` });
  place.append(element);
  const settings = {
    displaylogo: false,
    displayModeBar: "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
    ...config,
  };
  Plotly.newPlot(element, traces, { ...layout, height }, settings);
  if (click) element.on("plotly_click", (event) => click(event.points[0]));
  fk.drawn.add(element);
  fk.widths.set(element, element.clientWidth);
  fk.resizing.observe(element);
  return element;
};

/** A colour bar with its unit above. */
fk.colourBar = (unit) => ({
  thickness: 14,
  outlinewidth: 0,
  title: { text: fk.chartText(unit || ""), side: "top", font: { size: 12 } },
});

/** Forget charts that have left the page. */
fk.tidyCharts = () => {
  for (const element of fk.drawn)
    if (!element.isConnected) {
      fk.resizing.unobserve(element);
      Plotly.purge(element);
      fk.drawn.delete(element);
    }
};

/** Labels of an axis: of a probe its id and text. Labels that were equal would share a place. */
fk.labels = (names, opens, group) => {
  const table = opens === "probe" && group ? group.rows : opens === "sequence" ? fk.update : null;
  const texts = names.map((name) => {
    const place = table ? fk.place(table, name) : -1;
    return place < 0
      ? fk.tail(fk.oneLine(name), 34)
      : `${fk.tail(name, 14)}  ${fk.both(fk.sequence(table, place), 24)}`;
  });
  return texts.map(
    (text, i) => fk.chartText(text) + "\u200b".repeat(texts.slice(0, i).filter((other) => other === text).length),
  );
};

fk.blockCharts = {
  bars(block, group) {
    const labels = fk.labels(block.labels, block.opens, group);
    const traces = block.series.map((series, i) => ({
      type: "bar",
      orientation: "h",
      name: fk.chartText(series.name),
      x: series.values,
      y: labels,
      customdata: block.labels,
      marker: { color: block.signs ? series.values.map(fk.signColour) : fk.PALETTE[i % fk.PALETTE.length] },
      hovertemplate: "%{y}: %{x:.4g}<extra>%{fullData.name}</extra>",
    }));
    const height = 90 + block.labels.length * (10 + 14 * block.series.length);
    return [
      traces,
      {
        xaxis: { title: { text: fk.chartText(block.axis) } },
        yaxis: { type: "category" },
        showlegend: block.series.length > 1,
        barmode: "group",
        bargap: 0.25,
      },
      height,
    ];
  },
  lines(block) {
    const traces = block.series.map((series, i) => ({
      type: "scatter",
      mode: "lines+markers",
      name: fk.chartText(series.name),
      x: block.x,
      y: series.values,
      line: { color: fk.PALETTE[i], dash: ["solid", "dash", "dot"][i % 3] },
      marker: { size: 5 },
    }));
    const type = block.logarithmic ? { type: "log", exponentformat: "power" } : {};
    return [
      traces,
      {
        xaxis: { ...type, title: { text: block.axes[0] } },
        yaxis: { ...type, title: { text: block.axes[1] } },
        showlegend: true,
        hovermode: "x unified",
      },
      360,
    ];
  },
  points(block) {
    const names = block.groups
      ? [...new Set(block.groups)].sort((a, b) => a.localeCompare(b, undefined, { numeric: true }))
      : [null];
    const shapes = ["circle", "diamond", "square", "triangle-up", "cross", "x", "star", "pentagon"];
    const traces = names.map((name, i) => {
      const own = block.ids.map((_, k) => k).filter((k) => name === null || block.groups[k] === name),
        of = (values) => own.map((k) => values[k]);
      return {
        type: "scatter",
        mode: "markers",
        name: fk.chartText(name || ""),
        x: of(block.x),
        y: of(block.y),
        customdata: of(block.ids),
        text: of(block.ids).map(fk.chartText),
        marker: {
          size: 8,
          opacity: 0.8,
          color: fk.PALETTE[i % fk.PALETTE.length],
          symbol: shapes[i % shapes.length],
          line: { width: 0.5, color: fk.css("ground") },
        },
        hovertemplate: `%{text}<br>%{x:.4g}, %{y:.4g}<extra>%{fullData.name}</extra>`,
      };
    });
    if (block.diagonal) {
      const all = [...block.x, ...block.y].filter((x) => x !== null),
        ends = [Math.min(...all), Math.max(...all)];
      traces.unshift({
        type: "scatter",
        mode: "lines",
        x: ends,
        y: ends,
        line: { color: fk.css("faint"), width: 1, dash: "dot" },
        hoverinfo: "skip",
        showlegend: false,
      });
    }
    return [
      traces,
      {
        xaxis: { title: { text: fk.chartText(block.axes[0]) } },
        yaxis: { title: { text: fk.chartText(block.axes[1]) } },
        showlegend: Boolean(block.groups),
      },
      400,
    ];
  },
  intervals(block, group) {
    const ends = {
      type: "data",
      symmetric: false,
      array: block.high.map((x, k) => x - block.values[k]),
      arrayminus: block.low.map((x, k) => block.values[k] - x),
      color: fk.css("faint"),
      thickness: 1.5,
      width: 4,
    };
    const ids = fk.labels(block.ids, block.opens, group);
    const trace = {
      type: "scatter",
      mode: "markers",
      x: block.values,
      y: ids,
      customdata: block.ids,
      error_x: ends,
      marker: { size: 8, color: block.values.map(fk.signColour) },
      hovertemplate: "%{y}: %{x:.4g}<extra></extra>",
    };
    return [
      [trace],
      { xaxis: { title: { text: fk.chartText(block.axis) } }, yaxis: { type: "category" } },
      80 + 22 * ids.length,
    ];
  },
  heat(block) {
    const flat = block.values.flat().filter((x) => x !== null),
      limit = block.limit || Math.max(...flat.map(Math.abs), 1e-12);
    const texts = block.values.map((row) => row.map((x) => fk.signed(x, fk.digitsFor(limit))));
    const few = block.columns.length <= 24;
    const trace = {
      type: "heatmap",
      z: block.values,
      x: block.columns.map((_, i) => i),
      y: block.rows.map((_, i) => i),
      zmin: -limit,
      zmax: limit,
      colorscale: fk.DIVERGING,
      xgap: 1,
      ygap: 1,
      ...(few ? { text: texts, texttemplate: "%{text}" } : {}),
      hovertemplate: "%{z:.4g}<extra></extra>",
      colorbar: fk.colourBar(block.unit),
    };
    const ticks = (names) => ({
      tickmode: "array",
      tickvals: names.map((_, i) => i),
      ticktext: names.map((name) => fk.chartText(fk.tail(fk.oneLine(name), 22))),
      showgrid: false,
      zeroline: false,
    });
    return [
      [trace],
      { xaxis: ticks(block.columns), yaxis: { ...ticks(block.rows), autorange: "reversed" } },
      110 + Math.min(520, 38 * block.rows.length),
    ];
  },
};

/** A block of an analysis: a text, facts, a table or a chart. `open` takes (kind, id). */
fk.block = (place, block, open, group) => {
  if (block.title) place.append(fk.el("h4", {}, block.title));
  if (block.kind === "text") place.append(fk.el("p", {}, block.text));
  else if (block.kind === "facts") place.append(fk.facts(block.rows));
  else if (block.kind === "json") place.append(fk.el("pre.code", {}, JSON.stringify(block.value, null, 1)));
  else if (block.kind === "tokens") fk.tokenRows(place, group, open);
  else if (block.kind === "table") fk.blockTable(place, block, open, group);
  else {
    const [traces, layout, height] = fk.blockCharts[block.kind](block, group);
    const click = block.opens && ((point) => point.customdata && open(block.opens, point.customdata));
    fk.chart(place, traces, fk.layout(layout), { height, click, label: block.title });
    if (block.note) place.append(fk.el("p.note", {}, block.note));
  }
};

fk.blockTable = (place, block, open, group) => {
  const opening = block.columns.findIndex((column) => column.kind === "probe" || column.kind === "sequence");
  const columns = block.columns.map((column, i) => {
    const sizes = block.rows.map((row) => Math.abs(row[i]) || 0),
      most = sizes.reduce((a, b) => Math.max(a, b), 0);
    return {
      ...column,
      group,
      field: `c${i}`,
      digits: Math.max(fk.digitsFor(most), 2),
      grow: column.kind === "text" ? 2 : undefined,
    };
  });
  const rows = block.rows.map((row) => Object.fromEntries(row.map((value, i) => [`c${i}`, value])));
  const click =
    opening < 0 ? undefined : (row) => row[`c${opening}`] && open(block.columns[opening].kind, row[`c${opening}`]);
  fk.table(place, { columns, rows, open: click, note: block.note, label: block.title, height: 360 });
};
