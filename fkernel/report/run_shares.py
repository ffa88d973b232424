"""Tables of what parts of a loss did to a probe over a run, and gradients by their age."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from fkernel.report.run_tables import probe_text
from fkernel.report.units import unit_of
from fkernel.study import AccountResults


def parts_table(results: AccountResults, probe: str | int) -> Table:
    """Tabulate what each part of the loss did to a probe over the run.

    Args:
        results: the account, of a recording that tells parts apart.
        probe: its id, or position.

    Raises:
        ResultsError: there is no such probe, or parts are not told apart.
    """
    return _shares(results, probe, "part of the loss", results.top_parts(probe))


def ages_table(results: AccountResults, probe: str | int) -> Table:
    """Tabulate what gradients did to a probe by their age: in their own step, and through momentum later.

    Args:
        results: the account, with ages.
        probe: its id, or position.

    Raises:
        ResultsError: there is no such probe, or ages were not asked for.
    """
    table = _shares(results, probe, "steps after its own", results.by_age(probe))
    table.caption = "what the optimizer remembered from before the run counts as the oldest"
    return table


def _shares(results: AccountResults, probe: str | int, what: str, shares: list) -> Table:
    e, unit = results.row(probe), unit_of(results)
    table = Table(title=f"{probe_text(results, e, 60)} ({unit.name})")
    table.add_column(what)
    table.add_column("contribution", justify="right")
    for share in shares:
        table.add_row(Text(share.id), unit(share.value))
    table.add_section()
    table.add_row("together", unit(sum(share.value for share in shares)))
    return table
