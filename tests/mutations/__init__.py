"""Deliberate mistakes in what is tested as a user meets it; each names the test that must fail."""

from tests.mutations import analysis, losses, report, study

MUTATIONS = [*study.MUTATIONS, *analysis.MUTATIONS, *losses.MUTATIONS, *report.MUTATIONS]
