"""A run's account."""

from tests.mutants import Mutation

RUN = "tests/test_run_account.py"
ADDS_UP = f"{RUN}::test_the_columns_add_up_to_the_change_that_happened[own]"
MUTATIONS = [
    Mutation(
        "momentum is forgotten between steps",
        ADDS_UP,
        "engine/adjoint.py",
        "self.rows[name].mul_(step.state.beta1[name] / (1 - step.state.beta1[name]))",
        "self.rows[name].zero_()",
    ),
    Mutation(
        "an adjoint that is not scaled back after its contributions",
        f"{RUN}::test_contributions_are_those_of_the_unrolled_run",
        "engine/adjoint.py",
        "self.rows[name].mul_(step.state.beta1[name] / (1 - step.state.beta1[name]))",
        "self.rows[name].mul_(step.state.beta1[name])",
    ),
    Mutation(
        "contributions before this step's own part is added",
        f"{RUN}::test_momentum_of_a_step_is_what_earlier_sequences_are_credited_with_in_it",
        "engine/adjoint.py",
        "mine.addcmul_(P.d[name].to(J), J)",
        "mine.addcmul_(P.d[name].to(J), J, value=0.0)",
    ),
    Mutation(
        "the gradient is not clipped in the contributions",
        f"{RUN}::test_the_run_of_one_step_is_the_step[midpoint]",
        "engine/adjoint.py",
        "return K * (step.clip * step.weights.to(K))",
        "return K * step.weights.to(K)",
    ),
    Mutation(
        "E's gradients at the start of every step",
        f"{RUN}::test_the_error_falls_with_the_order_of_the_path",
        "engine/adjoint.py",
        "cut, path = _long_cut(side, step.params), passes.path",
        'cut, path = _long_cut(side, step.params), "start"',
    ),
    Mutation(
        "what was in the optimizer before has the wrong sign",
        ADDS_UP,
        "engine/run.py",
        "before, realised = -adjoints.along(start[1])",
        "before, realised = adjoints.along(start[1])",
    ),
    Mutation(
        "U's columns in the order of their lengths",
        f"{RUN}::test_contributions_are_those_of_the_unrolled_run",
        "engine/adjoint.py",
        "K[self.side.order.cpu()[:, None], U.order.cpu()] = products",
        "K[self.side.order.cpu()] = products",
    ),
    Mutation(
        "every part of E is its first",
        f"{RUN}::test_e_in_parts_gives_the_same_account",
        "engine/run.py",
        "take(E, slice(start, start + block))",
        "take(E, slice(0, block))",
    ),
    Mutation(
        "one node of two where sequences are walked",
        f"{RUN}::test_long_sequences_are_walked_layer_by_layer",
        "engine/adjoint.py",
        "sources_of(path, step.params, step.delta):",
        "sources_of(path, step.params, step.delta)[:1]:",
    ),
    Mutation(
        "a moment that was rounded is taken for AdamW's",
        f"{RUN}::test_what_arithmetic_did_has_its_column_and_the_columns_still_add_up",
        "engine/adjoint.py",
        "-self.along(_difference(executed.exp_avg, self._later.exp_avg))",
        "-self.along(_difference(executed.exp_avg, executed.exp_avg))",
    ),
    Mutation(
        "arithmetic counted twice",
        f"{RUN}::test_what_arithmetic_did_has_its_column_and_the_columns_still_add_up",
        "engine/adjoint.py",
        "_difference(executed.delta, step.delta)",
        "_difference(exact.delta, step.delta)",
    ),
    Mutation(
        "momentum of a parameter without gradient decays",
        f"{RUN}::test_a_parameter_that_a_step_does_not_use_keeps_its_momentum_for_later",
        "engine/adjoint.py",
        "used = [name for name in self.rows if g[name] is not None]",
        "used = [*self.rows]",
    ),
    Mutation(
        "the run's last step is held to the end",
        f"{RUN}::test_one_step_is_held_at_a_time",
        "engine/run.py",
        "chain(iter((last,)), again)",
        "chain((last,), again)",
    ),
    Mutation(
        "steps in the run's own order are taken",
        f"{RUN}::test_what_is_no_run_is_refused",
        "engine/adjoint.py",
        "if later.step[name] != t + (g[name] is not None):",
        "if False:",
    ),
    Mutation(
        "a gap between two steps is overlooked",
        f"{RUN}::test_what_is_no_run_is_refused",
        "engine/adjoint.py",
        "if (size := float(tree.norm(gap))) > ",
        "if (size := 0.0) > ",
    ),
    Mutation(
        "an iterator that has run out sweeps again",
        f"{RUN}::test_what_is_no_run_is_refused",
        "engine/run.py",
        "if block < n and again is steps:",
        "if False:",
    ),
]
