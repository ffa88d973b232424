"""Models as people have them."""

from tests.mutants import Mutation

MODELS = "tests/test_as_people_have_them.py"
CERTIFICATES = "tests/test_certificates.py"
TAPS = "tests/test_taps.py"
EXPERTS = "tests/test_experts.py"
MUTATIONS = [
    Mutation(
        "gradients of half precision, taken whole",
        "tests/test_walk.py::test_half_precision_is_never_computed_with_whole",
        "engine/problem.py", "if is_half(problem.params):", "if False:",
    ),
    Mutation(
        "an expanded output is taken in place",
        f"{TAPS}::test_a_known_use_has_the_gradients_of_a_loop[3-once]",
        "func/taps/uses.py", "out.clone() if out._is_view() or 0 in out.stride() else out", "out",
    ),
    Mutation(
        "logits of virtual tokens taken for the prompt's",
        f"{MODELS}::test_virtual_tokens_in_front_do_not_shift_the_logits[p-tuning]",
        "func/functional.py", "return z[:, -t:]", "return z[:, :t]",
    ),
    Mutation(
        "whatever has a configuration is called as Hugging Face's are",
        f"{MODELS}::test_a_model_of_ones_own_may_have_a_configuration",
        "func/inputs/called.py", 'return "use_cache" in taken', 'return True or "use_cache" in taken',
    ),
    Mutation(
        "torch's fast kernels, which have no derivative, are taken in eval mode",
        f"{MODELS}::test_torchs_own_transformer_is_differentiated_in_eval_mode",
        "func/functional.py", "set_fastpath_enabled(False)", "set_fastpath_enabled(before)",
    ),
    Mutation(
        "a model that is wrapped for several devices is a raw error",
        f"{MODELS}::test_wrappers_that_torch_func_cannot_follow_are_named",
        "func/inputs/validation.py", '"nn.DataParallel"', '"nothing"',
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
        "func/inputs/microbatch.py", "if alike is not None and alike[j - 1] != alike[i]:", "if False:",
    ),
    Mutation(
        "what cannot be followed is no reason for a slower way",
        f"{MODELS}::test_where_vmap_cannot_follow_sequences_are_differentiated_one_at_a_time[branch]",
        "func/taps/rows.py", "return ONE_AT_A_TIME", "raise error",
    ),
    Mutation(
        "the second derivative by reverse passes is the first's",
        f"{MODELS}::test_where_forward_mode_cannot_follow_reverse_passes_do[own backward]",
        "func/trust/directional.py", "return ByReverse(value, _slope(bent.total, weights), bent.size)",
        "return ByReverse(value, _slope(along.total, weights), bent.size)",
    ),
    Mutation(
        "the derivative along the step is certified by other passes than E's gradients are taken by",
        f"{CERTIFICATES}::test_the_derivative_of_E_looks_through_what_training_holds_constant[unrecorded]",
        "func/trust/comparisons.py", "in row_by_row(value_at, params, direction))",
        "in __import__('fkernel').func.trust.directional.FIRST.forward(value_at, params, direction))",
    ),
    Mutation(
        "no_grad is not looked through",
        f"{CERTIFICATES}::test_no_grad_is_looked_through_too",
        "func/constants.py", "if func is torch._C._set_grad_enabled:", "if False:",
    ),
    Mutation(
        "ones as weights of the rows",
        f"{CERTIFICATES}::test_ones_would_miss_what_random_weights_find",
        "func/trust/comparisons.py",
        "w = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)",
        "w = torch.ones(n, dtype=torch.float64)",
    ),
    Mutation(
        "a plain pass asks nobody whether every path is known",
        f"{TAPS}::test_any_other_use_is_left_to_vmap[in_place-3]",
        "func/taps/batched.py", "known = explained(tape) == frozenset(params)", "known = True",
    ),
    Mutation(
        "sequences are taken to be apart",
        f"{TAPS}::test_any_other_use_is_left_to_vmap[times_first-3]",
        "func/taps/batched.py", "and not _apart(tape, traced)", "and False",
    ),
    Mutation(
        "sequences are told apart between equal ones",
        f"{TAPS}::test_any_other_use_is_left_to_vmap[coupled-3]",
        "func/taps/batched.py", "first.flip(1) if leaf.ndim > 1 else first", "first",
    ),
    Mutation(
        "rows that 2 and 3 divide belong to sequences",
        f"{TAPS}::test_the_layout_of_rows_is_found_out_without_values[of_positions]",
        "func/taps/batched.py", "if a.owners is None and leading != (1, 1) and 3 * leading[0] != 2 * leading[1]:",
        "if False:",
    ),
    Mutation(
        "a parameter may stand where data stand",
        f"{TAPS}::test_a_known_use_has_the_gradients_of_a_loop[3-as_data]",
        "func/taps/listening.py", "if not alone and len(parts) == len(given) and", "if parts or",
    ),
    Mutation(
        "a norm's own constant is forgotten",
        f"{TAPS}::test_a_known_use_has_the_gradients_of_a_loop[3-layer_norm]",
        "func/taps/known.py", "None, None, eps))", "None, None))",
    ),
    Mutation(
        "a gradient that does not add up is believed",
        f"{TAPS}::test_a_wrong_gradient_is_taken_by_vmap",
        "func/trust/checks.py", "return GradientPlan() if plan.batched", "return plan if plan.batched",
    ),
    Mutation(
        "rows that are added elsewhere stay whose they were",
        f"{EXPERTS}::test_rows_are_followed_to_their_sequence[added where they belong]",
        "func/taps/whose.py", '("index_add", "index_put", "index_copy", "scatter")', '("scatter",)',
    ),
    Mutation(
        "rows of several sequences may be combined",
        f"{EXPERTS}::test_rows_of_different_sequences_are_not_combined",
        "func/taps/whose.py", "owners is not own and not torch.equal(owners, own)", "False",
    ),
    Mutation(
        "padding touches an expert",
        f"{EXPERTS}::test_a_row_without_a_gradient_touches_nothing",
        "func/handles/touched.py", "(touch.left != 0).flatten(2).any(2) & (touch.ids >= 0)", "touch.ids >= 0",
    ),
    Mutation(
        "a matrix for each row of data taken for a parameter",
        f"{EXPERTS}::test_every_way_to_compute_experts_has_the_gradients_of_a_loop[gpt-oss-batched_mm]",
        "func/taps/listening.py", 'not (part.layer == "stacked" and made.ids is not None)', "True",
    ),
    Mutation(
        "an operation that mixes sequences is mapped over them",
        f"{TAPS}::test_any_other_use_is_left_to_vmap[mixed-3]",
        "func/taps/listening.py", "if out.shape != whole.shape or not (", "if False and not (",
    ),
    Mutation(
        "experts' rows are weighed as a table's",
        f"{EXPERTS}::test_they_contract_as_dense_gradients_do",
        "func/handles/forms.py", "return (size, *cotangents.shape[2:])", "return (size, cotangents.shape[-1])",
    ),
]  # fmt: skip
