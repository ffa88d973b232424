"""Steps, ledgers, sweeps, parts, observables and other steps."""

from tests.mutants import Mutation

ANALYSIS = "tests/analysis"
MUTATIONS = [
    Mutation(
        "one learning rate for all parameters",
        f"{ANALYSIS}/test_comparison.py::test_parameters_keep_their_own_learning_rates",
        "precond/optimizers.py", "{name: rates[name] * leaf for",
        "{name: max(rates.values()) * leaf for",
    ),
    Mutation(
        "an optimizer's Jacobian with its own sign",
        "tests/test_linearized.py::test_linearized_is_the_derivative_of_torchs_own_step",
        "precond/linearization.py", "return tree.scale(-1.0, both[1])",
        "return tree.scale(1.0, both[1])",
    ),
    Mutation(
        "KL the other way around",
        "tests/test_observables.py::test_jvps_are_central_differences",
        "func/observables.py", "(log_p.exp() * gap).sum(-1)",
        "(log_p.exp().detach() * gap).sum(-1)",
    ),
    Mutation(
        "expected reward without its normalisation",
        "tests/test_observables.py::test_values",
        "func/observables.py", "scores.softmax(1) * batch.rewards",
        "scores.exp() * batch.rewards",
    ),
    Mutation(
        "a part of a kernel without P",
        "tests/test_observables.py::test_a_kernels_parts_add_up_to_it",
        "func/handles/groups.py", "diagonal=None if diagonal is None else {name: diagonal[name] for name in names},",
        "diagonal=None,",
    ),
    Mutation(
        "padding's row trained like any other",
        "tests/test_padding.py::test_the_loss_gradient_is_the_trainers",
        "func/padding.py", "embedded.detach(), embedded)",
        "embedded, embedded)",
    ),
    Mutation(
        "a floor of another dtype's roundoff",
        f"{ANALYSIS}/test_ledger.py::test_the_floor_is_the_size_of_the_rounding_that_is_seen",
        "analysis/decomposition.py", "torch.finfo(dtype).eps / 2 *",
        "torch.finfo(dtype).eps * 10 *",
    ),
    Mutation(
        "a ledger without momentum",
        f"{ANALYSIS}/test_ledger.py::test_a_ledger_closes_and_its_parts_are_what_they_say",
        "analysis/decomposition.py", "known = [*parts.values(), momentum, decay, *others.values()]",
        "known = [*parts.values(), decay, *others.values()]",
    ),
    Mutation(
        'curvature that grows with the step, not its square',
        f"{ANALYSIS}/test_ledger.py::test_remainders_fall_as_the_square_and_the_cube_of_the_rate",
        'analysis/sweep.py', 's * slope + s * s * bend',
        's * slope + s * bend',
    ),
    Mutation(
        'a range that ends where it breaks',
        f"{ANALYSIS}/test_sweep.py::test_eight_decades_have_a_floor_a_range_and_a_breakdown",
        'analysis/sweep.py', 'float(self.scales[high - 1])',
        'float(self.scales[min(high, len(good) - 1)])',
    ),
    Mutation(
        'a token too many',
        f"{ANALYSIS}/test_tokens.py::test_the_tokens_kernel_adds_up_to_the_sequences",
        'analysis/tokens.py', 'masks[torch.arange(len(places)), places] = True',
        'masks[:, places] = True',
    ),
    Mutation(
        'tokens at another temperature',
        f"{ANALYSIS}/test_tokens.py::test_tokens_add_up_to_their_sequence",
        'analysis/tokens.py', 'func.token_logprobs(apply, temperature)',
        'func.token_logprobs(apply)',
    ),
    Mutation(
        'a part that is put over another',
        f"{ANALYSIS}/test_parts.py::test_parts_add_up_to_groups_and_groups_to_the_whole",
        'analysis/parts.py', 'sums[group] = sums[group] + parts[part] if group in sums else parts[part]',
        'sums[group] = parts[part]',
    ),
    Mutation(
        "a part that is split put into one of its groups",
        f"{ANALYSIS}/test_parts.py::test_a_part_that_lies_in_two_groups_is_refused",
        "analysis/parts.py", "        if len(groups) > 1:\n",
        "        if False:\n",
    ),
    Mutation(
        "parts that are missing skipped",
        f"{ANALYSIS}/test_parts.py::test_parts_and_names_are_of_the_same_parameters",
        "analysis/parts.py", '    tree.check_names(parts, members, "parts", "names")\n',
        "",
    ),
    Mutation(
        'shares in which opposites cancel',
        f"{ANALYSIS}/test_parts.py::test_shares_add_up_to_one",
        'analysis/parts.py', 'float(value.double().abs().sum())',
        'abs(float(value.double().sum()))',
    ),
    Mutation(
        'a frozen step with the other D',
        f"{ANALYSIS}/test_counterfactual.py::test_the_frozen_one_is_linear_and_meets_the_step_that_was_taken",
        'analysis/other_steps.py', 'response(rates, {**taken}, params)(',
        'response(rates, {**g}, params)(',
    ),
    Mutation(
        'the rate of the step that was taken',
        f"{ANALYSIS}/test_counterfactual.py::test_the_recomputed_step_is_the_one_that_torch_takes",
        'analysis/other_steps.py', 'name: lr * rate for',
        'name: rate for',
    ),
    Mutation(
        'clipping of the step that was taken',
        f"{ANALYSIS}/test_counterfactual.py::test_the_recomputed_step_is_the_one_that_torch_takes",
        'analysis/other_steps.py', 'precond.clip_gradient(ascent, max_norm, clip=clip)',
        'precond.clip_gradient(ascent, clip=precond.clip_factor(taken, max_norm))',
    ),
    Mutation(
        'columns of the observable instead of the loss',
        f"{ANALYSIS}/test_observed.py::test_a_prediction_meets_the_step_that_is_taken",
        "engine/step.py", "f_E = f if rows is None else rows",
        "f = f_E = f if rows is None else rows",
    ),
    Mutation(
        'momentum left in what the batch did',
        f"{ANALYSIS}/test_comparison.py::test_the_optimizers_own_meets_what_happened_and_others_less",
        'analysis/comparison.py', 'batch, agreements = realised - others',
        'batch, agreements = realised + others',
    ),
    Mutation(
        "a constant that varies by rounding",
        f"{ANALYSIS}/test_constants.py::test_constants_are_refused_on_either_side",
        "engine/correlation.py", "> ROUNDING * unit * wide.norm())",
        "> 0)",
    ),
    Mutation(
        "ranks of rounding",
        f"{ANALYSIS}/test_constants.py::test_constants_are_refused_on_either_side",
        "engine/correlation.py", "torch.unique(x if varies(x) else torch.zeros_like(x),",
        "torch.unique(x,",
    ),
    Mutation(
        "a sequence paired with itself",
        "tests/study/test_diagnostics.py::test_blocks_are_of_different_sequences",
        "study/evaluation.py", "tally.add(K[others], cosine[others], same[others])",
        "tally.add(K, cosine, same)",
    ),
    Mutation(
        'ranks of equal values apart',
        f"{ANALYSIS}/test_comparison.py::test_ranks_are_spearmans",
        'engine/correlation.py', '(count.double() + 1) / 2',
        '1',
    ),
    Mutation(
        'Muon for every parameter',
        f"{ANALYSIS}/test_comparison.py::test_muon_moves_the_matrices_it_is_given_and_adamw_the_rest",
        'precond/optimizers.py', 'if g.ndim == 2 and (matrices is None or name in matrices)',
        'if g.ndim == 2',
    ),
    Mutation(
        "a step that was not taken moves what the loss never uses",
        "tests/test_unused.py::test_a_step_that_was_not_taken_leaves_it_alone_too",
        "analysis/other_steps.py", "**{name: None for name, leaf in taken.items() if leaf is None}",
        "",
    ),
    Mutation(
        "an observable's step moves what the loss never uses",
        "tests/test_unused.py::test_an_observables_step_leaves_alone_what_torch_leaves_alone",
        "engine/step.py", "dict.fromkeys(unused_parameters(f, θ, U))",
        "dict.fromkeys(unused_parameters(f_E, θ, E))",
    ),
    Mutation(
        "weights of sorted sequences as the caller has them",
        "tests/test_strategies.py::test_a_side_s_gradients_in_parts_add_up_and_are_found_again",
        "engine/gradients.py", "w = weights[self.side.order[rows].to(weights.device)]", "w = weights[rows]",
    ),
]  # fmt: skip
