"use strict";
/* Sections that are drawn when they come near what is seen, each in a turn of its own: what is first is seen first. */

/**
 * Sections of a place of the page.
 * @returns add(section, draw), and redraw(), after which every section is drawn anew: those near what is seen one after
 *   another, the others when they come near, and for paper all of them at once
 */
fk.sections = () => {
  const draws = new Map(),
    near = new Set(),
    waiting = new Set();
  let busy = false;
  const next = () => {
    const section = [...draws.keys()].find((each) => waiting.has(each) && near.has(each) && each.isConnected);
    busy = Boolean(section);
    if (!section) return;
    draw(section);
    setTimeout(next, 0);
  };
  const draw = (section) => {
    waiting.delete(section);
    draws.get(section)();
    section.classList.remove("waiting");
    section.style.minHeight = "";
  };
  const go = () => {
    if (busy) return;
    busy = true;
    fk.afterFrame(next);
  };
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) near[isIntersecting ? "add" : "delete"](target);
      go();
    },
    { rootMargin: "600px" },
  );
  return {
    add(section, fill) {
      draws.set(section, fill);
      observer.observe(section);
    },
    redraw() {
      for (const section of draws.keys()) {
        waiting.add(section);
        section.classList.add("waiting");
      }
      if (fk.printing) [...waiting].forEach(draw);
      else go();
    },
  };
};
