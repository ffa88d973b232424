"""Sampling, keeping, and a study's own arithmetic."""

from tests.mutants import Mutation

ROLLOUT, STUDY = "tests/rollout", "tests/study"
AGAIN = "test_a_second_run_computes_no_gradient_and_gives_the_same_bits"
MUTATIONS = [
    Mutation(
        "completions of a prompt share a stream",
        f"{ROLLOUT}/test_generator.py::test_completions_of_a_prompt_are_drawn_apart",
        "rollout/generator.py", "seeds = [seed_of(seed, prefix, g, k) for g, k, _ in draws]",
        "seeds = [seed_of(seed, prefix, g) for g, k, _ in draws]",
    ),
    Mutation(
        "one stream for a whole microbatch",
        f"{ROLLOUT}/test_sampling.py::test_company_changes_nothing",
        "rollout/sampling.py", "[torch.Generator().manual_seed(seed) for seed in seeds]",
        "[torch.Generator().manual_seed(seeds[0])] * len(seeds)",
    ),
    Mutation(
        "the EOS does not belong to its response",
        f"{ROLLOUT}/test_sampling.py::test_eos_ends_a_response_and_belongs_to_it",
        "rollout/sampling.py", "end = length or len(tokens[row])", "end = (length or len(tokens[row]) + 1) - 1",
    ),
    Mutation(
        "log q of the untruncated distribution",
        f"{ROLLOUT}/test_sampling.py::test_teacher_forcing_says_what_the_sampler_saw",
        "rollout/sampling.py", "self.q.append(log_q.gather(1, token)[:, 0])",
        "self.q.append(log_p.gather(1, token)[:, 0])",
    ),
    Mutation(
        "dapo's weights of one micro-batch",
        f"{ROLLOUT}/test_weights.py::test_trl_losses_are_weighted_sums_of_scores",
        "rollout/advantages.py", "return ones * batches / (t.sum() if tokens is None else tokens)",
        "return ones / t.sum()",
    ),
    Mutation(
        "clipping left out of a study's contributions",
        f"{STUDY}/test_runner.py::test_it_is_what_explain_step_says",
        "study/workspace.py", "return self.clip * self.loss_weights_with(advantages)",
        "return self.loss_weights_with(advantages)",
    ),
    Mutation(
        "columns of the kernel left in the order of their lengths",
        f"{STUDY}/test_runner.py::test_it_is_what_explain_step_says",
        "study/gradients.py", "K[columns[:, None], rows] = part.T", "K[columns[:, None], rows] = part.T.flip(0)",
    ),
    Mutation(
        "a workspace of something else is served",
        f"{STUDY}/test_workspace.py::test_what_differs_is_named",
        "study/directory.py", "if found := differences(stored, wanted):", "if found := []:",
    ),
    Mutation(
        "a damaged response is served",
        f"{STUDY}/test_workspace.py::test_damage_is_never_served",
        "study/directory.py", 'checksum(place) != facts["sha256"]', "False",
    ),
    Mutation(
        "stored gradients are computed again",
        f"{STUDY}/test_runner.py::{AGAIN}",
        "engine/stored.py", "if not store.has(i)]", "]",
    ),
    Mutation(
        "contributors without their sign",
        f"{STUDY}/test_diagnostics.py::test_top_contributors_are_by_size_and_keep_their_sign",
        "study/diagnostics.py", "return order, C.gather(1, order)", "return order, C.abs().gather(1, order)",
    ),
    Mutation(
        "rows that keep their gradients",
        f"{STUDY}/test_workspace.py::test_rows_let_go_of_their_gradients",
        "study/rows.py", "current.clear()",
        "pass",
    ),
]  # fmt: skip
