"""Other optimizers' moves, sets of answers, what is not selected, and what training leaves alone."""

from tests.mutants import Mutation

MOVES, ANSWERS, UNUSED, SELECTED, COMPARED = (
    f"tests/{name}.py"
    for name in ("test_moves", "test_answers", "test_unused", "study/test_selected", "analysis/test_comparison")
)
MUTATIONS = [
    Mutation(
        "a move that momentum makes without any gradient",
        f"{MOVES}::test_what_sequences_did_adds_up_to_torchs_own_move",
        "precond/linearization.py", "tree.add(update(tree.zeros_like(grads), state), tree.scale(",
        "tree.add(tree.zeros_like(grads), tree.scale(",
    ),
    Mutation(
        "no derivative where there is no gradient",
        f"{MOVES}::test_a_coordinate_without_gradient_has_the_derivative",
        "precond/linearization.py", "torch.where(small[name], slope[name], leaf)",
        "torch.where(small[name], leaf, leaf)",
    ),
    Mutation(
        "a derivative in place of the move",
        f"{MOVES}::test_adafactors_whole_move_is_met_and_its_derivative_is_kept_beside_it",
        "precond/linearization.py", "leaf + _along(grads[name], x[name]) * gap[name]",
        "leaf",
    ),
    Mutation(
        "rows that share a correction",
        f"{MOVES}::test_adafactors_whole_move_is_met_and_its_derivative_is_kept_beside_it",
        "precond/linearization.py", "share = (unit * x).sum(own, keepdim=True)",
        "share = (unit * x).sum()",
    ),
    Mutation(
        "the root of a second moment that is 0, differentiated",
        f"{MOVES}::test_a_coordinate_that_was_never_seen_has_what_the_optimizer_would_do",
        "precond/base.py", "dark = v == 0",
        "dark = v < 0",
    ),
    Mutation(
        "Muon as torch's documentation has it",
        f"{MOVES}::test_muon_is_torchs_to_the_last_digits_where_torch_is_let_compute_in_float64",
        "precond/updates/orthogonal.py", "torch.lerp(h, b, past.momentum) if",
        "h + past.momentum * b if",
    ),
    Mutation(
        "the first parameter's epsilon for all",
        f"{MOVES}::test_each_parameter_has_its_own_rates",
        "precond/optimizers.py", "eps=state.eps)",
        "eps=state.eps[state.names[0]])",
    ),
    Mutation(
        "the oldest parameter's steps for all",
        f"{MOVES}::test_each_parameter_has_its_own_rates",
        "precond/optimizers.py", "step=state.step,",
        "step=max(state.step.values()),",
    ),
    Mutation(
        "AdamW told by its derivative",
        f"{COMPARED}::test_at_the_first_step_each_optimizer_is_told_by_its_move",
        "precond/optimizers.py", "secant(adamw, grads, state)",
        "__import__('fkernel').precond.linearized(adamw, grads, state)",
    ),
    Mutation(
        "a correlation of rounding",
        f"{COMPARED}::test_an_influence_of_rounding_is_held_against_nothing",
        "analysis/comparison.py", "> ROUNDINGS * float(rounding",
        "> 0 * float(rounding",
    ),
    Mutation(
        "an answer that counts as often as it is given",
        f"{ANSWERS}::test_a_repeated_answer_counts_once",
        "func/observables.py", "_times_given(batch.answers).to(scores).log()",
        "0 * _times_given(batch.answers)",
    ),
    Mutation(
        "answers told apart by their padding",
        f"{ANSWERS}::test_a_repeated_answer_counts_once",
        "func/observables.py", "both.masked_fill(~answer.attention_mask[:, None].bool(), -1)",
        "both",
    ),
    Mutation(
        "answers told by their tokens alone",
        f"{ANSWERS}::test_what_belongs_to_the_prompt_makes_another_answer",
        "func/observables.py", "answer.response_mask.to(answer.input_ids)], 1)",
        "answer.input_ids], 1)",
    ),
    Mutation(
        "a parameter that is never used, moved all the same",
        f"{UNUSED}::test_a_step_leaves_alone_what_torch_leaves_alone",
        "engine/step.py", "**dict.fromkeys(unused_parameters(f, θ, U))",
        "",
    ),
    Mutation(
        "an expert that no token chose, left alone",
        f"{UNUSED}::test_a_step_leaves_alone_what_torch_leaves_alone",
        "func/unused.py", "used.add(name)",
        "used.update([name] if leaf.grad.all() else [])",
    ),
    Mutation(
        "a study that moves what the loss never uses",
        f"{SELECTED}::test_the_response_of_an_unused_parameter_is_none_at_all",
        "study/optimizer_step.py", "**dict.fromkeys(unused)",
        "",
    ),
    Mutation(
        "an optimizer of torch's is taken for a state",
        "tests/test_wrong_kinds.py::test_a_state_of_torchs_says_how_to_make_ours",
        "precond/state.py", "if isinstance(state, kind or AdamWState):", "if kind is None:",
    ),
    Mutation(
        "a tuple is taken for a gradient",
        "tests/test_wrong_kinds.py::test_the_tuple_of_loss_gradient_says_which_part_is_meant",
        "precond/adaptive.py", '    check_tree(grads, "grads")\n', "",
    ),
    Mutation(
        "the first microbatch runs twice",
        "tests/test_stacked.py::test_every_sequence_is_computed_once",
        "func/inputs/microbatch.py", "known = (places, leaves) if _columns(part) == columns else None", "known = None",
    ),
]  # fmt: skip
STUDIES = [
    Mutation(
        "the selected parameters' change for the whole model's",
        f"{SELECTED}::test_what_was_realised_is_the_whole_models_change",
        "study/analyses/context.py", '{"realised": own + others,',
        '{"realised": own,',
    ),
    Mutation(
        "a ledger that explains what was not selected",
        f"{SELECTED}::test_the_ledger_closes_with_a_line_for_what_was_not_selected",
        "study/analyses/ledger.py", "whole - sum(rest.values())",
        "whole",
    ),
    Mutation(
        "an agreement with what was not selected",
        f"{SELECTED}::test_an_agreement_is_with_what_the_selected_parameters_did",
        "study/analyses/preconditioners.py", 'others + context.effects.get("unselected", 0.0)',
        "others",
    ),
    Mutation(
        "a reference made of the policy's own parameters",
        f"{SELECTED}::test_kl_is_to_the_whole_reference_and_so_is_its_change",
        "study/analyses/observables.py", "func.kl_divergence(apply, params, temperature, reference)",
        "func.kl_divergence(apply, {name: params[name] for name in context.policy.params}, temperature)",
    ),
    Mutation(
        "one failure for all analyses",
        f"{SELECTED}::test_unseen_coordinates_and_failures_cost_no_other_analysis",
        "study/analyses/failures.py", "except FAILURES as error",
        "except MISTAKES as error",
    ),
    Mutation(
        "one failure of U's analyses for the study",
        f"{SELECTED}::test_an_analysis_of_u_that_fails_costs_no_study",
        "study/analyses/runner.py", 'tried(name, "the update batch\'s", make, context.workspace.batch.ids)',
        "(make(), None)",
    ),
    Mutation(
        "bars without what is not selected",
        f"{SELECTED}::test_pictures_and_tables_add_up_to_the_whole_models_change",
        "report/panels.py", "in analysis.arrays.items() if name not in LEFT",
        'in analysis.arrays.items() if name not in (*LEFT, "unselected")',
    ),
    Mutation(
        "an optimizer of a checkpoint whose weights alone are wanted",
        "tests/study/test_plan.py::test_what_a_checkpoint_is_loaded_with_is_passed_on",
        "study/config/base.py", '{"optimizer": False, "names": None}',
        '{"names": None}',
    ),
    Mutation(
        "a text that is an answer as often as it is drawn",
        f"{SELECTED}::test_a_text_that_was_drawn_twice_is_one_answer",
        "study/analyses/observables.py", "batch.records[i].response: i",
        "batch.records[i].sequence_id: i",
    ),
    Mutation(
        "parameters asked of nobody",
        f"{SELECTED}::test_a_parameter_that_the_loss_never_uses_is_left_alone",
        "study/prepare.py", "policy.state, ascent, unused)\n",
        "policy.state, ascent)\n",
    ),
]  # fmt: skip
