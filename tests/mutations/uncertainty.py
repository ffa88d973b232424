"""Intervals, permutations and ranks: what could be chance."""

from tests.mutants import Mutation

ANALYSIS = "tests/analysis"
EXCHANGEABLE = "tests/study/test_exchangeable.py"
MUTATIONS = [
    Mutation(
        "a column by token weights taken for one by advantages",
        f"{EXCHANGEABLE}::test_the_p_values_are_those_of_the_loss_by_advantages",
        "study/analyses/exchange.py", "torch.where(some, 1 / A", "torch.where(some, 1 / A.sign()",
    ),
    Mutation(
        "a loss that weighs wrong answers otherwise is permuted",
        f"{EXCHANGEABLE}::test_what_is_a_policy_gradient",
        "study/analyses/exchange.py", "return all(_same(own[at]) or _same((own * tokens)[at]) for at in prompts)",
        "return len(prompts) > 0",
    ),
    Mutation(
        "a ratio passes for a policy gradient",
        f"{EXCHANGEABLE}::test_a_loss_that_may_depend_on_signs_is_not_permuted_and_says_so",
        "study/analyses/exchange.py", "CLOSE = 1e-3", "CLOSE = 1.0",
    ),
    Mutation(
        'sequences resampled, not prompts',
        f"{ANALYSIS}/test_uncertainty.py::test_intervals_cover",
        'analysis/uncertainty.py', 'names, place = torch.unique(groups.cpu(), return_inverse=True)',
        'names, place = torch.unique(torch.arange(len(groups)), return_inverse=True)',
    ),
    Mutation(
        'drawn without replacement',
        f"{ANALYSIS}/test_uncertainty.py::test_every_draw_takes_as_many_prompts_as_there_are",
        'analysis/uncertainty.py', 'torch.randint(G, (draws, G), generator=torch.Generator().manual_seed(seed))',
        'torch.rand(draws, G, generator=torch.Generator().manual_seed(seed)).argsort(1)',
    ),
    Mutation(
        "the jackknife's factor",
        f"{ANALYSIS}/test_uncertainty.py::test_the_jackknife_is_leaving_out",
        'analysis/uncertainty.py', '(G / (G - 1) *',
        '((G - 1) / G *',
    ),
    Mutation(
        "a normal's quantile for Student's",
        f"{ANALYSIS}/test_uncertainty.py::test_intervals_cover",
        "analysis/uncertainty.py", "half = student_quantile(coverage, draws.prompts - 1) * error",
        "half = student_quantile(coverage, 10_000) * error",
    ),
    Mutation(
        "as many degrees of freedom as prompts",
        f"{ANALYSIS}/test_uncertainty.py::test_intervals_are_students",
        "analysis/uncertainty.py", "(coverage, draws.prompts - 1)",
        "(coverage, draws.prompts)",
    ),
    Mutation(
        "odd degrees of freedom counted as even",
        f"{ANALYSIS}/test_uncertainty.py::test_quantiles_are_students",
        "analysis/student.py", "odd, square = freedom % 2,",
        "odd, square = 0,",
    ),
    Mutation(
        "who abstains is exchanged with the judged",
        f"{ANALYSIS}/test_permuted_moments.py::test_who_abstains_stays_where_it_is",
        "analysis/permutation_test.py", "return torch.where(permuted.to(place.device), place, G + ",
        "return torch.where(permuted.to(place.device), place, place + 0 * ",
    ),
    Mutation(
        "the mean of those who abstain, too",
        f"{ANALYSIS}/test_permuted_moments.py::test_p_of_the_judged_is_a_share_of_their_permutations",
        "analysis/permutation_test.py", "moved, at = A[moves], place[moves]",
        "moved, at = A, place",
    ),
    Mutation(
        "the square of those who abstain is permuted",
        f"{ANALYSIS}/test_permuted_moments.py::test_who_abstains_is_not_exchanged",
        "analysis/permutation_test.py", "places(_cells(place, G, permuted), 1)[0]",
        "places(place, 1)[0]",
    ),
    Mutation(
        "a study that exchanges who abstains",
        "tests/study/test_uncertainty.py::test_who_abstains_is_not_exchanged_with_the_judged",
        "study/analyses/exchange.py", "not record.abstained or record.reward is not None",
        "True",
    ),
    Mutation(
        "what completions have in common left in",
        f"{ANALYSIS}/test_permuted_moments.py::test_it_is_the_root_mean_square_over_every_permutation",
        "analysis/permutation_test.py", "value=float(variance[g] / size[g])",
        "value=0.0",
    ),
    Mutation(
        "a variance over k",
        f"{ANALYSIS}/test_permuted_moments.py::test_it_is_the_root_mean_square_over_every_permutation",
        "analysis/permutation_test.py", "/ (size - 1).clamp_min(1)",
        "/ size",
    ),
    Mutation(
        "advantages taken for centred",
        f"{ANALYSIS}/test_permuted_moments.py::test_it_is_the_root_mean_square_over_every_permutation",
        "analysis/permutation_test.py", "return left.addcmul_(mean, mean).sqrt_()",
        "return left.sqrt_()",
    ),
    Mutation(
        "a penalty permuted away",
        f"{ANALYSIS}/test_permuted_moments.py::test_it_is_the_root_mean_square_over_every_permutation",
        "analysis/permutation_test.py", "        mean = tree.add(mean, tree.cast(constant, weights.dtype))\n",
        "        pass\n",
    ),
    Mutation(
        "a mean square of rounding",
        f"{ANALYSIS}/test_permuted_moments.py::test_a_difference_that_is_rounding_is_no_smaller_than_rounding",
        "analysis/permutation_test.py", "n * torch.finfo(squares.dtype).eps * squares",
        "0 * squares",
    ),
    Mutation(
        "p under the step's own preconditioner",
        "tests/study/test_uncertainty.py::test_p_is_of_a_kernel_that_permutations_leave_alone",
        "study/analyses/uncertainty.py", 'block.kernel("permuted" if self.permuted else "")',
        'block.kernel("")',
    ),
    Mutation(
        "a mean square that is not clipped",
        "tests/study/test_uncertainty.py::test_intervals_have_their_width_of_that_kernel_and_their_middle_of_the_step",
        "study/analyses/uncertainty.py", "StepPlan(**step)",
        "StepPlan()",
    ),
    Mutation(
        "an interval around another influence",
        "tests/study/test_uncertainty.py::test_intervals_have_their_width_of_that_kernel_and_their_middle_of_the_step",
        "study/analyses/uncertainty.py", "apart = C.sum(1) - interval.estimate",
        "apart = 0 * interval.estimate",
    ),
    Mutation(
        'percentiles at one side',
        f"{ANALYSIS}/test_uncertainty.py::test_the_bootstrap_agrees_with_its_closed_form",
        'analysis/uncertainty.py', 'return at(tail), at(1 - tail)',
        'return at(tail), at(coverage)',
    ),
    Mutation(
        'ranks by signed contributions',
        f"{ANALYSIS}/test_uncertainty.py::test_ranks_count_who_is_ahead",
        'analysis/uncertainty.py', 'size = C.double().abs()',
        'size = C.double()',
    ),
    Mutation(
        'ranks upside down',
        f"{ANALYSIS}/test_uncertainty.py::test_ranks_of_totals_are_those_of_redrawn_evaluations",
        'analysis/uncertainty.py', 'ahead = size.shape[1] - torch',
        'ahead = torch',
    ),
    Mutation(
        'draws of no seed',
        f"{ANALYSIS}/test_uncertainty.py::test_rows_give_the_same_in_blocks_and_the_same_seed_gives_the_same",
        'analysis/uncertainty.py', 'manual_seed(seed)',
        'manual_seed(0)',
    ),
    Mutation(
        'advantages permuted across prompts',
        f"{ANALYSIS}/test_significance.py::test_prompts_keep_their_advantages_among_themselves",
        'analysis/permutation_test.py', 'shuffled = anyhow.gather(1, cells[anyhow].argsort(dim=1, stable=True))',
        'shuffled = anyhow',
    ),
    Mutation(
        'loss weights permuted too',
        f"{ANALYSIS}/test_significance.py::test_p_is_a_share_of_permutations",
        'analysis/permutation_test.py', 'A[draws.orders.to(K.device)]',
        '(A * scale)[draws.orders.to(K.device)] / scale',
    ),
    Mutation(
        'the observed one not counted',
        f"{ANALYSIS}/test_significance.py::test_p_is_a_share_of_permutations",
        'analysis/permutation_test.py', 'return (1 + draws - smaller).double() / (1 + draws)',
        'return (draws - smaller).double() / draws',
    ),
    Mutation(
        'each prompt against itself alone',
        f"{ANALYSIS}/test_significance.py::test_p_is_uniform_where_advantages_tell_nothing",
        'analysis/permutation_test.py', 'torch.maximum(largest, sums.abs())',
        'sums.abs()',
    ),
    Mutation(
        'sums of sizes',
        f"{ANALYSIS}/test_significance.py::test_a_planted_contributor_is_found",
        'analysis/permutation_test.py', 'sums = factors[:, columns] @',
        'sums = factors[:, columns].abs() @',
    ),
    Mutation(
        'equal statistics counted for',
        f"{ANALYSIS}/test_significance.py::test_p_is_a_share_of_permutations",
        'analysis/permutation_test.py', 'own - slack)',
        'own + slack)',
    ),
    Mutation(
        'advantages not centred',
        f"{ANALYSIS}/test_significance.py::test_p_is_a_share_of_permutations",
        'analysis/permutation_test.py', 'A - mean[place], 0.0)',
        'A, 0.0)',
    ),
    Mutation(
        "a prompt's common level in everybody's way",
        f"{ANALYSIS}/test_significance.py::test_a_prompt_of_equal_advantages_tells_nothing_and_is_in_nobodys_way",
        'analysis/permutation_test.py', 'torch.where(informative[place] & moves, A - mean[place], 0.0), informative',
        'A, informative',
    ),
    Mutation(
        'rounding taken for a finding',
        f"{ANALYSIS}/test_significance.py::test_what_is_the_same_for_all_permutations_is_not_taken_for_a_finding",
        'analysis/permutation_test.py', 'slack = ROUNDING * sizes.sum(1, keepdim=True) * A.abs().max()',
        'slack = 0.0 * sizes.sum(1, keepdim=True)',
    ),
    Mutation(
        'least of the whole batch',
        f"{ANALYSIS}/test_significance.py::test_p_is_a_share_of_permutations",
        'analysis/permutation_test.py', 'least[cells == g] = (sizes >=',
        'least[cells == g] = (size >=',
    ),
]  # fmt: skip
