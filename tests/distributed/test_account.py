"""A run's account on several ranks is the account of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fkernel.engine import Sweep, account
from tests.distributed.ranks import results
from tests.distributed.test_same_numbers import ROUNDING, apart
from tests.test_run_account import accounted, run


def fields(mesh: Any, options: dict[str, Any], resumed: bool = False) -> dict[str, torch.Tensor]:
    """Every column of an account of the run's last steps."""
    taken, kept = run()._replace(steps=run().steps[-3:]), list[Sweep]()

    def keep(sweep: Sweep) -> None:
        kept.append(sweep._replace(rows={name: leaf.clone() for name, leaf in sweep.rows.items()}))

    result = accounted(taken, mesh=mesh, on_step=keep, **options)
    if resumed:
        steps = taken.steps[::-1]
        result = account(taken.S, taken.E, steps, mesh=mesh, resume=kept[1], **options)
    columns = {f"step {i}": C for i, C in enumerate(result.contributions)}
    return columns | {name: value for name, value in result._asdict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(
    ("ranks", "options", "resumed"),
    [(4, {"path": "gauss2", "microbatch": 1}, True), (2, {"memory": "40MiB"}, False)],
)
def test_any_number_of_ranks_gives_the_same_account(ranks, options, resumed):
    expected = fields(None, {**options, "memory": None})
    size = expected["realised"].norm()
    for found in results(ranks, fields, options, resumed):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name in ("arithmetic", "unexplained", "older"):  # nothing, or what rounding makes of a difference of θ
                assert float((found[name] - value).norm()) <= 1e-9 * float(size)
            else:
                assert apart(found[name], value) <= ROUNDING, name
