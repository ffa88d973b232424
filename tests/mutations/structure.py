"""The geometry of a kernel, and whether few coordinates dominate it."""

from tests.mutants import Mutation

ANALYSIS = "tests/analysis"
MUTATIONS = [
    Mutation(
        "squares of the factors' sum taken as sums",
        f"{ANALYSIS}/test_health.py::test_squares_are_those_of_dense_gradients",
        'func/handles/reductions.py', 'tile(start, r).square()',
        'tile(start, r).abs()',
    ),
    Mutation(
        'squares without their weights',
        f"{ANALYSIS}/test_health.py::test_squares_are_those_of_dense_gradients",
        'func/handles/reductions.py', 'total[start : start + r] = (w @ tile',
        'total[start : start + r] = (torch.ones_like(w) @ tile',
    ),
    Mutation(
        'rows of a table put back in the wrong place',
        f"{ANALYSIS}/test_health.py::test_squares_of_every_form_of_handle",
        'func/handles/reductions.py', 'total[touched] = ',
        'total[: len(touched)] = ',
    ),
    Mutation(
        'the second tile overwrites the first',
        f"{ANALYSIS}/test_health.py::test_squares_of_every_form_of_handle",
        'func/handles/reductions.py', '(w @ tile(start, r)',
        '(w @ tile(0, r)',
    ),
    Mutation(
        'a whole leaf in one tile',
        f"{ANALYSIS}/test_health.py::test_squares_of_every_form_of_handle",
        'func/handles/reductions.py', 'step = max(1, tile_columns(count(handle), w.dtype.itemsize) // width)',
        'step = shape[0]',
    ),
    Mutation(
        'the trace without P',
        f"{ANALYSIS}/test_health.py::test_shares_are_those_of_sorting",
        'analysis/trace_shares.py', 'carried = diagonal[name].reshape(-1)[rows].double() * squares',
        'carried = squares',
    ),
    Mutation(
        'the largest v taken for the smallest',
        f"{ANALYSIS}/test_health.py::test_shares_are_those_of_sorting",
        'analysis/trace_shares.py', 'key < threshold, key == threshold',
        'key > threshold, key == threshold',
    ),
    Mutation(
        'ties all counted',
        f"{ANALYSIS}/test_health.py::test_equal_second_moments_share_what_they_carry",
        'analysis/trace_shares.py', 'ties.trace * (k - counts[2]) / counts[3]',
        'ties.trace',
    ),
    Mutation(
        'lower digits forgotten',
        f"{ANALYSIS}/test_health.py::test_the_smallest_are_found_over_all_magnitudes",
        'analysis/trace_shares.py', 'return first << 16 | _digit(torch.as_tensor(lower), k - before)[0]',
        'return first << 16',
    ),
    Mutation(
        'minus zero is the largest of all',
        f"{ANALYSIS}/test_health.py::test_the_smallest_are_found_over_all_magnitudes",
        'analysis/trace_shares.py', 'v.float().abs().view',
        'v.float().view',
    ),
    Mutation(
        'second moment not corrected',
        f"{ANALYSIS}/test_health.py::test_below_epsilon_is_by_the_corrected_second_moment",
        'analysis/trace_shares.py', '(v.double() / (1 - state.beta2[name] ** t)).sqrt()',
        'v.double().sqrt()',
    ),
    Mutation(
        'step 0 judged',
        f"{ANALYSIS}/test_health.py::test_before_the_first_step_there_is_no_second_moment_to_judge_by",
        'analysis/trace_shares.py', 'past = any(state.step.values())',
        'past = True',
    ),
    Mutation(
        'no warning',
        f"{ANALYSIS}/test_health.py::test_a_dominated_kernel_is_said_in_numbers",
        'analysis/trace_shares.py', '    if shares.dominated:\n',
        '    if False:\n',
    ),
    Mutation(
        'unseen coordinates do not dominate',
        f"{ANALYSIS}/test_health.py::test_a_dominated_kernel_is_said_in_numbers",
        'analysis/trace_shares.py', 'or (past and unseen.trace > DOMINATED)',
        '',
    ),
    Mutation(
        'v copied whole',
        f"{ANALYSIS}/test_health.py::test_nothing_of_the_size_of_v_is_made",
        'analysis/trace_shares.py', 'flat = leaf.reshape(-1)',
        'flat = leaf.reshape(-1).clone()',
    ),
    Mutation(
        'the kernel not centred',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_principal_components_are_those_of_the_gradients",
        'analysis/structure.py', 'return K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()',
        'return K',
    ),
    Mutation(
        "centred on one side",
        f"{ANALYSIS}/test_structure_of_kernels.py::test_alignment_is_its_definition",
        "analysis/structure.py", "centred = off - rows - rows[:, None] +",
        "centred = off - 2 * rows +",
    ),
    Mutation(
        "an alignment of norms",
        f"{ANALYSIS}/test_structure_of_kernels.py::test_unrelated_features_are_not_aligned",
        "analysis/structure.py", "off = K - torch.diag(K.diagonal())",
        "off = K.clone()",
    ),
    Mutation(
        "fewer than four sequences aligned",
        f"{ANALYSIS}/test_structure_of_kernels.py::test_alignment_of_what_has_no_geometry",
        "analysis/structure.py", "    if len(one) < 4:\n        return None\n",
        "",
    ),
    Mutation(
        'eigenvectors for scores',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_principal_components_of_features",
        'analysis/structure.py', 'vectors * largest.sign() * values.sqrt()',
        'vectors * largest.sign()',
    ),
    Mutation(
        'shares of the components shown',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_principal_components_of_features",
        'analysis/structure.py', 'trace = centred.diagonal().sum().clamp_min(0)',
        'trace = values.sum()',
    ),
    Mutation(
        'signs left to the machine',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_principal_components_of_features",
        'analysis/structure.py', 'vectors * largest.sign() *',
        '-vectors * largest.sign() *',
    ),
    Mutation(
        'clusters of lengths',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_clusters_ignore_lengths_and_are_the_same_again",
        'analysis/structure.py', 'K / (norms[:, None] * norms), 0.0)',
        'K, 0.0)',
    ),
    Mutation(
        "distances without the cluster's own term",
        f"{ANALYSIS}/test_structure_of_kernels.py::test_clusters_are_as_tight_as_any",
        'analysis/structure.py', '- 2 * to_mean + (members * to_mean).sum(0))',
        '- 2 * to_mean)',
    ),
    Mutation(
        'the loosest start kept',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_clusters_are_as_tight_as_any",
        'analysis/structure.py', 'labels, left = min(',
        'labels, left = max(',
    ),
    Mutation(
        'an exemplar from elsewhere',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_planted_clusters_are_recovered",
        'analysis/structure.py', '.masked_fill(members == 0, -torch.inf)',
        '.masked_fill(members == 1, -torch.inf)',
    ),
    Mutation(
        'clusters run empty',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_a_cluster_whose_members_all_leave_is_filled_again",
        'analysis/structure.py', 'for empty in [c for c in range(k) if not bool((new == c).any())]:',
        'for empty in range(0):',
    ),
    Mutation(
        'clusters in the order of their seeds',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_planted_clusters_are_recovered",
        'analysis/structure.py', 'labels = torch.tensor(order, device=K.device).argsort()[labels]',
        'labels = labels + 0',
    ),
    Mutation(
        'ranks of equal values by order',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_correlations_are_those_of_scipy",
        'engine/correlation.py', 'return (last - (count.double() + 1) / 2)[place]',
        'return x.argsort().argsort().double()',
    ),
    Mutation(
        'length taken out of one side',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_the_partial_correlation_is_the_textbooks",
        'analysis/structure.py', '_correlation(_residual(x, z), _residual(y, z))',
        '_correlation(_residual(x, z), y)',
    ),
    Mutation(
        'a line through the origin',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_a_pure_effect_of_length_vanishes_when_length_is_taken_out",
        'analysis/structure.py', 'a, c = x - x.mean(), z - z.mean()',
        'a, c = x - x.mean(), z',
    ),
    Mutation(
        'rounding correlates',
        f"{ANALYSIS}/test_structure_of_kernels.py::test_a_pure_effect_of_length_vanishes_when_length_is_taken_out",
        'analysis/structure.py', 'left.norm() > ROUNDING * a.norm()',
        'left.norm() > 0',
    ),
]  # fmt: skip
