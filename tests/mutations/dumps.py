"""Batches that trainers dumped: what is read, and the weights that are made of it."""

from tests.mutants import Mutation

DUMPS, TRL = "tests/record/test_dumps.py", "tests/record/test_dumps_of_trl.py"
LOSSES = "tests/study/test_dumped_losses.py"
MUTATIONS = [
    Mutation(
        "log-probabilities of the token before",
        f"{DUMPS}::test_what_was_written_is_read[nemo_rl]",
        "record/dumps/nemo_rl.py",
        "t, start, length) for name in names}",
        "t, start - 1, length - 1) for name in names}",
    ),
    Mutation(
        "a rank's file may be missing",
        f"{DUMPS}::test_ranks_of_prime_rl_come_together",
        "record/dumps/prime_rl.py",
        "missing = sorted({*range(0, numbers[-1] + 1, stride), *others} - here)",
        "missing = []",
    ),
    Mutation(
        "all samples of a rollout in its every step",
        f"{DUMPS}::test_a_rollout_of_slime_is_of_several_steps",
        "record/dumps/slime.py",
        "for i in sorted(positions)]",
        "for i in sorted(at)]",
    ),
    Mutation(
        "tokens that the loss left out weigh as the others",
        f"{LOSSES}::test_token_weights_are_autograds_of_the_trainers_loss[slime]",
        "study/dumped.py",
        "return mask if kept is None else mask & (kept == 1)",
        "return mask",
    ),
    Mutation(
        "a mean over all rows, the ones that were left out too",
        f"{LOSSES}::test_rows_that_the_loss_left_out_count_where_they_count",
        "study/dumped_weights.py",
        "return 1 / (pairs[:, 0].clamp(min=1) * pairs[:, 1])",
        "return 1 / (pairs[:, 0].clamp(min=1) * n)",
    ),
    Mutation(
        "another policy's log-probabilities pass",
        f"{LOSSES}::test_another_policys_log_probabilities_are_refused",
        "study/dumped.py",
        "if whole > factor * APART or float(rows[worst]) > factor * ROW_APART:",
        "if whole > factor * APART:",
    ),
    Mutation(
        "a ratio of 1 to the sampling engine",
        f"{LOSSES}::test_the_ratio_to_the_sampling_engine",
        "study/dumped.py",
        "return own, sampler",
        "return own, own",
    ),
    Mutation(
        "one bound for tokens that are raised and lowered",
        "tests/objectives/test_autograd.py::test_omega_and_eta_are_autograds[DPPO with KL]",
        "func/objectives/drifts.py",
        "torch.where(A > 0, risen <= high, risen >= -low)",
        "risen <= high",
    ),
]
TRAINED = [
    Mutation(
        "a response that was cut off ends",
        f"{TRL}::test_trls_completions_are_the_recorded_batches",
        "record/dumps/texts.py",
        "if len(ids) == most:",
        "if False:",
    ),
    Mutation(
        "the run's count of tokens is not looked at",
        f"{TRL}::test_another_length_than_the_runs_is_told_by_the_log",
        "record/dumps/trl_log.py",
        "if abs(meant - value) > 1e-4 * max(1.0, abs(meant)):",
        "if False:",
    ),
]
"""Whose tests train."""
