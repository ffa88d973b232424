"""What a plan's analyses keep, and what tables say of them."""

from tests.mutants import Mutation

MUTATIONS = [
    Mutation(
        "a narrow terminal loses the texts of a table",
        "tests/study/test_shown.py::test_no_number_and_no_text_is_cut",
        "cli/console.py", "return table if needed <= width or not table.rows else _listed(table)", "return table",
    ),
    Mutation(
        "a plan's parts without the weights",
        'tests/study/test_analyses.py::test_parts_add_up',
        'study/analyses/parts.py', '(K.to(context.dtype) * context.weights.to(context.dtype)).double()',
        'K.double()',
    ),
    Mutation(
        "what is unexplained is all that was done",
        'tests/study/test_analyses.py::test_the_ledger_closes',
        'study/taken.py', 'tree.axpy(-1.0, end, taken), taken',
        'taken, taken',
    ),
    Mutation(
        'flips that drop',
        'tests/study/test_analyses.py::test_a_counterfactual_is_the_step_that_would_have_been_taken',
        'study/analyses/counterfactuals.py', '[(config.drop, 0.0), (config.flip, -1.0), *scaled]',
        '[(config.drop, -1.0), (config.flip, 0.0), *scaled]',
    ),
    Mutation(
        "U's own arrays under a request's name",
        'tests/study/test_results.py::test_a_request_may_have_any_name_but_one',
        'study/results.py', 'OWN = "update_batch"',
        'OWN = "self"',
    ),
    Mutation(
        'an analysis that was skipped says nothing',
        'tests/study/test_tables.py::test_everything_that_was_asked_is_shown_and_what_was_left_out_says_why',
        'report/analysis_tables.py', '        if analysis.skipped is not None:\n            yield escape(',
        '        if False:\n            yield escape(',
    ),
    Mutation(
        'blue for red',
        'tests/study/test_tables.py::test_tokens_are_coloured_by_their_change',
        'report/tokens.py', '(RAISED if x > 0 else LOWERED)',
        '(LOWERED if x > 0 else RAISED)',
    ),
    Mutation(
        'marks for everybody',
        'tests/study/test_tables.py::test_contributors_that_could_be_chance_are_told_from_those_that_could_not',
        'report/table.py', 'if p is not None and p <= CHANCE:',
        'if p is not None and p >= CHANCE:',
    ),
    Mutation(
        'a p-value where nothing was permuted',
        'tests/study/test_shown.py::test_a_p_value_is_told_only_where_something_was_permuted',
        'report/table.py', 'analysis.skipped is None and any(analysis.facts["informative"])',
        'analysis.skipped is None',
    ),
    Mutation(
        'bars of the ledger over each other',
        "tests/study/test_panels.py::test_bars_of_the_ledger_do_not_cover_each_other",
        'report/panels.py', 'start = np.where(values < 0, down, up)',
        'start = np.zeros(count)',
    ),
    Mutation(
        'guides of the other slopes',
        "tests/study/test_panels.py::test_guides_of_the_sweep_have_the_slopes_of_theory",
        'report/panels.py', '(ends / scales[at]) ** power',
        '(ends / scales[at]) ** (3 - power)',
    ),
    Mutation(
        "tokens' kernels turned",
        "tests/study/test_panels.py::test_cells_of_tokens_carry_their_numbers",
        'report/heatmaps.py', 'values = SMALL * analysis[pair["array"]].astype(float)',
        'values = SMALL * analysis[pair["array"]].astype(float).T',
    ),
    Mutation(
        'counterfactuals against the wrong step',
        "tests/study/test_panels.py::test_counterfactuals_are_sorted_changes_beside_the_mistake_of_a_frozen_preconditioner",
        'report/comparisons.py', '(analysis["frozen"].astype(float) - analysis["exact"])',
        '(analysis["frozen"].astype(float) - analysis["taken"])',
    ),
    Mutation(
        "a cluster's neighbours in its colour",
        "tests/study/test_panels.py::test_clusters_are_drawn_with_all_their_sequences",
        'report/update_panels.py', 'of = labels == cluster',
        'of = labels >= cluster',
    ),
    Mutation(
        'what was left out is drawn',
        "tests/study/test_panels.py::test_what_was_left_out_is_not_drawn",
        'report/gallery.py', 'in result.analyses.items() if analysis.skipped is None]',
        'in result.analyses.items()]',
    ),
    Mutation(
        'mathematics in a text',
        "tests/study/test_panels.py::test_any_text_is_drawn",
        'report/style.py', '.replace("$", r"\\$")',
        '',
    ),
    Mutation(
        "a prompt ends the page's script",
        "tests/report/test_page.py::test_texts_of_users_are_texts",
        'report/page/packing.py', 'for character in "<>&\\u2028\\u2029":',
        'for character in "":',
    ),
    Mutation(
        'the page may fetch what it likes',
        "tests/report/test_page.py::test_only_the_pages_own_scripts_may_run_and_nothing_is_fetched",
        'report/page/document.py', "default-src 'none'; ",
        '',
    ),
    Mutation(
        "the page's measured change is the predicted one",
        "tests/report/test_page.py::test_the_numbers_of_a_study_are_those_of_results_json",
        'report/page/study.py', '"measured": packed(result.realised)',
        '"measured": packed(result.predicted)',
    ),
    Mutation(
        'every ledger closes',
        "tests/report/test_page.py::test_a_ledger_that_does_not_close_comes_first",
        'report/page/verdict.py', 'return bool(np.isfinite(rest) and ',
        'return bool(True or ',
    ),
    Mutation(
        'what was not asked for is not there',
        "tests/report/test_page.py::test_an_analysis_that_was_not_asked_for_says_how_to_ask",
        'report/page/panels.py', 'if not names:',
        'if not names and False:',
    ),
    Mutation(
        'half a sign test',
        "tests/report/test_page_browser.py::test_the_p_of_many_steps_is_that_of_a_sign_test",
        'report/page/app/recurrences.js', 'Math.min(1, 2 * tail)',
        'Math.min(1, tail)',
    ),
    Mutation(
        'most of a change by who did the opposite',
        "tests/report/test_page_browser.py::test_the_overview_sums_identical_sequences_and_who_moved_it_says_whether_that_is_chance",
        'report/page/app/overview.js', 'way = Math.sign(',
        'way = -Math.sign(',
    ),
]  # fmt: skip
