"use strict";
/* What is seen is in the address's fragment, so that it can be sent: #view=probes&request=held_out&probe=E-000-00 */
fk.address = {
  read() {
    return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  },
  /** Change some of it; null removes. `replace` adds no entry to the browser's history. */
  write(changes, replace = false) {
    const state = { ...this.read(), ...changes };
    const kept = Object.entries(state).filter(([, value]) => value !== null && value !== undefined && value !== "");
    const hash = "#" + new URLSearchParams(kept).toString();
    if (hash === location.hash) return;
    if (replace) location.replace(hash);
    else location.hash = hash;
  },
};

/** The request that the address names, or the first. */
fk.group = (state = fk.address.read()) =>
  fk.data.groups.find((group) => group.name === state.request) || fk.data.groups[0];
