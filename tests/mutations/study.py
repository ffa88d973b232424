"""Sampling, keeping, and a study's own arithmetic."""

from tests.mutants import Mutation

ROLLOUT, STUDY = "tests/rollout", "tests/study"
AGAIN = "test_a_second_run_computes_no_gradient_and_gives_the_same_bits"
MUTATIONS = [
    Mutation(
        "a vector counted once a block of columns",
        "tests/test_strategies.py::test_a_side_s_gradients_in_parts_add_up_and_are_found_again",
        "engine/streaming.py", "own_x=j == 0,", "own_x=True,",
    ),
    Mutation(
        "completions of a prompt share a stream",
        f"{ROLLOUT}/test_generator.py::test_completions_of_a_prompt_are_drawn_apart",
        "rollout/generator.py", "seeds = [seed_of(seed, prefix, g, k) for g, k, _ in draws]",
        "seeds = [seed_of(seed, prefix, g) for g, k, _ in draws]",
    ),
    Mutation(
        "a token just beyond the vocabulary is let through until the model is loaded",
        f"{STUDY}/test_checks.py::test_tokens_beyond_the_vocabulary_are_found_in_saved_batches",
        "study/known_ids.py", "if not 0 <= token < vocabulary:", "if not 0 <= token <= vocabulary:",
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
        f"{STUDY}/test_preconditioners.py::test_preconditioners[True-post-step]",
        "engine/streaming.py", "at = torch.arange(0) if columns is None else columns.argsort()",
        "at = torch.arange(0) if columns is None else columns.argsort().flip(0)",
    ),
    Mutation(
        "half of U's kernel with itself turned around",
        f"{STUDY}/test_runner.py::test_paths_share_a_workspace_and_the_kernel_of_u_is_where_u_is",
        "engine/streaming.py", "K[columns[:, None], rows] = products.kernel().T.cpu()",
        "K[columns[:, None], rows] = products.kernel().T.flip(0).cpu()",
    ),
    Mutation(
        "a request's kernel at the checkpoint, though its path is the midpoint",
        f"{STUDY}/test_runner.py::test_it_is_what_explain_step_says[midpoint]",
        "study/rows.py", "spec, policy.path, policy.step, U", 'spec, "start", policy.step, U',
    ),
    Mutation(
        "a request's kernel at the midpoint, though its path is the start",
        f"{STUDY}/test_runner.py::test_it_is_what_explain_step_says[start]",
        "study/runner.py", "_replace(path=self.plan.step.path, **taken.for_policy)",
        '_replace(path="midpoint", **taken.for_policy)',
    ),
    Mutation(
        "U's own gradients for a request of U halfway along the step",
        f"{STUDY}/test_runner.py::test_it_is_what_explain_step_says[midpoint]",
        "study/evaluation.py", 'if policy.through_detach or policy.path != "start" else',
        "if policy.through_detach else",
    ),
    Mutation(
        "one sequence's gradient at the checkpoint, beside requests at the midpoint",
        f"{STUDY}/test_runner.py::test_questions_about_pairs_of_any_batches",
        "study/runner.py", "for q, node in policy.nodes", "for q, node in ((1.0, policy.params),)",
    ),
    Mutation(
        "a prediction without momentum",
        f"{STUDY}/test_results.py::test_a_prediction_is_all_that_moved_the_sequence_and_nothing_beside",
        "study/outcome.py", "+ self.momentum + self.decay", "+ self.decay",
    ),
    Mutation(
        "momentum along the step, too",
        f"{STUDY}/test_runner.py::test_it_is_what_explain_step_says[midpoint]",
        "study/analyses/context.py", '{"momentum": self.taken.momentum,', '{"momentum": self.taken.total,',
    ),
    Mutation(
        "an influence without kernel that takes U's sum unpreconditioned",
        f"{STUDY}/test_runner.py::test_influence_alone_needs_no_kernel",
        "study/evaluation.py", "workspace.P(workspace.gradients.weighted_sum(context.weights.to(context.like)))",
        "workspace.gradients.weighted_sum(context.weights.to(context.like))",
    ),
    Mutation(
        "sequences of U read by the place that they were asked at",
        f"{STUDY}/test_runner.py::test_at_the_start_u_is_read_and_not_computed_again",
        "engine/gradients.py", "places.append((i, matches[:, 1]))", "places.append((i, matches[:, 0]))",
    ),
    Mutation(
        "a workspace of something else is served",
        f"{STUDY}/test_workspace.py::test_what_differs_is_named",
        "study/directory.py", "if changed := differences(stored, wanted):", "if changed := []:",
    ),
    Mutation(
        "a damaged response is served",
        f"{STUDY}/test_workspace.py::test_damage_is_never_served",
        "study/directory.py", 'checksum(place) != facts["sha256"]', "False",
    ),
    Mutation(
        "stored gradients are computed again",
        f"{STUDY}/test_runner.py::{AGAIN}",
        "engine/from_store.py", "if not store.has(i)]", "]",
    ),
    Mutation(
        "an edited reward is served the old one's batch",
        f"{STUDY}/test_sources.py::test_an_edited_reward_is_not_served_the_old_ones_workspace",
        "study/policy.py", 'record["code"] = code_of(dotted_names(record["update"]))', 'record["code"] = {}',
    ),
    Mutation(
        "an edited helper is not looked at",
        f"{STUDY}/test_sources.py::test_an_edited_helper_counts_and_a_module_that_is_not_imported_does_not",
        "study/sources.py", "            _add(name, root, hashes)\n", "            pass\n",
    ),
    Mutation(
        "a function that cannot be hashed is believed",
        f"{STUDY}/test_sources.py::test_a_function_without_a_file_is_asked_again",
        "study/draws.py", "if was != is_now:", "if False:",
    ),
    Mutation(
        "rewards of a given U are not looked at",
        f"{STUDY}/test_sources.py::test_rewards_and_weights_of_a_given_u_count",
        "rollout/files.py", 'left_out = {"metadata", *', 'left_out = {"metadata", "reward", *',
    ),
    Mutation(
        "an answer is computed again",
        f"{STUDY}/test_kept.py::test_the_same_plan_computes_nothing_again",
        "study/kept.py", 'if record["key"] != key or', 'if record["key"] == key or',
    ),
    Mutation(
        "an answer is kept although its reward was edited",
        f"{STUDY}/test_kept.py::test_whatever_decides_an_answer_is_in_its_key",
        "study/kept.py", '"strict": strict, "code": code}', '"strict": strict, "code": {}}',
    ),
    Mutation(
        "an answer is kept although its prompts are others",
        f"{STUDY}/test_kept.py::test_whatever_decides_an_answer_is_in_its_key",
        "study/kept.py", '"files": prompts_files(prompts)}', '"files": {}}',
    ),
    Mutation(
        "a device that computes nothing is found by the run",
        f"{STUDY}/test_checks.py::test_mistakes_are_found_without_a_gradient",
        "study/checks.py", "torch.ones(1, device=name).item()", "torch.ones(1)",
    ),
    Mutation(
        "an empty path is the current folder",
        f"{STUDY}/test_cli.py::test_an_empty_path_is_not_the_current_folder",
        "cli/console.py", "if not str(text).strip():", "if False:",
    ),
    Mutation(
        "a damaged answer is served",
        f"{STUDY}/test_kept.py::test_an_answer_beside_which_another_batch_lies_is_computed_again",
        "study/kept.py", ' or record["sha256"] != _checksums(place):', ":",
    ),
    Mutation(
        "arrays of another run are served",
        f"{STUDY}/test_kept.py::test_results_refuse_arrays_of_another_run",
        "study/sealed.py", "if actual[name] != written.get(name)]", "if False]",
    ),
    Mutation(
        "a batch of other sequences is asked, since its ids are the same",
        f"{STUDY}/test_cli.py::test_query_refuses_a_batch_that_the_results_are_not_about",
        "study/checks.py", "if about != tuple(map(info_of, batch)):", "if [one.id for one in about] != batch.ids:",
    ),
    Mutation(
        "a sequence has the weight of U's that has its id",
        f"{STUDY}/test_cli.py::test_an_id_of_two_sequences_is_not_guessed",
        "study/runner.py", "GradientCache(name or batch.ids[0],", "GradientCache(batch.ids[0],",
    ),
    Mutation(
        "a workspace's batch is told by its ids",
        f"{STUDY}/test_workspace.py::test_another_batch_of_the_same_ids_is_not_served",
        "study/directory.py", 'if "batch" in facts and (', "if False and (",
    ),
    Mutation(
        "contributors without their sign",
        f"{STUDY}/test_diagnostics.py::test_top_contributors_are_by_size_and_keep_their_sign",
        "study/diagnostics.py", "return order, C.gather(1, order)", "return order, C.abs().gather(1, order)",
    ),
    Mutation(
        "rows that keep their gradients",
        f"{STUDY}/test_workspace.py::test_rows_let_go_of_their_gradients",
        "engine/streaming.py", "        assert products is not None\n        del held\n",
        "        assert products is not None\n",
    ),
    Mutation(
        "gradients of long sequences kept on disk",
        f"{STUDY}/test_long.py::test_of_long_sequences_no_gradient_is_kept",
        "study/prepare.py", "        if how is None:\n", "        if True:\n",
    ),
    Mutation(
        "a walked sum whose weights are not in the order of the sequences' lengths",
        f"{STUDY}/test_long.py::test_walked_gradients_are_those_that_are_computed_whole",
        "engine/layerwise.py", "w = weights[side.order.to(weights.device)]", "w = weights",
    ),
    Mutation(
        "rows by themselves at the first node of the path only",
        f"{STUDY}/test_long.py::test_rows_walk_alone_at_all_nodes_of_a_path",
        "engine/layerwise.py", "side = Side(E.batch, nodes, must_cut(", "side = Side(E.batch, nodes[:1], must_cut(",
    ),
    Mutation(
        "a workspace that is opened makes its step of a preconditioned ascent",
        f"{STUDY}/test_long.py::test_a_short_workspace_makes_the_same_step_and_reads_no_gradient",
        "study/prepare.py", "ascent = workspace.ascent(policy.params)",
        "ascent = workspace.P(workspace.ascent(policy.params))",
    ),
]  # fmt: skip
