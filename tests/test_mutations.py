"""Every law fails under a deliberate mistake in the code that it guards, and holds without one."""

import pytest

import fkernel
from fkernel.func.trust.comparisons import NAMES as CERTIFICATES
from tests.cases import EXAMPLES
from tests.laws import LAWS
from tests.mutants import MUTATIONS, load


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_law_holds_without_mutation(law):
    for case in EXAMPLES:
        assert law(fkernel, case) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_law_fails_under_mutation(mutation):
    mutant = load(mutation)
    assert mutant is not fkernel
    # Certificates would take a slower way that is right, or refuse: here it is the law that must see the mistake.
    with mutant.func.skip_certificates(*CERTIFICATES), pytest.raises(AssertionError):
        LAWS[mutation.law](mutant, _first_failing(LAWS[mutation.law], mutant))


def _first_failing(law, mutant):
    """The example on which a mutant fails first (the last one where it fails on none)."""
    for case in EXAMPLES:
        try:
            law(mutant, case)
        except AssertionError:
            return case
    return EXAMPLES[-1]


def test_every_law_has_a_mutation():
    assert {mutation.law for mutation in MUTATIONS} == set(LAWS)


def test_loading_a_mutant_leaves_the_package_alone():
    load(MUTATIONS[0])
    import fkernel as again

    assert again is fkernel
