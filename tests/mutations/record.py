"""The recorder: its loops, its trainers, its processes."""

from tests.mutants import Mutation

LOOP = "tests/record/test_loop.py"
WRONG = "tests/record/test_wrong_records.py"
SUPERVISED = "tests/record/test_supervised.py"
PREFERENCE = "tests/record/test_preference.py"
RANKS = "tests/record/test_ranks.py"
LIVE = "tests/record/test_live.py"
MUTATIONS = [
    Mutation(
        "a probe's parts are told where the step begins",
        f"{LIVE}::test_what_happened_is_the_sum_of_the_parts_and_the_remainder",
        "record/live.py",
        "effects_along(self._f, before, self._E, delta, vectors)",
        'effects_along(self._f, before, self._E, delta, vectors, path="start")',
    ),
    Mutation(
        "what was remembered is told as the step's own",
        f"{LIVE}::test_the_parts_are_those_of_the_steps_account",
        "record/live.py",
        "zip(PARTS, (step.batch, step.momentum, step.decay), strict=True)",
        "zip(PARTS, (step.momentum, step.batch, step.decay), strict=True)",
    ),
    Mutation(
        "probes are told at the steps between",
        f"{LIVE}::test_what_is_told_stands_in_the_steps_facts",
        "record/live.py",
        "return number % self.every == 0",
        "return number % self.every != 0",
    ),
    Mutation(
        "the norm of a large gradient is added up one by one",
        "tests/record/test_loop.py::test_norms_of_large_gradients_are_exact",
        "record/gradients.py",
        "ROW = 1 << 14",
        "ROW = 1 << 30",
    ),
    Mutation(
        "the loss's scale is left in the weights",
        f"{LOOP}::test_the_scale_is_divided_out",
        "record/tapping.py",
        "last_columns(leaf.cpu(), t) / scale for",
        "last_columns(leaf.cpu(), t) for",
    ),
    Mutation(
        "log-probabilities are of the first tokens, not the last",
        f"{LOOP}::test_several_backward_passes_through_one_tap_add_up",
        "record/layout.py",
        "(width - values.shape[1], 0)",
        "(0, width - values.shape[1])",
    ),
    Mutation(
        "of several backward passes the last is kept",
        f"{LOOP}::test_several_backward_passes_through_one_tap_add_up",
        "record/tapping.py",
        "grad.detach().clone() if before is None else before + grad.detach()",
        "grad.detach().clone()",
    ),
    Mutation(
        "the gradient is not checked",
        f"{WRONG}::test_a_gradient_beside_the_tap_is_told",
        "record/recorder.py",
        "if (due or not self._checked) and not half:",
        "if False:",
    ),
    Mutation(
        "a gradient of the same direction passes, whatever its size",
        f"{WRONG}::test_the_same_gradient_twice_is_told",
        "record/opened.py",
        "elif abs(self._check.norm - whole) > repeater.tolerance * max(whole, 1e-30):",
        "elif False:",
    ),
    Mutation(
        "the clipping factor upside down",
        f"{LOOP}::test_norm_clip_and_settings",
        "record/opened.py",
        "clip = norm_of(self._seen) / (norm_of(own) or 1.0) if whole else 1.0",
        "clip = norm_of(own) / (norm_of(self._seen) or 1.0) if whole else 1.0",
    ),
    Mutation(
        "a repeated step is taken for the recorded one",
        f"{LOOP}::test_a_run_that_goes_another_way_is_no_silent_overwrite",
        "record/resuming.py",
        "differs = _difference(before, passes, facts, microbatches)",
        "differs = None",
    ),
    Mutation(
        "a directory with steps is begun again",
        f"{LOOP}::test_a_resumed_run_must_say_where_it_is",
        "record/recorder.py",
        "self._ranks.agree(lambda: check_empty(self.directory))",
        "pass",
    ),
    Mutation(
        "tokens left out of the mask may have a weight",
        f"{WRONG}::test_a_loss_outside_of_the_mask_is_told",
        "record/tapping.py",
        "if bool(outside.any()):",
        "if False:",
    ),
]
TRAINERS = [
    Mutation(
        "what is told takes the trainer's own log for done",
        f"{LIVE}::test_a_grpo_run_logs_them_beside_its_reward",
        "record/trainers.py",
        "        trainer.control.should_log = due\n",
        "",
    ),
    Mutation(
        "a supervised loss is a mean over each pass",
        f"{SUPERVISED}::test_the_weights_of_a_mean_over_the_step_are_one_number",
        "record/supervised.py",
        "n = mask.sum() if given is None else given",
        "n = mask.sum()",
    ),
    Mutation(
        "what a loss is scaled by is forgotten",
        f"{RANKS}::test_supervised_in_two_processes",
        "record/supervised.py",
        "tap.hear(-(grad / n) * mask)",
        "tap.hear(-mask / n)",
    ),
    Mutation(
        "tokens without a label have a weight",
        f"{SUPERVISED}::test_holes_between_answers_have_no_weight",
        "record/supervised.py",
        "log_probs.register_hook(lambda grad: tap.hear(grad * mask))",
        "log_probs.register_hook(lambda grad: tap.hear(grad))",
    ),
    Mutation(
        "any loss of the model is believed",
        f"{SUPERVISED}::test_a_loss_that_is_another_function_is_refused",
        "record/supervised.py",
        "if apart > SAME * max(abs(float(expected)), 1.0):",
        "if False:",
    ),
    Mutation(
        "the first token is of the response",
        f"{SUPERVISED}::test_the_weights_of_a_mean_over_the_step_are_one_number",
        "record/supervised.py",
        "response[:, 0] = False",
        "response[:, 0] = True",
    ),
    Mutation(
        "a token that is predicted from padding is recorded",
        f"{SUPERVISED}::test_rows_that_are_not_one_sequence_are_refused[changes3-is padded on its left]",
        "record/supervised.py",
        "if bool(unseen.any()):",
        "if False:",
    ),
    Mutation(
        "a rejected response is a pair of its own",
        f"{PREFERENCE}::test_rows_are_both_responses_of_each_pair[dpo]",
        "record/preference.py",
        "pairs = [first + i for i in range(n)] * 2",
        "pairs = [first + i for i in range(b)]",
    ),
    Mutation(
        "the policy's own log-probabilities for the reference's",
        f"{PREFERENCE}::test_the_weights_are_those_of_dpo[True]",
        "record/preference.py",
        "if log_probs is not None and not log_probs.requires_grad:",
        "if log_probs is not None and self._reference is None:",
    ),
    Mutation(
        "a mean over processes is taken for a sum",
        f"{RANKS}::test_supervised_in_two_processes",
        "record/opened.py",
        "self.scale * ranks.size",
        "self.scale",
    ),
    Mutation(
        "the norm of one process's gradient",
        f"{RANKS}::test_supervised_in_two_processes",
        "record/gradients.py",
        "keep = self._keep_all_later if averaged else self._keep",
        "keep = self._keep",
    ),
    Mutation(
        "an error of the second process is kept to itself",
        f"{RANKS}::test_what_one_process_cannot_record_ends_all",
        "record/ranks.py",
        "failed = next((error for _, error in every if error is not None), None) if self.first else None",
        "failed = None",
    ),
    Mutation(
        "every process has the first one's rewards",
        f"{RANKS}::test_grpo_in_two_processes",
        "record/trl.py",
        "**self._reward(first + i)",
        "**self._reward(i)",
    ),
    Mutation(
        "a group of completions ends with its process",
        f"{RANKS}::test_grpo_in_two_processes",
        "record/trl.py",
        "(first + i) // self.trainer.num_generations",
        "i // self.trainer.num_generations",
    ),
    Mutation(
        "a step that a fused optimizer leaves out is recorded",
        "tests/record/test_loop.py::test_a_step_that_a_scaler_leaves_out_is_none[True]",
        "record/optimizers.py",
        "return infinite is not None and bool(infinite)",
        "return False",
    ),
    Mutation(
        "a gradient that is not finite reaches the optimizer",
        "tests/record/test_loop.py::test_a_gradient_that_is_not_finite_is_named",
        "record/opened.py",
        "if not bool(torch.isfinite(norm))]",
        "if norm is None]",
    ),
]
