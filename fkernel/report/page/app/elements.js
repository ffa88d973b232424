"use strict";
/* Elements, whose texts are always texts and never markup; and the tip that follows the pointer. */

/** An element: el("p.note", {title: "…"}, "text", child, …). A function as an attribute listens to that event. */
fk.el = (name, attributes = {}, ...children) => {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
};

/** Rows of names and values; those without a value are left out. */
fk.facts = (rows) => {
  const known = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return fk.el(
    "dl.facts",
    {},
    known.map(([name, value]) => [
      fk.el("dt", {}, name),
      fk.el("dd", {}, value instanceof Node ? value : String(value)),
    ]),
  );
};

/** A choice among a few, as buttons that say which is pressed. */
fk.choice = (label, options, chosen, onChoose) => {
  const buttons = options.map(([value, text]) =>
    fk.el(
      "button",
      { type: "button", "aria-pressed": String(value === chosen), "data-value": value, click: () => onChoose(value) },
      text,
    ),
  );
  return fk.el("span.choice", { role: "group", "aria-label": label }, buttons);
};

/** A labelled list to choose from. */
fk.select = (label, options, chosen, onChoose) => {
  const entries = options.map(([value, text]) => {
    const option = fk.el("option", { value }, text);
    option.selected = value === chosen;
    return option;
  });
  return fk.el(
    "label.select",
    {},
    label,
    fk.el("select", { change: (event) => onChoose(event.target.value) }, entries),
  );
};

/** Do a task after the frame in which all the rest is seen; for paper at once. */
fk.afterFrame = (task) => {
  if (fk.printing) task();
  else requestAnimationFrame(() => setTimeout(task, 0));
};

fk.tip = {
  element: fk.el("div.tip", { role: "tooltip", hidden: "" }),
  /** Show lines beside the pointer. */
  show(lines, x, y) {
    this.element.replaceChildren(...lines.map((line) => fk.el("div", {}, line)));
    this.element.hidden = false;
    const { width, height } = this.element.getBoundingClientRect();
    this.element.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
    this.element.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
  },
  hide() {
    this.element.hidden = true;
  },
};
document.body.append(fk.tip.element);
