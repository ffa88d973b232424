"use strict";
/* Charts of one probe: the terms of its change, and its course over a run. */

/** The terms of a probe's change as [{name, label, value}], what they add up to, and its rounding; nats. */
fk.terms = (group, e) => ({
  terms: group.terms.terms.map((term) => ({ ...term, value: fk.array(term.values).values[e] })),
  total: group.terms.total ? fk.array(group.terms.total).values[e] : null,
  floor: group.terms.floor ? fk.array(group.terms.floor).values[e] : null,
});

/** A waterfall: every term begins where the one before it ended. */
fk.waterfall = (place, group, e) => {
  const { terms, total, floor } = fk.terms(group, e);
  let sum = 0;
  const steps = terms.map((term) => {
    const from = sum;
    sum += term.value;
    return { label: term.label, value: term.value, from };
  });
  steps.push({
    label: total === null ? "predicted" : "measured",
    value: total === null ? sum : total,
    from: 0,
    whole: true,
  });
  const labels = steps.map((step) => fk.chartText(step.label));
  const ends = steps.flatMap((step) => [step.from, step.from + step.value]).map(fk.scaled);
  const room = 0.16 * (Math.max(0, ...ends) - Math.min(0, ...ends) || 1);
  const bars = {
    type: "bar",
    x: labels,
    y: steps.map((step) => fk.scaled(step.value)),
    base: steps.map((step) => fk.scaled(step.from)),
    marker: { color: steps.map((step) => (step.whole ? fk.css("total") : fk.signColour(step.value))) },
    text: steps.map((step) => fk.change(step.value)),
    textposition: "outside",
    cliponaxis: false,
    textfont: { color: fk.css("ink") },
    hovertext: steps.map((step) => `${fk.chartText(step.label)}: ${fk.minus(String(step.value))} nats`),
    hoverinfo: "text",
  };
  const rounding = floor && {
    type: "scatter",
    mode: "markers",
    x: labels.slice(-1),
    y: [fk.scaled(total)],
    marker: { opacity: 0 },
    hoverinfo: "skip",
    error_y: { type: "data", array: [fk.scaled(floor)], color: fk.css("ink"), thickness: 1.2, width: 5 },
  };
  const joins = steps.slice(0, -1).map((step, i) => ({
    type: "line",
    x0: i + 0.4,
    x1: i + 0.6,
    y0: fk.scaled(step.from + step.value),
    y1: fk.scaled(step.from + step.value),
    line: { color: fk.css("faint"), width: 1 },
  }));
  const layout = fk.layout({
    bargap: 0.2,
    shapes: joins,
    margin: { l: 60, r: 12, t: 12, b: 40 },
    yaxis: {
      title: { text: fk.unit },
      range: [Math.min(0, ...ends) - room, Math.max(0, ...ends) + room],
      zeroline: true,
      automargin: false,
    },
    xaxis: { type: "category", fixedrange: true, showgrid: false, automargin: false },
  });
  const options = { height: 270, label: "terms of the change", before: place.querySelector(".chart") };
  return fk.chart(place, rounding ? [bars, rounding] : [bars], layout, options);
};

/** The mean reward of every step's sequences, null where there is none. */
fk.meanRewards = () => {
  const { step, reward } = fk.update.numbers,
    sums = new Map();
  if (!reward) return null;
  reward.forEach((value, u) => {
    if (value !== null) {
      const own = sums.get(step[u]) || [0, 0];
      sums.set(step[u], [own[0] + value, own[1] + 1]);
    }
  });
  return fk.data.steps.step.map((number) => {
    const own = sums.get(number);
    return own ? own[0] / own[1] : null;
  });
};

fk.running = (values) => {
  let sum = 0;
  return [0, ...Array.from(values, (x) => fk.scaled((sum += x)))];
};

/** How a probe changed over the run, and below it what each step did, the gradient's norm and the mean reward. */
fk.timeline = (place, group, e, onStep) => {
  const steps = fk.data.steps,
    ends = [steps.step[0] - 1, ...steps.step];
  const [whole, own, momentum] = ["by_step", "own", "momentum"].map((name) => fk.array(group.stepwise[name]).row(e));
  const rest = whole.map((x, t) => x - own[t] - momentum[t]);
  const line = (name, values, style) => ({
    type: "scatter",
    mode: "lines",
    name,
    x: ends,
    y: fk.running(values),
    hovertemplate: `%{y:.4g} after step %{x}<extra>${name}</extra>`,
    ...style,
  });
  const traces = [
    line("by the steps' own gradients", own, { line: { color: fk.PALETTE[0], width: 1.6 } }),
    line("by momentum", momentum, { line: { color: fk.PALETTE[1], width: 1.6, dash: "dash" } }),
    line("by decay and the rest", rest, { line: { color: fk.PALETTE[2], width: 1.4, dash: "dot" } }),
    line("all of it", whole, { line: { color: fk.css("ink"), width: 2.4 } }),
    {
      type: "scatter",
      mode: "markers",
      name: "measured",
      x: [ends[ends.length - 1]],
      y: [fk.scaled(fk.array(group.measured).values[e])],
      marker: { symbol: "diamond", size: 10, color: fk.css("ink") },
      hovertemplate: "%{y:.4g} measured<extra></extra>",
    },
    {
      type: "bar",
      x: steps.step,
      y: Array.from(whole, fk.scaled),
      yaxis: "y2",
      showlegend: false,
      marker: { color: Array.from(whole, fk.signColour) },
      hovertemplate: "step %{x}: %{y:.4g}<extra></extra>",
    },
  ];
  const beside = [
    ["‖∇L‖", steps.grad_norm],
    ["mean reward", fk.meanRewards()],
  ].filter(([, values]) => values && values.some((x) => x !== null));
  const axes = {},
    gap = 0.36,
    rows = [2.6, 1, ...beside.map(() => 0.7)],
    sum = rows.reduce((a, b) => a + b, gap * (rows.length - 1)),
    names = [];
  let top = 1;
  rows.forEach((size, i) => {
    const bottom = Math.max(0, top - size / sum),
      text = [`change so far (${fk.unit})`, `in the step (${fk.unit})`, ...beside.map(([name]) => name)][i];
    axes[i ? `yaxis${i + 1}` : "yaxis"] = {
      domain: [bottom, top],
      gridcolor: fk.css("line"),
      zerolinecolor: fk.css("faint"),
      automargin: false,
      nticks: i ? 4 : 7,
      tickfont: { size: 12 },
    };
    names.push({
      text,
      xref: "paper",
      yref: "paper",
      x: 0,
      y: top,
      xanchor: "left",
      yanchor: "bottom",
      showarrow: false,
      font: { size: 12, color: fk.css("soft") },
    });
    top = bottom - gap / sum;
  });
  beside.forEach(([name, values], i) =>
    traces.push({
      type: "scatter",
      mode: "lines",
      x: steps.step,
      y: values,
      yaxis: `y${i + 3}`,
      showlegend: false,
      line: { color: fk.css("soft"), width: 1.3 },
      hovertemplate: `step %{x}: %{y:.4g}<extra>${name}</extra>`,
    }),
  );
  const layout = fk.layout({
    ...axes,
    annotations: names,
    showlegend: true,
    legend: { orientation: "h", y: 1.07, yanchor: "bottom", x: 0, font: { size: 12 } },
    xaxis: {
      title: { text: "step" },
      anchor: rows.length > 1 ? `y${rows.length}` : "y",
      automargin: false,
      labelalias: { "−1": "start", "-1": "start" },
    },
  });
  for (const [key, axis] of Object.entries(axes)) layout[key] = { ...layout[key], ...axis };
  return fk.chart(place, traces, layout, {
    height: 360 + 86 * beside.length,
    click: (point) => onStep(Math.max(steps.step[0], point.x)),
    label: "course over the run",
    before: place.querySelector(".chart"),
  });
};

/** Running sums by reward function, or by part of the loss, counted at the step that trained on a sequence. */
fk.splitTimeline = (place, split, e) => {
  const { values, shape } = fk.array(split.values),
    [, T, R] = shape;
  const ends = [fk.data.steps.step[0] - 1, ...fk.data.steps.step];
  const traces = split.names.map((name, r) => {
    const own = Array.from({ length: T }, (_, t) => values[(e * T + t) * R + r]);
    const sums = fk.running(own);
    return {
      type: "scatter",
      mode: "lines",
      name: fk.chartText(`${name} (${fk.signed(sums[T], fk.data.unit.digits)})`),
      x: ends,
      y: sums,
      line: { color: fk.PALETTE[r % 8], dash: ["solid", "dash", "dot", "dashdot"][r % 4], width: 2 },
    };
  });
  fk.chart(
    place,
    traces,
    fk.layout({
      showlegend: true,
      hovermode: "x unified",
      xaxis: { title: { text: "step that trained on it" }, automargin: false },
      yaxis: { title: { text: fk.unit }, automargin: false },
    }),
    { height: 280, label: "by part", before: place.querySelector(".chart") },
  );
};
