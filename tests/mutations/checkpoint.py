"""Files of trainers: whose state it is, how many steps it took, what was trained, and what else the training did."""

from tests.mutants import Mutation

WHOSE, FROZEN = "tests/checkpoint/test_whose.py", "tests/checkpoint/test_frozen.py"
CONDITIONS, REFUSALS = "tests/checkpoint/test_conditions.py", "tests/checkpoint/test_refusals.py"
MUTATIONS = [
    Mutation(
        "moments without a step are of step 0",
        f"{WHOSE}::test_moments_without_a_step_are_never_of_step_zero",
        "checkpoint/steps.py", "if entry and (steps[name] == 0)", "if False and (steps[name] == 0)",
    ),
    Mutation(
        "the group's step is not looked at",
        f"{WHOSE}::test_the_groups_step_counts_in_a_group_of_torch_too",
        "checkpoint/steps.py", "own.get(name, shared or 0) if entry", "own.get(name, 0) if entry",
    ),
    Mutation(
        "each parameter's own step, where a fused Adam counts once",
        f"{WHOSE}::test_a_fused_adam_whose_last_parameter_alone_counts",
        "checkpoint/steps.py", 'counts_once = "bias_correction" in group and', "counts_once = False and",
    ),
    Mutation(
        "RAdam's groups are AdamW's",
        f"{WHOSE}::test_radam_is_told_by_the_name_that_it_lacks",
        "checkpoint/foreign.py", 'if kind != "adam" or "amsgrad" in group', "if True",
    ),
    Mutation(
        "names of groups that AdamW does not have are passed over",
        f"{WHOSE}::test_groups_of_other_optimizers_are_refused_by_name",
        "checkpoint/foreign.py", '*STOCHASTIC, "eps")', '*STOCHASTIC, "eps", key)',
    ),
    Mutation(
        "bitsandbytes' first moment is its second",
        f"{WHOSE}::test_bitsandbytes_moments_in_full_precision_are_read",
        "precond/stored.py", '{"state1": "exp_avg", "state2": "exp_avg_sq"}',
        '{"state2": "exp_avg", "state1": "exp_avg_sq"}',
    ),
    Mutation(
        "parameters are left out in the first way that fits",
        f"{FROZEN}::test_what_may_be_left_out_in_two_ways_is_an_error",
        "checkpoint/order.py", "ways += [early, late]", "ways += [early]",
    ),
    Mutation(
        "what the optimizer does not have stays trainable",
        f"{FROZEN}::test_shapes_tell_what_was_frozen_where_there_is_one_way",
        "checkpoint/loading.py", "leaf.requires_grad_(False)", "leaf.requires_grad_(True)",
    ),
    Mutation(
        "names of no parameter are passed over",
        f"{FROZEN}::test_names_of_no_parameter_freeze_nothing",
        "checkpoint/loading.py", "    if foreign:\n", "    if not own:\n",
    ),
    Mutation(
        "an optimizer that is not read is passed over",
        f"{REFUSALS}::test_optimizer_files_that_are_not_read_are_named",
        "checkpoint/loading.py", "elif optimizer and (unread :=", "elif False and (unread :=",
    ),
    Mutation(
        "an adapter in a folder loses its name",
        f"{REFUSALS}::test_an_adapter_in_a_folder_keeps_its_name_and_its_optimizer",
        "checkpoint/model.py", "adapter_name=name,", 'adapter_name="default",',
    ),
    Mutation(
        "a base that is drawn anew is loaded",
        f"{REFUSALS}::test_adapters_whose_base_is_drawn_anew_are_refused",
        "checkpoint/model.py", "if made.startswith(RANDOM):", "if made in RANDOM:",
    ),
    Mutation(
        "a flattened state's names are cut at the first dot",
        "tests/checkpoint/test_layouts.py::test_the_state_reproduces_the_writers_next_step",
        "checkpoint/contents.py", 'key.partition(".")[2].rpartition(".")', 'key.partition(".")[2].partition(".")',
    ),
    Mutation(
        "an adapter's dropout is not looked at",
        f"{CONDITIONS}::test_an_adapters_dropout_is_told_and_matters",
        "checkpoint/conditions.py", '"adapter_config.json": [*_rates(adapter)]', '"adapter_config.json": []',
    ),
    Mutation(
        "a value that is named like a setting is the setting's",
        f"{CONDITIONS}::test_what_is_listed_of_a_pickle_is_what_the_trainer_had",
        "checkpoint/arguments.py", "argument) if known else OTHER)", "argument if known else None))",
    ),
    Mutation(
        "half precision of moments is not looked at",
        f"{CONDITIONS}::test_pure_half_precision_is_told",
        "checkpoint/conditions.py", "    if w and m:\n", "    if w and not m:\n",
    ),
    Mutation(
        "a loss of the routers is not looked at",
        f"{CONDITIONS}::test_a_loss_of_the_routers_is_told",
        "checkpoint/conditions.py", '("output_router_logits") is True', '("output_router_logits") is None',
    ),
    Mutation(
        "what libraries say to each other reaches the user",
        "tests/checkpoint/test_layouts.py::test_what_libraries_say_to_each_other_does_not_reach_the_user",
        "checkpoint/quiet.py", "for kind in DEPRECATIONS:", "for kind in ():",
    ),
    Mutation(
        "deprecations of the caller's own are kept from the caller",
        "tests/checkpoint/test_layouts.py::test_deprecations_of_the_callers_own_stay",
        "checkpoint/quiet.py", """, module=rf"({'|'.join(LIBRARIES)})(\\.|$)")""", ")",
    ),
]  # fmt: skip
