"""Losses as weights of tokens, and the columns that they make."""

from tests.mutants import Mutation

AUTOGRAD, TRL, COLUMNS = "tests/objectives/test_autograd.py", "tests/objectives/test_trl.py", "tests/test_weighted.py"
OMEGA, GRPO = f"{AUTOGRAD}::test_omega_and_eta_are_autograds", f"{TRL}::test_grpo_trainers_gradient_at_its_tokens"
MUTATIONS = [
    Mutation(
        "another threshold above",
        GRPO,
        "func/objectives/surrogates.py", "r > min(1 + high, cap)",
        "r > min(1 + low, cap)",
    ),
    Mutation(
        "two-sided clipping forgets that its bound is below the other",
        OMEGA,
        "func/objectives/surrogates.py", "r > min(1 + high, cap)",
        "r > 1 + high",
    ),
    Mutation(
        "clipped whatever the sign",
        OMEGA,
        "func/objectives/surrogates.py", "(A > 0) & (r > min(",
        "(r > min(",
    ),
    Mutation(
        "ratio forgotten",
        OMEGA,
        "func/objectives/surrogates.py", "0.0, -w * A * r)",
        "0.0, -w * A + 0 * r)",
    ),
    Mutation(
        "the soft gate without its own slope",
        OMEGA,
        "func/objectives/surrogates.py", "* 4 * gate * (1 - gate)",
        "* 2 * gate",
    ),
    Mutation(
        "ratio not 1 on policy",
        f"{AUTOGRAD}::test_at_ratio_one_every_loss_is_the_policy_gradient",
        "func/objectives/ratios.py", ".exp().clamp(max=cap)",
        ".exp().add(1e-3).clamp(max=cap)",
    ),
    Mutation(
        "a sum for the sequence's mean",
        OMEGA,
        "func/objectives/ratios.py", " / count * mask",
        " * mask",
    ),
    Mutation(
        "the penalty's sign",
        GRPO,
        "func/objectives/penalties.py", "-beta * w * _excess(",
        "beta * w * _excess(",
    ),
    Mutation(
        "β left out",
        OMEGA,
        "func/objectives/penalties.py", "-beta * w * _excess(",
        "-w * _excess(",
    ),
    Mutation(
        "the corrected penalty without its ratio",
        GRPO,
        "func/objectives/penalties.py", "-beta * w * r * d",
        "-beta * w * d",
    ),
    Mutation(
        "an entropy bonus that is a penalty",
        OMEGA,
        "func/objectives/penalties.py", "-coefficient * w * m",
        "coefficient * w * m",
    ),
    Mutation(
        "VESPO's ratio is the tokens' mean",
        GRPO,
        "func/objectives/likelihoods.py", ".clamp(-20.0, 20.0).sum(1, keepdim=True)",
        ".clamp(-20.0, 20.0).mean(1, keepdim=True)",
    ),
    Mutation(
        "a quantile of padding, too",
        f"{AUTOGRAD}::test_masks_of_tokens_and_of_sequences",
        "func/objectives/factors.py", "torch.quantile(values[mask], 1 - quantile)",
        "torch.quantile(values, 1 - quantile)",
    ),
    Mutation(
        "σ(m) for σ(−m)",
        f"{AUTOGRAD}::test_preferences_are_autograds",
        "func/objectives/pairs.py", "score[rejected] - score[chosen]",
        "score[chosen] - score[rejected]",
    ),
    Mutation(
        "a margin without its reference",
        f"{TRL}::test_dpo_trainers_gradient_at_its_tokens",
        "func/objectives/pairs.py", "beta * (logprobs - reference).sum(1)",
        "beta * logprobs.sum(1)",
    ),
    Mutation(
        "rejected ones raised",
        f"{COLUMNS}::test_an_sgd_step_of_dpo_is_the_kernel_times_the_weights",
        "func/objectives/pairs.py", "index_add_(0, rejected, pull)",
        "index_add_(0, rejected, -pull)",
    ),
    Mutation(
        "ω cut from the wrong end",
        f"{COLUMNS}::test_padding_and_microbatches_change_nothing",
        "func/weighted.py", "omega[:, :t].detach()",
        "omega[:, -t:].detach()",
    ),
    Mutation(
        "ω shifted by a token",
        f"{COLUMNS}::test_equal_weights_make_it_log_pi",
        "func/weighted.py", "omega[:, :t].detach()",
        "omega[:, :t].detach().roll(1, 1)",
    ),
    Mutation(
        "ω not linear",
        f"{COLUMNS}::test_parts_of_a_loss_add_up",
        "func/weighted.py", "(omega.to(log_p) * log_p).sum(1)",
        "(omega.to(log_p).square() * log_p).sum(1)",
    ),
    Mutation(
        "entropies of the other sign",
        f"{COLUMNS}::test_the_pullback_of_ones_is_the_gradient_of_a_loss_with_entropies",
        "func/weighted.py", "total + (eta.to(H) * H).sum(1)",
        "total - (eta.to(H) * H).sum(1)",
    ),
    Mutation(
        "entropies that are not centred, layer by layer",
        "tests/test_walk.py::test_weighted_tokens_of_any_sign_and_none",
        "func/handles/head.py", "(z - head.mean[..., None]).mul_(head.eta[..., None])",
        "z.clone().mul_(head.eta[..., None])",
    ),
]  # fmt: skip
