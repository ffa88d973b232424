"""What a plan's analyses keep, and what tables say of them."""

from tests.mutants import Mutation

MUTATIONS = [
    Mutation(
        "a plan's parts without the weights",
        'tests/study/test_analyses.py::test_parts_add_up',
        'study/analyses/takers.py', 'C = (K * at.weights.to(K)).double()\n                _into',
        'C = K.double()\n                _into',
    ),
    Mutation(
        'flips that drop',
        'tests/study/test_analyses.py::test_a_counterfactual_is_the_step_that_would_have_been_taken',
        'study/analyses/effects.py', '[(asked.drop, 0.0), (asked.flip, -1.0), *scaled]',
        '[(asked.drop, -1.0), (asked.flip, 0.0), *scaled]',
    ),
    Mutation(
        "U's own arrays under a request's name",
        'tests/study/test_results.py::test_a_request_may_have_any_name_but_one',
        'study/results.py', 'OWN = "update_batch"',
        'OWN = "self"',
    ),
    Mutation(
        'a finding that was left out says nothing',
        'tests/study/test_tables.py::test_everything_that_was_asked_is_shown_and_what_was_left_out_says_why',
        'report/accounts.py', '        if "left_out" in finding.facts:\n            yield escape(',
        '        if "left" in finding.facts:\n            yield escape(',
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
        'report/table.py', 'if sure["top_p"][row, k] <= CHANCE:',
        'if sure["top_p"][row, k] >= CHANCE:',
    ),
]  # fmt: skip
