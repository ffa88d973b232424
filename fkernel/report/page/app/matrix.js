"use strict";
/* Matrices of a request, their order, and what is seen of them through a window.
   Where there are more cells than can be seen, a cell of the picture stands for several, and shows the largest of them. */
fk.MOST_COLUMNS = 500;
fk.MOST_ROWS = 200;

/** The symmetric end of the colour scale: all but the largest 0.5 % of values lie within. */
fk.limits = new WeakMap();
fk.limitOf = (values) => {
  if (!fk.limits.has(values)) fk.limits.set(values, fk.quantile(values));
  return fk.limits.get(values);
};

fk.quantile = (values) => {
  const every = Math.max(1, Math.floor(values.length / 100000)),
    sizes = [];
  for (let i = 0; i < values.length; i += every) if (values[i] !== 0) sizes.push(Math.abs(values[i]));
  const sample = Float32Array.from(sizes).sort();
  return sample.length ? sample[Math.min(sample.length - 1, Math.floor(0.995 * sample.length))] : 1;
};

/** Runs of equal values in an order: [{from, to, value}]. */
fk.runsOf = (order, value) => {
  const runs = [];
  order.forEach((i, place) => {
    const last = runs[runs.length - 1];
    if (last && last.value === value(i)) last.to = place;
    else runs.push({ from: place, to: place, value: value(i) });
  });
  return runs;
};

/**
 * What is seen of a matrix through a window, in at most so many cells.
 * @returns z [rows][columns], and for each cell the place in the matrix of the value that it shows
 */
fk.windowed = (value, rows, columns, [x0, x1], [y0, y1]) => {
  const bx = Math.ceil((x1 - x0) / fk.MOST_COLUMNS) || 1,
    by = Math.ceil((y1 - y0) / fk.MOST_ROWS) || 1;
  const nx = Math.ceil((x1 - x0) / bx),
    ny = Math.ceil((y1 - y0) / by),
    z = [],
    where = [];
  for (let r = 0; r < ny; r++) {
    const own = new Float32Array(nx),
      at = new Int32Array(2 * nx);
    for (let c = 0; c < nx; c++) {
      let most = -1;
      for (let i = y0 + r * by; i < Math.min(y1, y0 + (r + 1) * by); i++) {
        for (let k = x0 + c * bx; k < Math.min(x1, x0 + (c + 1) * bx); k++) {
          const x = value(rows[i], columns[k]),
            size = Math.abs(x);
          if (size > most) {
            most = size;
            own[c] = x;
            at[2 * c] = i;
            at[2 * c + 1] = k;
          }
        }
      }
    }
    z.push(own);
    where.push(at);
  }
  return { z, where, bx, by };
};

/** The matrices that can be shown: [key, title]. */
fk.matrixKinds = (group) => {
  const kinds = [];
  if (group.stepwise) kinds.push(["steps", "probes × steps"]);
  if (group.contributions) kinds.push(["sequences", "probes × sequences"]);
  if (group.kernel) kinds.push(["cosine", "cosines of the kernel"]);
  return kinds;
};

/** A matrix: value(e, k), number of columns, unit, whether columns are steps. */
fk.matrixOf = (group, kind) => {
  if (kind === "steps") {
    const { values, shape } = fk.array(group.stepwise.by_step),
      T = shape[1];
    return {
      value: (e, t) => fk.data.unit.scale * values[e * T + t],
      width: T,
      unit: fk.unit,
      limit: fk.scaled(fk.limitOf(values)),
      steps: true,
    };
  }
  if (kind === "cosine") {
    const { values, shape } = fk.array(group.kernel),
      [rows, columns] = group.diagonals.map((each) => fk.array(each).values),
      N = shape[1];
    return {
      value: (e, u) => values[e * N + u] / (Math.sqrt(rows[e] * columns[u]) || 1),
      width: N,
      unit: "cosine",
      limit: 1,
    };
  }
  const { values, shape } = fk.array(group.contributions),
    N = shape[1],
    scale = fk.data.unit.scale;
  return {
    value: (e, u) => scale * values[e * N + u],
    width: N,
    unit: fk.unit,
    limit: fk.scaled(fk.limitOf(values)),
  };
};
