"""Steps of optimizers in real numbers, as they are stored and as they are executed."""

from tests.mutants import Mutation

OPTIMIZERS = "tests/optimizers"
STEP = f"{OPTIMIZERS}/test_steps.py::test_the_step_is_the_real_optimizers_and_its_parts_add_up"
MUTATIONS = [
    Mutation(
        "a step that maximises goes down",
        STEP,
        "precond/steps.py", "return -1.0 if state.of(name).maximize else 1.0",
        "return 1.0",
    ),
    Mutation(
        "AMSGrad forgets its largest second moment",
        STEP,
        "precond/updates/adaptive_moments.py", "v = torch.maximum(v, past.max_exp_avg_sq)",
        "v = v + 0 * past.max_exp_avg_sq",
    ),
    Mutation(
        "scales of quantised moments beside other blocks",
        f"{OPTIMIZERS}/test_steps.py::test_quantised_moments_step_as_they_mean",
        "precond/stored.py", "scales.repeat_interleave(BLOCK)",
        "scales.repeat(BLOCK)",
    ),
    Mutation(
        "a step from master weights is not rounded",
        f"{OPTIMIZERS}/test_executed.py::test_float32_masters_are_stepped_and_rounded",
        "precond/executed.py", "after.to(theta.dtype).double()",
        "after.double()",
    ),
    Mutation(
        "what cancels is told by its size alone",
        f"{OPTIMIZERS}/test_steps.py::test_cancellation_is_told_beside_a_secant",
        "precond/cancelling.py", "g.abs() < share * absolute[name]",
        "g.abs() < share",
    ),
    Mutation(
        "AMSGrad is recognised as AdamW",
        f"{OPTIMIZERS}/test_recognised.py::test_loading_amsgrad_is_no_plain_adamw",
        "checkpoint/recognising.py", 'and not group.get("amsgrad") and',
        "and",
    ),
]  # fmt: skip
