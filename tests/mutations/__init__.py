"""Deliberate mistakes in what is tested as a user meets it; each names the test that must fail.

A tenth of the QUICK ones is tried whenever tests run, another one with every commit. SLOW ones, whose tests make whole
studies and trainings, are tried by `make mutants`, and the first of each kind always, so that they cannot rot.
"""

from tests.mutations import (
    account,
    analysis,
    audit,
    boundary,
    checkpoint,
    crashes,
    dumps,
    engine,
    formats,
    loss_plan,
    models,
    objectives,
    optimizers,
    preconditioners,
    processes,
    record,
    report,
    rollout,
    runs,
    structure,
    study,
    trl,
    uncertainty,
)

QUICK = [
    *study.MUTATIONS,
    *analysis.MUTATIONS,
    *structure.MUTATIONS,
    *uncertainty.MUTATIONS,
    *audit.MUTATIONS,
    *account.MUTATIONS,
    *record.MUTATIONS,
    *dumps.MUTATIONS,
    *runs.MUTATIONS,
    *objectives.MUTATIONS,
    *optimizers.MUTATIONS,
    *preconditioners.MUTATIONS,
    *rollout.MUTATIONS,
    *checkpoint.MUTATIONS,
    *formats.MUTATIONS,
    *models.MUTATIONS,
    *engine.MUTATIONS,
    *processes.MUTATIONS,
    *crashes.MUTATIONS,
    *boundary.MUTATIONS,
]
SLOW = [
    report.MUTATIONS,
    record.TRAINERS,
    dumps.TRAINED,
    runs.REAL,
    loss_plan.MUTATIONS,
    trl.MUTATIONS,
    preconditioners.STUDIES,
]
ALL = [*QUICK, *(mutation for kind in SLOW for mutation in kind)]
