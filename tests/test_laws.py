"""Every law, over random models, lengths, temperatures, microbatches and seeds."""

import pytest
from hypothesis import given

import fkernel
from tests.cases import Case, cases
from tests.laws import LAWS


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@given(case=cases)
def test_law(law, case: Case):
    assert law(fkernel, case) is None
