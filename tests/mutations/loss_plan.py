"""A step's loss: ratios, penalties, preferences."""

from tests.mutants import Mutation

PLAN = "tests/study/losses"
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
        'study/losses.py', 'ratio = weights_of(now, old, signs, mask, loss.low, loss.high) * signs[:, None]',
        'ratio = weights_of(now, old, signs.abs(), mask, loss.low, loss.high) * signs.abs()[:, None]',
    ),
    Mutation(
        "a token's ratio where a sequence's was asked for",
        f"{PLAN}/test_steps.py::test_a_step_on_the_loss_is_predicted[sequences]",
        'study/losses.py', '    per_token = isinstance(loss, ClippedRatioLoss)\n',
        '    per_token = True\n',
    ),
    Mutation(
        'the penalty left out of the gradient',
        f"{PLAN}/test_steps.py::test_a_step_on_the_loss_is_predicted[kl]",
        'study/prepare.py', 'ascent = tree.add(ascent, loss.penalty)',
        'ascent = tree.add(ascent)',
    ),
    Mutation(
        'the penalty of the uncorrected estimator',
        f"{PLAN}/test_steps.py::test_a_step_on_the_loss_is_predicted[kl]",
        'study/losses.py', '        if kl.corrected\n',
        '        if not kl.corrected\n',
    ),
    Mutation(
        'the penalty is not clipped',
        f"{PLAN}/test_penalty.py::test_a_penalty_has_a_term_of_its_own",
        'study/analyses/context.py', 'self.workspace.P(tree.scale(self.workspace.clip, loss.penalty))',
        'self.workspace.P(loss.penalty)',
    ),
    Mutation(
        'the penalty left out of the first order',
        f"{PLAN}/test_penalty.py::test_a_penalty_has_a_term_of_its_own",
        'study/outcome.py', '(self.batch if self.penalty is None else self.batch + self.penalty)',
        'self.batch',
    ),
    Mutation(
        'the ledger without the penalty',
        f"{PLAN}/test_analyses.py::test_analyses_are_of_the_loss[held_out]",
        'study/analyses/ledger.py', 'batch = batch + context.effects["penalty"].to(batch)\n',
        'pass\n',
    ),
    Mutation(
        'a counterfactual without the penalty',
        f"{PLAN}/test_analyses.py::test_analyses_are_of_the_loss[held_out]",
        'study/analyses/counterfactuals.py', '    ascent = context.workspace.with_penalty(ascent)\n',
        '',
    ),
    Mutation(
        'an observable without the penalty',
        f"{PLAN}/test_analyses.py::test_analyses_are_of_the_loss[held_out]",
        'study/analyses/observables.py', 'if name == "penalty" or not context.overridden}',
        'if name != "penalty" and not context.overridden}',
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
        'study/losses.py', 'if rewards[a] > rewards[b] else',
        'if rewards[a] < rewards[b] else',
    ),
    Mutation(
        'margins without the reference',
        f"{PLAN}/test_preferences.py::test_what_a_step_does_to_both_responses_is_readable",
        'study/losses.py', '.sum(1) - _scored(loss.reference, policy, tokens, microbatch).sum(1)',
        '.sum(1)',
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
        'study/losses.py', '    if policy.temperature != 1:\n',
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
        "a penalty in the file's order",
        f"{PLAN}/test_workspace.py::test_a_workspace_keeps_what_the_loss_made",
        'study/prepare.py', 'kept.beside(policy.params)',
        'kept',
    ),
]  # fmt: skip
