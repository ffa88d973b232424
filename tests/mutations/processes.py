"""Several processes: agreement, failure, exchange of rows."""

from tests.mutants import Mutation

FAILURES = "tests/distributed/test_failures.py"
MUTATIONS = [
    Mutation(
        "a rank that differs is not noticed",
        f"{FAILURES}::test_ranks_that_disagree_raise_before_anything_is_exchanged",
        "distributed/agreement.py",
        "if not torch.equal(every[rank], every[0])",
        "if rank < 0",
    ),
    Mutation(
        "an error that stays on its rank",
        f"{FAILURES}::test_an_error_on_one_rank_is_one_error_on_all",
        "distributed/agreement.py",
        "        failures += 1\n",
        "",
    ),
    Mutation(
        "a hang is waited for",
        f"{FAILURES}::test_a_rank_that_hangs_stops_all[sleep-hangs]",
        "distributed/heartbeat.py",
        "for rank in self.missing(size) if now",
        "for rank in () if now",
    ),
    Mutation(
        "a long computation is called a hang",
        f"{FAILURES}::test_a_rank_that_computes_for_long_is_waited_for",
        "distributed/heartbeat.py",
        "beat.seconds > self._moved[rank][1].seconds + IDLE",
        "False",
    ),
]
