"""What of a real GRPO run a prediction may not leave out."""

from tests.mutants import Mutation

TRL = "tests/study/test_trl_run.py"
MUTATIONS = [
    Mutation(
        "the peak's rate for the schedule's",
        f"{TRL}::test_the_step_is_the_one_that_the_trainer_logged",
        'checkpoint/optimizer.py', '"param_names")} | by.settings',
        '"param_names")} | by.settings | {"lr": group["initial_lr"]}',
    ),
    Mutation(
        'what happened, on the weights before',
        f"{TRL}::test_what_happened_is_measured_on_the_weights_that_the_trainer_saved",
        'study/policy.py', 'plan.step.after.load_policy(',
        'plan.checkpoint.load_policy(',
    ),
    Mutation(
        'the step after is executed here, and not read',
        f"{TRL}::test_the_batch_of_another_step_does_not_explain_this_one",
        'study/analyses/context.py',
        'step, θ = self.policy.step or self.step.total, self.policy.params\n        return self.policy.after or (',
        'step, θ = self.step.total, self.policy.params\n        return (',
    ),
    Mutation(
        "padding trained like any other, in a study",
        f"{TRL}::test_padding_inside_of_a_response_is_differentiated_as_the_trainer_did",
        "study/policy.py", "replace(apply, padding_idx=None), func.with_masked_padding_grad(apply)",
        "replace(apply, padding_idx=None), replace(apply, padding_idx=None)",
    ),
]  # fmt: skip
