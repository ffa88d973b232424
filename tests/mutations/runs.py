"""Replays, restored states, accounts of recordings, and studies of a recorded step."""

from tests.mutants import Mutation

REPLAY, ACCOUNTS, STEP = (
    "tests/record/test_replay.py",
    "tests/study/test_accounts.py",
    "tests/study/test_recorded_step.py",
)
MUTATIONS = [
    Mutation(
        "a replay without the recorded clipping factor",
        f"{REPLAY}::test_a_replay_equals_the_run",
        "record/replaying.py",
        "    c = step.clip\n",
        "    c = 1.0\n",
    ),
    Mutation(
        "a replay with the settings of the snapshot's step",
        f"{REPLAY}::test_a_real_run_is_replayed[dapo]",
        "record/replaying.py",
        "groups |= {name: {**groups[name], **plain}",
        "groups |= {name: {**plain, **groups[name]}",
    ),
    Mutation(
        "a dropped sequence stays in the loss",
        f"{REPLAY}::test_what_is_dropped_is_as_if_it_had_no_weight_in_the_loss",
        "record/replaying.py",
        "a = torch.tensor(factors, device=self.device)",
        "a = torch.ones(len(factors), device=self.device)",
    ),
    Mutation(
        "a changed gradient is not clipped anew",
        f"{REPLAY}::test_what_is_dropped_is_as_if_it_had_no_weight_in_the_loss",
        "record/replaying.py",
        "c = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))",
        "c = step.clip",
    ),
    Mutation(
        "any base model is taken",
        f"{REPLAY}::test_a_base_model_that_is_another_is_refused",
        "record/policy.py",
        "if not abs(now - norm) <= SAME_NORM * max(norm, 1e-30):",
        "if False:",
    ),
    Mutation(
        "states within a block are never deleted",
        f"{REPLAY}::test_states_are_restored_within_a_grant[3]",
        "record/restored.py",
        "            for number in range(start + 1, stop) if k > 1 else ():\n                self._forget(number)\n",
        "",
    ),
    Mutation(
        "a grid of states that is one off",
        f"{REPLAY}::test_states_are_restored_within_a_grant[4]",
        "record/restored.py",
        "        wanted = range(first.number + k, end, k)\n",
        "        wanted = range(first.number + k, end - 1, k)\n",
    ),
    Mutation(
        "a gap in a recording is stepped over",
        f"{REPLAY}::test_a_missing_step_is_named",
        "record/reading.py",
        "        if lacking or not steps:\n",
        "        if not steps:\n",
    ),
]
REAL = [
    Mutation(
        "the optimizer's state of the step after",
        f"{ACCOUNTS}::test_the_account_of_a_real_run_adds_up[dapo]",
        "record/run_steps.py",
        "exact_state(settled(state, self.recording, step), state.params)",
        "exact_state(settled(after, self.recording, step), state.params)",
    ),
    Mutation(
        "what the training executed is not told from the exact step",
        f"{ACCOUNTS}::test_the_account_of_a_real_run_adds_up[bf16 autocast]",
        "record/run_steps.py",
        "executed=self._executed(state, step) if wanted else None,",
        "executed=None,",
    ),
    Mutation(
        "a sweep that was stopped forgets a step",
        f"{ACCOUNTS}::test_an_account_that_was_stopped_goes_on",
        "study/accounts/stopped.py",
        'return Sweep(done, about["taken"], rows, columns, tensors["after"])',
        'return Sweep(done, about["taken"] + 1, rows, columns, tensors["after"])',
    ),
    Mutation(
        "another request's sweep is gone on with",
        f"{ACCOUNTS}::test_a_stopped_sweep_of_another_request_is_not_taken",
        "study/accounts/stopped.py",
        'if about["request"] != self.request or checksum',
        "if checksum",
    ),
    Mutation(
        "prompts of one step only",
        f"{ACCOUNTS}::test_questions",
        "study/accounts/results.py",
        'totals[row["prompt_id"]] = totals.get(row["prompt_id"], 0.0) + value',
        'totals[row["prompt_id"]] = value',
    ),
    Mutation(
        "shares of reward functions without their groups' means",
        f"{ACCOUNTS}::test_questions",
        "analysis/runs.py",
        "    apart = weighed - (sums / place.bincount()[:, None])[place]\n",
        "    apart = weighed + 0.1\n",
    ),
    Mutation(
        "a loss with a KL penalty is said to be of rewards alone",
        f"{ACCOUNTS}::test_what_cannot_be_told_says_why",
        "study/accounts/assembly.py",
        'return ", ".join(f"{name}={value}" for name, value in given.items() if value) or None',
        "return None",
    ),
    Mutation(
        "old gradients do not decay",
        f"{ACCOUNTS}::test_momentum_by_the_age_of_its_gradients",
        "record/run_steps.py",
        "state.beta1[name] ** since[name] * leaf",
        "leaf",
    ),
    Mutation(
        "a penalty's share without the ratio that weighs it",
        f"{ACCOUNTS}::test_the_rest_of_a_loss_with_a_penalty_is_of_advantages_alone[cispo, KL, two inner epochs]",
        "record/trl.py",
        "        return grad - own\n",
        "        return grad\n",
    ),
    Mutation(
        "the columns of a loss's parts in the order of its sequences",
        f"{ACCOUNTS}::test_parts_of_the_loss_are_told_apart",
        "study/accounts/assembly.py",
        "reshape(len(each), len(parts), n)\n",
        "reshape(len(each), n, len(parts)).mT\n",
    ),
    Mutation(
        "a recorded step without its clipping factor",
        f"{STEP}::test_the_step_explained_is_the_step_that_was_taken[dapo]",
        "study/from_recording.py",
        '        fills["clip"] = step.clip\n',
        '        fills["clip"] = 1.0\n',
    ),
    Mutation(
        "the snapshot before a step is taken for the one after it",
        f"{STEP}::test_the_step_explained_is_the_step_that_was_taken[lora]",
        "study/from_recording.py",
        'fills["after"] = plan.checkpoint.model_copy(update={"step": number + 1})',
        'fills["after"] = plan.checkpoint.model_copy(update={"step": number + 2})',
    ),
]
