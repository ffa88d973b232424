"""Several processes: agreement, failure, exchange of rows."""

from tests.mutants import Mutation

FAILURES = "tests/distributed/test_failures.py"
COST = "tests/distributed/test_cost.py::test_ranks_send_the_bytes_that_are_predicted"
SAME = "tests/distributed/test_same_numbers.py::test_any_number_of_ranks_gives_the_same_on_each[few-4]"
SHARDS = (
    "tests/distributed/test_same_numbers.py::"
    "test_what_does_not_go_with_shards_is_refused_by_name_and_the_rest_is_certified_on_every_rank"
)
PLAN = "tests/distributed/test_plan_in_shards.py::"
IN_SHARDS = f"{PLAN}test_a_plan_in_shards_on_two_ranks_gives_the_results_of_one_process"
REFUSED = f"{PLAN}test_what_needs_a_whole_model_is_refused_by_its_key_before_anything_is_read"
MUTATIONS = [
    Mutation(
        "a plan in shards clips by one shard's norm",
        IN_SHARDS,
        "engine/step_on_shards.py",
        "        return clipped_shards(ascent, max_norm, params.group, clip)",
        "        return clip_gradient(ascent, max_norm, clip=clip)",
    ),
    Mutation(
        "the audit of a plan in shards is of one rank's coordinates",
        IN_SHARDS,
        "study/taken.py",
        "    return params.summed(sums.to(next(iter(params.values())).device)).cpu()",
        "    return sums",
    ),
    Mutation(
        "the state's certificate is of one rank's coordinates",
        IN_SHARDS,
        "engine/state_certificate.py",
        "(params.summed(squares) if isinstance(params, ShardedTree) else squares)",
        "squares",
    ),
    Mutation(
        "a checkpoint in shards has a fingerprint of one rank's rows",
        IN_SHARDS,
        "distributed/sharded.py",
        "            yield name, gather_tree(self.group, {name: self.shards[name]}, self.shapes)[name]",
        "            yield name, self.shards[name]",
    ),
    Mutation(
        "a plan in shards asks for what needs a whole model",
        f"{REFUSED}[analyses.tokens: ]",
        "study/in_shards.py",
        "            if name not in ANALYSES and getattr(analyses, name):",
        "            if name not in ANALYSES and not analyses:",
    ),
    Mutation(
        "a rank that differs is not noticed",
        f"{FAILURES}::test_ranks_that_disagree_raise_before_anything_is_exchanged",
        "distributed/agreement.py",
        "if not torch.equal(every[rank], every[0])",
        "if rank < 0",
    ),
    Mutation(
        "an error that stays on its rank",
        f"{FAILURES}::test_an_error_on_one_rank_is_one_error_on_all",
        "distributed/agreement.py",
        "        failures += 1\n",
        "",
    ),
    Mutation(
        "a hang is waited for",
        f"{FAILURES}::test_a_rank_that_hangs_stops_all[sleep-hangs]",
        "distributed/heartbeat.py",
        "for rank in self.missing(size) if now",
        "for rank in () if now",
    ),
    Mutation(
        "a long computation is called a hang",
        f"{FAILURES}::test_a_rank_that_computes_for_long_is_waited_for",
        "distributed/heartbeat.py",
        "beat.seconds > self._moved[rank][1].seconds + IDLE",
        "False",
    ),
    Mutation(
        "shards dealt otherwise than the preconditioner's",
        SAME,
        "distributed/exchange.py",
        "    return slice(min(rank * step, length), min((rank + 1) * step, length))",
        "    return slice(min((size - 1 - rank) * step, length), min((size - rank) * step, length))",
    ),
    Mutation(
        "a rank's own products taken for all",
        SAME,
        "engine/over_ranks.py",
        "*pytree.tree_unflatten(all_sum(group, leaves), spec)",
        "*block.sums",
    ),
    Mutation(
        "every rank computes the same share",
        SAME,
        "engine/sums.py",
        "else side.every(group.size, group.rank)",
        "else side.every(group.size, 0)",
    ),
    Mutation(
        "different parameters are not noticed",
        "tests/distributed/test_same_numbers.py::test_ranks_that_were_given_different_things_compute_nothing[parameters]",
        "engine/over_ranks.py",
        ".sum(dtype=torch.int64)) if leaf.numel() else 0",
        ".sum(dtype=torch.int64)) * 0",
    ),
    Mutation(
        "adjoints along a rank's own shard alone",
        "tests/distributed/test_account.py::test_any_number_of_ranks_gives_the_same_account[2-options1-False-None]",
        "engine/adjoint.py",
        'over_all(products.whole("x", "v"), self.passes.group)',
        'products.whole("x", "v")',
    ),
    Mutation(
        "an account in shards forgets the weights of its path",
        "tests/distributed/test_account.py::test_any_number_of_ranks_gives_the_same_account[4-options2-True-shards]",
        "engine/layerwise_over_ranks.py",
        "weight=q, every=how.every",
        "every=how.every",
    ),
    Mutation(
        "a sharded gradient clipped by its own norm",
        "tests/distributed/test_same_numbers.py::test_a_step_from_shards_of_the_optimizers_state_is_the_step[2]",
        "engine/step_on_shards.py",
        "    (total,) = all_sum(group, [tree.dot(shards, shards)])",
        "    total = tree.dot(shards, shards)",
    ),
    Mutation(
        "blocks of other ranks' sequences at one rank's columns",
        "tests/distributed/test_same_numbers.py::test_all_products_by_every_strategy_are_those_of_one_process",
        "engine/layerwise_over_ranks.py",
        "yield slice(base + start, base + start + n)",
        "yield slice(y.starts[0] + start, y.starts[0] + start + n)",
    ),
    Mutation(
        "a path's node without its step, where θ is in shards",
        SAME,
        "func/inputs/source.py",
        "_moved(params.shards[name], direction.get(name), s)",
        "params.shards[name]",
    ),
    Mutation(
        "rows of a table that another rank asked for",
        SAME,
        "distributed/exchange.py",
        "ids.to(shard.device) - shares[group.rank].start",
        "(ids.to(shard.device) - shares[group.rank].start).flip(0)",
    ),
    Mutation(
        "a sequence of another rank's counted twice",
        SAME,
        "engine/sums_in_shards.py",
        "mine = w[own.rows] if own.counts else torch.zeros_like(w[own.rows])",
        "mine = w[own.rows]",
    ),
    Mutation(
        "a vector's shard of one rank's sequences",
        SAME,
        "engine/sums_in_shards.py",
        "each.sum(0)",
        "each[0]",
    ),
    Mutation(
        "the first rows of a chunk for those of a shard",
        "tests/distributed/test_load_shards.py::test_shards_are_slices_of_the_whole_on_any_number_of_ranks",
        "checkpoint/distributed.py",
        "value = value[first - start[0] : last - start[0]]",
        "value = value[: last - first]",
    ),
    Mutation(
        "parameters in shards that are not certified",
        SHARDS,
        "func/layers/cutting.py",
        "        _probe(f, cut, params, pair)\n",
        "        _ = params if type(params) is not dict else _probe(f, cut, params, pair)\n",
    ),
    Mutation(
        "a derivative along a step of one rank's shard",
        SHARDS,
        "func/trust/directional.py",
        "params.summed(every) if isinstance(params, ShardedTree) else every",
        "every",
    ),
    Mutation(
        "another parameter gathered for the way back",
        SHARDS,
        "func/inputs/leaves.py",
        "        whole = self.source([kept.name])[kept.name]\n",
        "        whole = 2.0 * self.source([kept.name])[kept.name]\n",
    ),
    Mutation(
        "held sequences that are exchanged later overwrite the first",
        "tests/distributed/test_cost.py::test_products_are_the_same_where_sequences_are_exchanged_one_by_one",
        "engine/layerwise_over_ranks.py",
        "held[name][start + first : start + first + n] = part",
        "held[name][start : start + n] = part",
    ),
    Mutation(
        "an operation's result that holds itself",
        "tests/distributed/test_cost.py::test_a_pass_over_parameters_in_shards_is_let_go",
        "func/inputs/leaves.py",
        "return tensor.detach()",
        "return tensor",
    ),
    Mutation(
        "phases of a step whose memory adds up",
        "tests/distributed/test_cost.py::test_tensors_of_a_rank_take_the_bytes_that_are_predicted[2-True]",
        "engine/planning/ranks_cost.py",
        "{**shards, **_largest(phases)}",
        "{**shards, **phases[0], **phases[1], **phases[2]}",
    ),
    Mutation(
        "a gathered vector counted as a summed one",
        f"{COST}[2]",
        "engine/planning/ranks_cost.py",
        '"vectors": 3.0 * P * b * away',
        '"vectors": 4.0 * P * b * away',
    ),
    Mutation(
        "parameters in shards that are gathered for each difference along a step",
        f"{COST}_of_parameters_in_shards[2-8-4-12-True]",
        "engine/step.py",
        "values_of_step(θ, E, total))",
        "None)",
    ),
    Mutation(
        "parameters in shards that are gathered for every thousand tokens",
        f"{COST}_of_parameters_in_shards[2-64-2-40-True]",
        "engine/step.py",
        "strategy.every, together)",
        "strategy.every)",
    ),
    Mutation(
        "a tied table that a plain pass is said to gather once",
        f"{COST}_of_parameters_in_shards[2-8-4-12-True]",
        "engine/planning/ranks_cost.py",
        "load.size + (walk.head if walk.tied else 0)",
        "load.size",
    ),
    Mutation(
        "differences on one side of a step",
        "tests/distributed/test_same_numbers.py::"
        "test_differences_along_a_step_that_are_gathered_once_are_those_of_one_process",
        "func/inputs/source.py",
        "_moved(*here[name], s)",
        "_moved(*here[name], abs(s))",
    ),
    Mutation(
        "ranks that keep their shards of a sweep in one place",
        "tests/study/test_accounts.py::test_two_ranks_give_the_account_of_one_process_and_go_on_where_they_stopped",
        "study/accounts/stopped.py",
        'f"{name}-{group.rank}-of-{group.size}"',
        'f"{name}-of-{group.size}"',
    ),
    Mutation(
        "a stopped rank hears nothing",
        "tests/distributed/test_run_on_ranks.py::test_a_rank_that_is_stopped_stops_the_run_with_one_line",
        "distributed/launcher.py",
        'if state == "T"',
        'if state == "t"',
    ),
]
