"use strict";
/* Light and dark. Red raises and blue lowers, which most colour-blind people can tell apart; white is zero in both. */
fk.RAISED = "#b2182b";
fk.LOWERED = "#2166ac";
fk.PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#f0e442"];
fk.DIVERGING = [
  [0, "#053061"],
  [0.25, fk.LOWERED],
  [0.5, "#ffffff"],
  [0.75, fk.RAISED],
  [1, "#67001f"],
];

fk.prefersDark = matchMedia("(prefers-color-scheme: dark)");
/** On paper it is light. */
fk.printing = false;
fk.isDark = () => !fk.printing && (fk.address.read().theme || (fk.prefersDark.matches ? "dark" : "light")) === "dark";
fk.applyTheme = () => {
  document.documentElement.dataset.theme = fk.isDark() ? "dark" : "light";
};

/** A colour of the style sheet. */
fk.css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Red or blue that can be seen on the page's ground. */
fk.signColour = (x) => fk.css(x < 0 ? "lowered" : "raised");

/** The colour of a change on the symmetric scale, and of the ink on it. */
fk.colourOf = (x, limit) => {
  const share = Math.min(1, Math.abs(x) / (limit || 1));
  const end = x > 0 ? [178, 24, 43] : [33, 102, 172];
  const [r, g, b] = end.map((part) => Math.round(255 + share * (part - 255)));
  return { background: `rgb(${r}, ${g}, ${b})`, color: share > 0.6 ? "#ffffff" : "#111111" };
};
