"use strict";
/* Analyses: what was computed, what was left out and why, and how to ask for what was not asked for. */

/** Open a probe or a sequence by its id. */
fk.open = (kind, id) => {
  if (kind === "sequence") fk.address.write({ view: "sequences", sequence: id });
  else fk.address.write({ view: "probes", probe: id, pair: null });
};

fk.panel = (panel, group) => {
  const body = fk.el("div.body"),
    asked = panel.blocks || panel.left_out;
  const state = panel.blocks ? null : fk.el("span.tag", {}, panel.left_out ? "left out" : "not asked for");
  const section = fk.el(
    `section.panel${asked ? "" : ".unasked"}`,
    { id: `panel-${panel.key}` },
    fk.el("h3", {}, panel.title, " ", state),
    fk.el("p.question", {}, panel.question),
    body,
  );
  if (panel.left_out) body.append(fk.el("p", {}, `It was left out: ${panel.left_out}.`));
  else if (!panel.blocks) body.append(fk.el("p", {}, panel.how), fk.el("pre.code", {}, panel.ask));
  return { section, fill: () => (panel.blocks || []).forEach((block) => fk.block(body, block, fk.open, group)) };
};

fk.analyses = {
  mount(place, state) {
    const group = fk.group(state);
    const whole = fk.data.panels.map((panel) => ({ ...panel, title: `${panel.title} (of the update batch)` }));
    const panels = [...group.panels, ...whole].sort((a, b) => Boolean(b.blocks) - Boolean(a.blocks));
    const made = panels.map((panel) => fk.panel(panel, group));
    const contents = fk.el(
      "nav.contents",
      { "aria-label": "analyses" },
      panels.map((panel, i) =>
        fk.el(
          `button.link${panel.blocks ? "" : ".soft"}`,
          { type: "button", click: () => made[i].section.scrollIntoView() },
          panel.title,
        ),
      ),
    );
    place.append(
      fk.el(
        "div.contentsplit",
        {},
        contents,
        fk.el(
          "div.panels",
          {},
          made.map((each) => each.section),
        ),
      ),
    );
    const sections = fk.sections();
    made.forEach(({ section, fill }) => sections.add(section, fill));
    sections.redraw();
    if (state.panel) document.getElementById(`panel-${state.panel}`)?.scrollIntoView();
  },
  update() {},
};

fk.about = {
  mount(place) {
    const panels = fk.data.provenance.map((block) => {
      const section = fk.el("section.panel");
      fk.block(section, block, fk.open);
      return section;
    });
    place.append(
      fk.el(
        "div.panels.prose",
        {},
        fk.el("section.panel", {}, fk.el("h4", {}, "How to read it"), fk.about.reading()),
        panels,
      ),
    );
  },
  update() {},
  reading() {
    const told = fk.isRun
      ? "A contribution is what a sequence did to a probe to the end of the run: in the step that trained on it and, by the optimizer's momentum, in all later ones. Contributions, and what was in the momentum before the run, decay and the rest, add up to the change that was measured."
      : "A contribution is what a sequence of the update batch did to a probe's log-probability in this one step, given the optimizer's preconditioner as it was. Contributions, and what momentum and weight decay did, add up to the prediction.";
    return fk.el(
      "div",
      {},
      fk.el("p", {}, told),
      fk.el(
        "p",
        {},
        "Positive (red) made the probe more likely, negative (blue) less, whatever the sign of the advantage. It says what happened in the step or run that was taken; what another would have done is a counterfactual or a replay.",
      ),
    );
  },
};
