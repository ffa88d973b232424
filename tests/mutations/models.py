"""Models as people have them."""

from tests.mutants import Mutation

MODELS = "tests/test_as_people_have_them.py"
CERTIFICATES = "tests/test_certificates.py"
TAPS = "tests/test_taps.py"
MUTATIONS = [
    Mutation(
        "gradients of half precision, taken whole",
        "tests/test_walk.py::test_half_precision_is_never_computed_with_whole",
        "engine/problem.py", "if is_half(problem.params):", "if False:",
    ),
    Mutation(
        "a listener that copies nothing and hears nothing of an overwritten output",
        f"{TAPS}::test_overwritten_outputs_have_the_gradients_of_backward_by_vmap_too[relu in place]",
        "func/capture.py", "return listen(out, use), 0",
        "return (out.register_hook(lambda g: setattr(use, 'cotangent', g)), out.view_as(out))[1], 0",
    ),
    Mutation(
        "logits of virtual tokens taken for the prompt's",
        f"{MODELS}::test_virtual_tokens_in_front_do_not_shift_the_logits[p-tuning]",
        "func/functional.py", "return z[:, -t:]", "return z[:, :t]",
    ),
    Mutation(
        "the balancing loss goes on being computed",
        f"{MODELS}::test_the_balancing_loss_of_experts_is_no_part_of_log_pi",
        "func/functional.py", "config.output_router_logits = False", "pass",
    ),
    Mutation(
        "padding rows get their derivative in training too",
        f"{MODELS}::test_a_padding_row_inside_of_a_wrapper_is_withheld_as_training_withholds_it[tokens]",
        "func/padding.py", "if padding_idx is None or not withheld:", "if True:",
    ),
    Mutation(
        "only bare embeddings have padding rows",
        f"{MODELS}::test_a_padding_row_inside_of_a_wrapper_is_withheld_as_training_withholds_it[lora]",
        "func/padding.py", 'for inner in part.modules()]', 'for inner in [part]]',
    ),
    Mutation(
        "a dynamic rotation stays what the longest made it",
        f"{MODELS}::test_positions_that_the_longest_sequence_scales_are_each_sequence_s_own[dynamic]",
        "func/functional.py", "unchanged(self.module if self.own_width else None)", "unchanged(None)",
    ),
    Mutation(
        "sequences of all lengths share a microbatch",
        f"{CERTIFICATES}::test_or_every_sequence_gets_its_own_width",
        "func/microbatch.py", "if alike is not None and alike[j - 1] != alike[i]:", "if False:",
    ),
    Mutation(
        "what cannot be followed is no reason for a slower way",
        f"{MODELS}::test_where_vmap_cannot_follow_sequences_are_differentiated_one_at_a_time[branch]",
        "func/rows.py", "return ONE_AT_A_TIME", "raise error",
    ),
    Mutation(
        "the second derivative by reverse passes is the first's",
        f"{MODELS}::test_where_forward_mode_cannot_follow_reverse_passes_do[own backward]",
        "func/directional.py", "return ByReverse(value, _slope(bent.total, weights), bent.size)",
        "return ByReverse(value, _slope(along.total, weights), bent.size)",
    ),
    Mutation(
        "no_grad is not looked through",
        f"{CERTIFICATES}::test_no_grad_is_looked_through_too",
        "func/seen_through.py", "if func is torch._C._set_grad_enabled:", "if False:",
    ),
    Mutation(
        "ones as weights of the rows",
        f"{CERTIFICATES}::test_ones_would_miss_what_random_weights_find",
        "func/certificate.py", "w = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)",
        "w = torch.ones(n, dtype=torch.float64)",
    ),
    Mutation(
        "a plain pass asks nobody whether every path is known",
        f"{TAPS}::test_any_other_use_is_left_to_vmap[beside-3]",
        "func/taps.py", "known = explained(found) == frozenset(params)", "known = True",
    ),
    Mutation(
        "sequences are taken to be apart",
        f"{TAPS}::test_any_other_use_is_left_to_vmap[times_first-3]",
        "func/taps.py", "and not _apart(found, traced)", "and False",
    ),
    Mutation(
        "sequences are told apart between equal ones",
        f"{TAPS}::test_any_other_use_is_left_to_vmap[coupled-3]",
        "func/taps.py", "first.flip(1) if leaf.ndim > 1 else first", "first",
    ),
    Mutation(
        "rows that 2 and 3 divide belong to sequences",
        f"{TAPS}::test_the_layout_of_rows_is_found_out_without_values[looked_up_in_a_row]",
        "func/taps.py", "if leading != (1, 1) and 3 * leading[0] != 2 * leading[1]:", "if False:",
    ),
    Mutation(
        "a parameter may stand where data stand",
        f"{TAPS}::test_any_other_use_is_left_to_vmap[of_a_parameter-3]",
        "func/taps.py", "if not watched or given != len(watched):", "if not watched:",
    ),
    Mutation(
        "a norm's own constant is forgotten",
        f"{TAPS}::test_a_known_use_has_the_gradients_of_a_loop[3-layer_norm]",
        "func/known.py", "None, None, eps))", "None, None))",
    ),
    Mutation(
        "a gradient that does not add up is believed",
        f"{TAPS}::test_a_wrong_gradient_is_taken_by_vmap",
        "func/certified.py", "return plan._replace(batched=False)", "return plan",
    ),
]  # fmt: skip
