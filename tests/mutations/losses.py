"""Losses as weights of tokens."""

from tests.mutants import Mutation

LOSSES = "tests/test_losses.py"
MUTATIONS = [
    Mutation(
        'another threshold above',
        f"{LOSSES}::test_trls_second_inner_epoch",
        "func/losses.py", '(A > 0) & (r > 1 + high)',
        '(A > 0) & (r > 1 + low)',
    ),
    Mutation(
        'clipped whatever the sign',
        f"{LOSSES}::test_the_pullback_of_ones_is_minus_the_losses_gradient",
        "func/losses.py", '((A > 0) & (r > 1 + high)) | ((A < 0) & (r < 1 - low))',
        '(r > 1 + high) | (r < 1 - low)',
    ),
    Mutation(
        'ratio forgotten',
        f"{LOSSES}::test_the_pullback_of_ones_is_minus_the_losses_gradient",
        "func/losses.py", 'torch.where(mask & ~clipped, A * r, 0.0)',
        'torch.where(mask & ~clipped, A + 0 * r, 0.0)',
    ),
    Mutation(
        'ratio not 1 on policy',
        f"{LOSSES}::test_at_ratio_one_the_clipped_ratio_is_the_policy_gradient",
        "func/losses.py", 'A, r = weights.detach()[:, None], log_ratio.exp()',
        'A, r = weights.detach()[:, None], log_ratio.exp() + 1e-3',
    ),
    Mutation(
        "a sum for the sequence's mean",
        f"{LOSSES}::test_trls_second_inner_epoch",
        "func/losses.py", ' / mask.sum(1, keepdim=True).clamp(min=1)',
        '',
    ),
    Mutation(
        "the penalty's sign",
        f"{LOSSES}::test_trls_second_inner_epoch",
        "func/losses.py", '_penalty(torch.expm1(d), weights',
        '_penalty(-torch.expm1(d), weights',
    ),
    Mutation(
        'β left out',
        f"{LOSSES}::test_the_pullback_of_ones_is_minus_the_losses_gradient",
        "func/losses.py", 'return beta * weights.detach()[:, None] * slopes',
        'return weights.detach()[:, None] * slopes',
    ),
    Mutation(
        'σ(m) for σ(−m)',
        f"{LOSSES}::test_trls_dpo",
        "func/losses.py", 'torch.sigmoid(-margins.detach())',
        'torch.sigmoid(margins.detach())',
    ),
    Mutation(
        'rejected ones raised',
        f"{LOSSES}::test_an_sgd_step_of_dpo_is_the_kernel_times_the_weights",
        "func/losses.py", 'return chosen, -chosen',
        'return chosen, chosen',
    ),
    Mutation(
        'ω cut from the wrong end',
        f"{LOSSES}::test_padding_and_microbatches_change_nothing",
        "func/losses.py", 'batch.token_weights[:, : each.shape[1]].detach()',
        'batch.token_weights[:, -each.shape[1] :].detach()',
    ),
    Mutation(
        'ω shifted by a token',
        f"{LOSSES}::test_equal_weights_make_it_log_pi",
        "func/losses.py", 'batch.token_weights[:, : each.shape[1]].detach()',
        'batch.token_weights[:, : each.shape[1]].detach().roll(1, 1)',
    ),
    Mutation(
        'ω not linear',
        f"{LOSSES}::test_parts_of_a_loss_add_up",
        "func/losses.py", '(omega.to(each) * each).sum(1)',
        '(omega.to(each).square() * each).sum(1)',
    ),
]  # fmt: skip
