"""A step's loss: ratios, penalties, preferences."""

from tests.mutants import Mutation

PLAN, WEIGHTS = "tests/study/losses", "tests/study/test_token_weights.py"
MUTATIONS = [
    Mutation(
        "the ratios left out of U's columns",
        f"{PLAN}/test_steps.py::test_a_step_on_the_loss_is_predicted[ratio]",
        'study/loss_terms.py', '    if terms is None or terms.ratio is None:\n',
        '    if True:\n',
    ),
    Mutation(
        'clipped as if every advantage were positive',
        f"{PLAN}/test_steps.py::test_a_step_on_the_loss_is_predicted[ratio]",
        'study/losses.py', 'signs = _signs(inputs)\n    given = inputs._replace(advantages=signs,',
        'signs = _signs(inputs).abs()\n    given = inputs._replace(advantages=signs,',
    ),
    Mutation(
        "a token's ratio where a sequence's was asked for",
        f"{PLAN}/test_steps.py::test_a_step_on_the_loss_is_predicted[sequences]",
        'study/losses.py', 'loss.delta, "sequence"),\n',
        'loss.delta),\n',
    ),
    Mutation(
        'the penalty left out of the gradient',
        f"{PLAN}/test_steps.py::test_a_step_on_the_loss_is_predicted[kl]",
        'study/prepare.py', 'ascent = tree.add(ascent, part)',
        'pass',
    ),
    Mutation(
        'the penalty of the uncorrected estimator',
        f"{PLAN}/test_steps.py::test_a_step_on_the_loss_is_predicted[kl]",
        'study/losses.py', '(corrected if loss.kl.corrected else',
        '(corrected if not loss.kl.corrected else',
    ),
    Mutation(
        'the penalty is not clipped',
        f"{PLAN}/test_penalty.py::test_a_penalty_has_a_term_of_its_own",
        'study/analyses/context.py', 'P(tree.scale(c, v))',
        'P(v)',
    ),
    Mutation(
        'the penalty left out of the first order',
        f"{PLAN}/test_penalty.py::test_a_penalty_has_a_term_of_its_own",
        'study/loss_terms.py', 'effects["batch"] + sum(part.to(effects["batch"]) for part in beside)',
        'effects["batch"]',
    ),
    Mutation(
        'the ledger without the penalty',
        f"{PLAN}/test_analyses.py::test_analyses_are_of_the_loss[held_out]",
        'study/analyses/ledger.py', 'for part, value in parts_of(known).items()}',
        'for part, value in parts_of(known).items() if part == "advantage"}',
    ),
    Mutation(
        'a counterfactual without the penalty',
        f"{PLAN}/test_analyses.py::test_analyses_are_of_the_loss[held_out]",
        'study/analyses/counterfactuals.py', 'ascent = tree.axpy(factor, v, ascent) if factor else ascent',
        'pass',
    ),
    Mutation(
        'an observable without the penalty',
        f"{PLAN}/test_analyses.py::test_analyses_are_of_the_loss[held_out]",
        'study/analyses/observables.py', '    arrays |= with_parts(arrays, context.workspace.loss)\n',
        '',
    ),
    Mutation(
        "tokens' changes at the checkpoint",
        f"{PLAN}/test_analyses.py::test_analyses_are_of_the_loss[held_out]",
        'study/analyses/tokens.py', 'for q, node in p.nodes]',
        'for q, node in ((1.0, p.params),)]',
    ),
    Mutation(
        "tokens' kernels at the checkpoint",
        f"{PLAN}/test_analyses.py::test_analyses_are_of_the_loss[held_out]",
        'study/analyses/tokens.py', 'spec, p.path, p.step, promised',
        'spec, "start", None, promised',
    ),
    Mutation(
        "tokens' kernels without the ratios",
        f"{PLAN}/test_analyses.py::test_analyses_are_of_the_loss[held_out]",
        'study/analyses/tokens.py', 'loss is not None and context.workspace.loss.ratio is not None:',
        'loss is not None and False:',
    ),
    Mutation(
        'signs are permuted all the same',
        f"{PLAN}/test_analyses.py::test_analyses_are_of_the_loss[held_out]",
        'study/analyses/uncertainty.py', 'shuffled._replace(orders=torch.arange(len(batch)).expand(config.draws, -1))',
        'shuffled',
    ),
    Mutation(
        "U's weighted gradients served as rows of E",
        f"{PLAN}/test_steps.py::test_a_step_on_the_loss_is_predicted[ratio]",
        'study/workspace.py', 'if self.loss is not None and self.loss.ratio is not None:\n            return None',
        'if False:\n            return None',
    ),
    Mutation(
        'an advantage may change its sign',
        f"{PLAN}/test_errors.py::test_advantages_that_change_their_signs_are_refused",
        'study/workspace.py', 'if self.keeps_signs and bool(',
        'if False and bool(',
    ),
    Mutation(
        'a counterfactual may flip',
        f"{PLAN}/test_errors.py::test_advantages_that_change_their_signs_are_refused",
        'study/analyses/counterfactuals.py', '    return workspace.signed(w)\n',
        '    return w\n',
    ),
    Mutation(
        'the lower reward was chosen',
        f"{PLAN}/test_preferences.py::test_a_step_on_preferences_is_predicted",
        'study/preferences.py', 'if rewards[a] > rewards[b] else',
        'if rewards[a] < rewards[b] else',
    ),
    Mutation(
        'margins without the reference',
        f"{PLAN}/test_preferences.py::test_what_a_step_does_to_both_responses_is_readable",
        'study/preferences.py', '(now - reference).sum(1).cpu()',
        'now.sum(1).cpu()',
    ),
    Mutation(
        'E may be of another policy too',
        f"{PLAN}/test_errors.py::test_only_u_may_be_of_another_policy",
        'study/config/requests.py', 'return load_batch(self.path, checkpoint=generator.fingerprint)',
        'return load_batch(self.path)',
    ),
    Mutation(
        'any checkpoint passes for the old policy',
        f"{PLAN}/test_errors.py::test_old_is_the_policy_that_sampled",
        'study/losses.py', 'sampler != fingerprints["old"]:',
        'False:',
    ),
    Mutation(
        "records' log-probabilities at every temperature",
        f"{PLAN}/test_errors.py::test_records_are_no_log_probabilities_of_another_temperature",
        'study/scores.py', '    if policy.temperature != 1:\n',
        '    if False:\n',
    ),
    Mutation(
        'the loss left out of what a workspace is asked',
        f"{PLAN}/test_workspace.py::test_a_workspace_of_another_loss_is_not_served",
        'study/losses.py', '    spec: dict[str, Any] = {"loss": {**settings, "policies": fingerprints}}\n',
        '    spec: dict[str, Any] = {"loss": {"kind": loss.kind}}\n',
    ),
    Mutation(
        'influence read from weighted gradients',
        f"{PLAN}/test_workspace.py::test_a_workspace_keeps_what_the_loss_made",
        'study/questions.py', '    if workspace.loss is not None and workspace.loss.ratio is not None:\n',
        '    if False:\n',
    ),
    Mutation(
        'alignment of other columns',
        f"{PLAN}/test_analyses.py::test_u_itself_is_of_the_losss_columns",
        'study/analyses/structure.py', 'workspace.loss)\n        later',
        'None)\n        later',
    ),
    Mutation(
        'a kept loss forgets its ratios',
        f"{PLAN}/test_workspace.py::test_a_workspace_in_memory_with_a_loss_can_be_written",
        'study/loss_terms.py', 'constants = {name: tensors.get(name) for name in CONSTANTS}',
        'constants = dict.fromkeys(CONSTANTS)',
    ),
    Mutation(
        "token weights of an ascent",
        f"{WEIGHTS}::test_the_step_is_explained_to_the_floor",
        'study/losses.py', '-whole.omega, {"kind": "token_weights"',
        'whole.omega, {"kind": "token_weights"',
    ),
    Mutation(
        "the policy gradient's columns are plain ∇S although sequences are masked",
        f"{PLAN}/test_named.py::test_a_setting_of_a_loss_is_needed_and_is_enough[off_policy_mask]",
        'study/losses.py', '"policy_gradient" and not (loss.correction or loss.off_policy_mask or',
        '"policy_gradient" and not (loss.correction or',
    ),
    Mutation(
        "a correction left out",
        f"{PLAN}/test_named.py::test_a_setting_of_a_loss_is_needed_and_is_enough[correction]",
        'study/losses.py', 'factors.append(make(inputs, importance.level, importance.low, importance.high))',
        'pass',
    ),
    Mutation(
        "tokens of low entropy stay in the loss",
        f"{PLAN}/test_named.py::test_a_step_on_a_named_loss_is_predicted[top_entropy]",
        'study/losses.py', 'factors.append(objectives.high_entropy_mask(inputs, loss.top_entropy))',
        'pass',
    ),
    Mutation(
        "the largest ratio left out",
        f"{PLAN}/test_named.py::test_a_setting_of_a_loss_is_needed_and_is_enough[delta]",
        'study/losses.py', '"clipped_ratio": lambda loss, x: clipped_ratio(x, loss.low, loss.high, loss.delta)',
        '"clipped_ratio": lambda loss, x: clipped_ratio(x, loss.low, loss.high)',
    ),
]  # fmt: skip
