"use strict";
/* Which view is seen, as the address says; the bar above; the keyboard. */
fk.pages = [
  ["overview", "Overview", fk.overview],
  ["probes", "Probes", fk.probes],
  ["map", "Map", fk.map],
  ["sequences", "Sequences", fk.sequences],
  ["analyses", "Analyses", fk.analyses],
  ["about", "About", fk.about],
];
fk.KEYS = [
  ["1 … 6", "the pages"],
  ["j, k", "next, previous probe"],
  ["↑ ↓ Enter", "walk through a table or the map, open"],
  ["/", "search"],
  ["d", "dark or light"],
  ["Esc", "close"],
  ["?", "these keys"],
];

fk.main = {
  view: document.getElementById("view"),
  bar: document.getElementById("top"),
  shown: "",
  page(state) {
    return fk.pages.find(([key]) => key === state.view) || fk.pages[0];
  },
  render() {
    const state = fk.address.read(),
      [key, , page] = this.page(state),
      group = fk.group(state);
    fk.applyTheme();
    const shown = [key, group && group.name, fk.isDark(), fk.printing].join("|");
    if (shown !== this.shown) {
      this.shown = shown;
      this.header(key, group);
      fk.tip.hide();
      const place = fk.el(`div.page.${key}`);
      const same = this.view.firstElementChild?.classList.contains(key);
      this.view.replaceChildren(place);
      if (!same) scrollTo(0, 0);
      fk.tidyCharts();
      page.mount(place, state);
    } else page.update(state);
    if (state.pair && state.probe) fk.pair.show(group, state.probe, state.pair);
    else fk.pair.close();
    fk.tidyCharts();
  },
  header(chosen, group) {
    const tabs = fk.pages.map(([key, title], i) =>
      fk.el(
        "button.tab",
        {
          type: "button",
          "aria-current": key === chosen ? "page" : null,
          title: `${title} (${i + 1})`,
          click: () => this.go(key),
        },
        title,
      ),
    );
    const requests =
      fk.data.groups.length > 1
        ? fk.select(
            "request ",
            fk.data.groups.map((each) => [each.name, `${each.name} (${each.rows.ids.length})`]),
            group.name,
            (name) => this.choose(name),
          )
        : null;
    this.bar.replaceChildren(
      ...fk.el(
        "div",
        {},
        fk.el("strong.title", {}, fk.data.title),
        fk.el("small.brand", {}, "fkernel"),
        fk.el("nav", { "aria-label": "pages" }, tabs),
        fk.el("span.space"),
        requests,
        fk.el(
          "button",
          { type: "button", title: "dark or light (d)", "aria-label": "dark or light", click: () => this.theme() },
          "◐",
        ),
        fk.el(
          "button",
          { type: "button", title: "keys (?)", "aria-label": "keys", click: () => fk.help.showModal() },
          "?",
        ),
      ).childNodes,
    );
  },
  go(key) {
    fk.address.write({ view: key, pair: null, step: null });
  },
  choose(request) {
    fk.address.write({ request, probe: null, pair: null, step: null, x: null, y: null });
  },
  theme() {
    fk.address.write({ theme: fk.isDark() ? "light" : "dark" }, true);
  },
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName))
      return;
    const number = Number(event.key),
      state = fk.address.read();
    if (fk.pair.dialog.open || fk.help.open) return;
    if (number >= 1 && number <= fk.pages.length) this.go(fk.pages[number - 1][0]);
    else if ((event.key === "j" || event.key === "k") && this.page(state)[0] === "probes")
      fk.probes.step(event.key === "j" ? 1 : -1);
    else if (event.key === "d") this.theme();
    else if (event.key === "?") fk.help.showModal();
    else if (event.key === "/") {
      const box = document.querySelector("#view input.search");
      if (box) box.focus();
    } else return;
    event.preventDefault();
  },
};

fk.help = fk.el(
  "dialog.help",
  {},
  fk.el("h2", {}, "Keys"),
  fk.facts(fk.KEYS),
  fk.el("p.note", {}, "The address in the browser's bar holds what you see: send it together with the file."),
  fk.el("form", { method: "dialog" }, fk.el("button", {}, "close")),
);
document.body.append(fk.help);
addEventListener("hashchange", () => fk.main.render());
addEventListener("keydown", (event) => fk.main.key(event));
/** For paper everything is drawn anew: as wide as a sheet, light, and with the first rows of tables. */
fk.print = (printing) => {
  fk.printing = printing;
  document.documentElement.classList.toggle("printing", printing);
  fk.main.render();
};
addEventListener("beforeprint", () => fk.print(true));
addEventListener("afterprint", () => fk.print(false));
fk.prefersDark.addEventListener("change", () => fk.main.render());
fk.main.render();
document.documentElement.dataset.ready = "yes";
