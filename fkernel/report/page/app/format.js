"use strict";
/* The page's own names live in `fk`. Here: numbers and texts as a reader sees them. */
const fk = {};

fk.minus = (text) => text.replace(/-/g, "−");

/** A number with three significant digits, or – where there is none. */
fk.number = (x, digits = 3) => {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (Number.isInteger(x) && Math.abs(x) < 1e6) return fk.minus(String(x));
  return fk.minus(String(Number(x.toPrecision(digits))));
};

/** A number with its sign and so many digits after the point. */
fk.signed = (x, digits) => {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const text = Math.abs(x).toFixed(digits);
  return Number(text) === 0 ? "0" : (x < 0 ? "−" : "+") + text;
};

/** Digits after the point that show a number of this size to three significant ones. */
fk.digitsFor = (most) => (most > 0 ? Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(most)))) : 2);

/** A number with so many digits after the point. */
fk.fixed = (x, digits) => (x === null || x === undefined || Number.isNaN(x) ? "–" : fk.minus(x.toFixed(digits)));

fk.share = (x) => {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const percent = 100 * Math.abs(x);
  if (percent > 0 && percent < 1e-3) return "< 0.001 %";
  return `${fk.number(100 * x, percent >= 10 ? 3 : 2)} %`;
};

fk.p = (x) => {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  return x < 0.0005 ? "< 0.001" : x.toFixed(3);
};

/** A number's text with its unit. */
fk.withUnit = (text, unit) => `${text} ${unit.startsWith("10") ? "· " : ""}${unit}`;

/** The last characters of a text; a prompt's question comes last. */
fk.tail = (text, most) => (text.length <= most ? text : "…" + text.slice(1 - most));

/** A text on one line, with what cannot be seen shown. */
fk.oneLine = (text) =>
  text.replace(/\r?\n/g, "⏎").replace(/[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "·");

/** A prompt and its response on one line. */
fk.both = (sequence, most) => {
  const response = fk.oneLine(fk.tail(sequence.response, most)),
    room = Math.max(most >> 1, most - response.length);
  const prompt = fk.oneLine(fk.tail(sequence.prompt, room));
  return `${prompt} → ${fk.tail(response, Math.max(8, most - prompt.length))}`;
};

/** A text for a chart, where < would begin a tag. */
fk.chartText = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
