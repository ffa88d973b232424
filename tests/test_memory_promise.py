"""`memory=` is kept: peak resident memory of a process of its own, beside model, optimizer state and batches."""

import pytest

from benchmarks import memory


@pytest.mark.turns(6)
@pytest.mark.parametrize(
    ("what", "grant"), [("kernel", 600), ("kernel", 250), ("kernel", 160), ("influence", 200), ("explain_step", 300)]
)
def test_a_grant_is_kept(what, grant):
    """0.9M parameters, 48 × 96 sequences of 128 tokens: 155 MB of rows on the smaller side, as much in handles."""
    sizes = {"shape": "small", "n_E": 48, "n_U": 96, "T": 128, "grant": grant}
    peak = memory.in_own_process(f"{what} within a grant", sizes)
    assert peak.grown <= 1.1 * grant
