"""ω and η are what TRL 1.16's own losses hand back at its log-probabilities and entropies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from fkernel import func
from fkernel.errors import NonFiniteError
from fkernel.func.objectives import (
    LossInputs,
    LossTerm,
    cispo,
    clipped_ratio,
    corrected_kl_penalty,
    cross_entropy,
    entropy_bonus,
    high_entropy_mask,
    kl_penalty,
    luspo,
    masked_importance,
    off_policy_mask,
    preference,
    sapo,
    scale_advantages,
    total,
    truncated_importance,
    vespo,
)
from fkernel.rollout import loss_weights
from tests.checkpoint.writers import TOKENIZER, qwen2
from tests.objectives.common import apart, gap
from tests.objectives.trl import ACCUMULATION, PROMPTS, RESPONSES, A, differentiated
from tests.rollout.test_weights import LONGEST, trainer  # noqa: F401 - a fixture

CLOSE = 1e-5
CLIP: dict[str, float] = {"low": 0.1, "high": 0.3}
BETA, QUANTILE, CAP = 0.4, 0.45, 1.2
Ours = Callable[[LossInputs], dict[str, LossTerm]]


def named(loss: str, level: str, **options: Any) -> Ours:
    """Our loss of TRL's name."""
    options = {**CLIP, **options}
    match loss:
        case "cispo":
            return partial(cispo, cap=CAP, level=level)
        case "sapo":
            return partial(sapo, level=level)
        case "vespo":
            return vespo
        case "luspo":
            return partial(luspo, **options, level=level)
        case _:
            return partial(clipped_ratio, **options, level=level)


def bonus(inputs: LossInputs, coefficient: float, tokens: torch.Tensor | None = None) -> dict[str, LossTerm]:
    """TRL's bonus is a mean over the tokens that it acts on, of every micro-batch."""
    counted = inputs.response_mask if tokens is None else tokens
    w = torch.full((len(counted),), 1 / (float(counted.sum()) * ACCUMULATION))
    return entropy_bonus(inputs._replace(weights=w), coefficient, tokens)


def scaled(loss: Ours, *factors: Callable[[LossInputs], torch.Tensor]) -> Ours:
    """A loss with constants multiplied into its advantages."""
    return lambda inputs: loss(scale_advantages(inputs, *(factor(inputs) for factor in factors)))


def beside(*losses: Ours) -> Ours:
    """Losses added up."""
    return lambda inputs: {part: term for loss in losses for part, term in loss(inputs).items()}


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
top_entropy = partial(high_entropy_mask, quantile=QUANTILE)
CASES: dict[str, tuple[dict[str, Any], Ours]] = {}
for loss, level in product(LOSSES, LEVELS):
    if (loss, level) == ("vespo", "sequence"):
        continue  # its ratio is a sequence's whatever the level
    asked: dict[str, Any] = {"loss_type": loss, "importance_sampling_level": level}
    if loss == "cispo":
        asked["epsilon_high"] = CAP  # the cap itself, and no distance from 1
    ours, name = named(loss, level), f"{loss}, {level}"
    CASES[name] = asked, ours
    CASES[f"{name}, top entropy"] = {**asked, "top_entropy_quantile": QUANTILE}, scaled(ours, top_entropy)
    CASES[f"{name}, off-policy mask"] = (
        {**asked, "off_policy_mask_threshold": 0.2, "epsilon_low": 0.25},  # what 0.1 would have clipped already
        scaled(named(loss, level, low=0.25), partial(off_policy_mask, threshold=0.2)),
    )
    CASES[f"{name}, KL"] = (
        {**asked, "beta": BETA, "use_bias_correction_kl": False},
        beside(ours, partial(kl_penalty, beta=BETA)),
    )
    CASES[f"{name}, corrected KL"] = (
        {**asked, "beta": BETA},
        beside(ours, partial(corrected_kl_penalty, beta=BETA, level=level)),
    )
for loss, (level, high, delta) in product(
    ("dapo", "luspo"),
    (("token", 0.3, 1.5), ("sequence", 0.05, 1.08), ("token", 0.3, 1.05), ("sequence", 0.3, 1.05)),
):
    asked = {"loss_type": loss, "importance_sampling_level": level, "epsilon_high": high, "delta": delta}
    CASES[f"{loss}, {level}, delta {delta}, {high}"] = asked, named(loss, level, high=high, delta=delta)
for loss, level, mode, whose in product(("dapo", "grpo"), LEVELS, ("truncate", "mask"), LEVELS):
    importance = truncated_importance if mode == "truncate" else masked_importance
    for low, high in ((None, 1.4), (0.8, 1.25), (0.9, None)):
        bounds = {"low": low or 0.0, "high": torch.inf if high is None else high}
        asked = {
            "loss_type": loss,
            "importance_sampling_level": level,
            "use_vllm": True,
            "vllm_importance_sampling_mode": f"{whose}_{mode}",
            "vllm_importance_sampling_clip_min": low,
            "vllm_importance_sampling_clip_max": high,
        }
        ours = scaled(named(loss, level), partial(importance, level=whose, **bounds))
        CASES[f"{loss}, {level}, {whose} {mode} {low} {high}"] = asked, ours
for mode, importance in (("token_truncate", truncated_importance), ("token_mask", masked_importance)):
    CASES[f"vespo, {mode}"] = (
        {
            "loss_type": "vespo",
            "use_vllm": True,
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": 1.5,
        },
        lambda x, importance=importance: vespo(x, correction=importance(x, "token", high=1.5)),
    )
CASES["off-policy mask of the sampler"] = (
    {"off_policy_mask_threshold": 0.15, "use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"},
    scaled(
        named("dapo", "token"),
        partial(off_policy_mask, threshold=0.15),
        partial(truncated_importance, level="token"),
    ),
)
CASES["entropy bonus"] = (
    {"loss_type": "grpo", "entropy_coef": 0.02, "_entropy_bonus_enabled": True},
    beside(named("grpo", "token"), partial(bonus, coefficient=0.02)),
)
CASES["tools"] = (  # what a tool wrote is no response
    {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "tool_mask": (torch.arange(LONGEST) != 1).long().repeat(len(A), 1),
    },
    named("grpo", "sequence"),
)
CASES["everything"] = (
    {
        "loss_type": "dapo",
        "importance_sampling_level": "sequence",
        "beta": BETA,
        "entropy_coef": 0.02,
        "_entropy_bonus_enabled": True,
        "top_entropy_quantile": QUANTILE,
        "off_policy_mask_threshold": 0.2,
        "delta": 1.4,
        "use_vllm": True,
        "vllm_importance_sampling_mode": "token_mask",
    },
    beside(
        scaled(
            named("dapo", "sequence", delta=1.4),
            top_entropy,
            partial(off_policy_mask, threshold=0.2),
            partial(masked_importance, level="token"),
        ),
        partial(corrected_kl_penalty, beta=BETA, level="sequence"),
        lambda x: bonus(x, 0.02, top_entropy(x)),
    ),
)


@pytest.mark.parametrize("name", CASES)
def test_grpo_trainers_gradient_at_its_tokens(trainer, name):  # noqa: F811
    settings, ours = CASES[name]
    inputs, gradient, _, _ = differentiated(trainer, **settings)
    assert gradient.omega.norm() > 1e-3
    assert gradient.eta is not None
    assert bool(gradient.eta.any()) == ("entropy_coef" in settings)
    assert apart(total(ours(inputs)), gradient) < CLOSE


@pytest.mark.parametrize(("level", "high"), [("token", 0.3), ("sequence", 0.05)])
def test_ratios_of_the_cases_are_clipped_on_both_sides(trainer, level, high):  # noqa: F811
    inputs, gradient, _, _ = differentiated(trainer, importance_sampling_level=level, epsilon_high=high)
    clipped = inputs.response_mask.bool() & (gradient.omega == 0)
    for some in (clipped, inputs.response_mask.bool() & (gradient.omega != 0)):
        assert some[A > 0].any()
        assert some[A < 0].any()


@pytest.mark.parametrize("loss", ["dapo", "sapo", "cispo"])
def test_an_overflowed_ratio_is_nan_in_trl_where_it_is_differentiated(trainer, loss):  # noqa: F811
    """So it is an error here, clipped or not; where it is held constant, it is capped."""
    settings: dict[str, Any] = {"loss_type": loss, "epsilon_high": CAP}
    inputs, gradient, _, _ = differentiated(trainer, **settings, off_by=1e3)
    if loss == "cispo":
        assert apart(total(cispo(inputs, CAP)), gradient) < CLOSE
        return
    assert gradient.omega.isnan().any()
    with pytest.raises(NonFiniteError, match=r"exp\(logprobs − old\)"):
        named(loss, "token")(inputs)


@pytest.mark.turns(6)
def test_no_two_cases_agree(trainer):  # noqa: F811
    """So that every setting is felt: no case tests what the trainer does not look at on these sequences."""
    gradients = [differentiated(trainer, **settings).gradient for settings, _ in CASES.values()]
    flat = torch.stack([torch.cat([leaf.flatten() for leaf in term if leaf is not None]) for term in gradients])
    apart_by = torch.cdist(flat, flat) / flat.norm(dim=1) + torch.eye(len(flat))
    names, closest = [*CASES], apart_by.argmin()
    assert apart_by.min() > 1e-3, (names[closest // len(names)], names[closest % len(names)])


def test_a_whole_gradient_is_omega_and_eta_times_the_tokens_own(trainer):  # noqa: F811
    """∇L of the trainer = Σ ω ∇log π + η ∇H, with log π and H of our own."""
    settings, ours = CASES["everything"]
    inputs, _, moved_params, theirs = differentiated(trainer, **settings)
    model: Any = qwen2()
    model.load_state_dict(moved_params, strict=False)  # its head is its embedding
    model.set_attn_implementation("eager")
    apply, params = func.make_functional(model.eval())
    params = {name: p.requires_grad_() for name, p in params.items()}
    U, term = func.pad(PROMPTS, RESPONSES), total(ours(inputs))
    response, kept = U.response_mask, inputs.response_mask.bool()
    l, H = func.token_logprobs(apply)(params, U), func.token_entropy(apply)(params, U)
    assert term.eta is not None
    scalar = (term.omega[kept] * l[response]).sum() + (term.eta[kept] * H[response]).sum()
    found = dict(zip(params, torch.autograd.grad(scalar, [*params.values()]), strict=True))
    gaps = sum(float((found[name] - g).square().sum()) for name, g in theirs.items())
    assert (gaps / sum(float(g.square().sum()) for g in theirs.values())) ** 0.5 < CLOSE


def watched_scores(model: Any) -> list[torch.Tensor]:
    """The log-probabilities that a trainer's forward pass returns, as they come."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, given: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():
            outputs.log_probs.retain_grad()
        kept.append(outputs.log_probs)

    model.register_forward_hook(keep)
    return kept


def laid(values: torch.Tensor) -> torch.Tensor:
    """Scores of tokens 1 … t−1, as `token_logprobs` has them."""
    return torch.nn.functional.pad(values.detach(), (1, 0))


OFFLINE: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": []}


def test_dpo_trainers_gradient_at_its_tokens(tmp_path):
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    model, reference = qwen2(0), qwen2(1)
    dpo = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, beta=BETA, **OFFLINE),
        train_dataset=Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 2),
        processing_class=TOKENIZER,
    )
    pairs = [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r}
        for p, c, r in zip(PROMPTS, RESPONSES, RESPONSES[::-1], strict=True)
    ]
    batch = DataCollatorForPreference(pad_token_id=0)(pairs)
    scores, referred = watched_scores(model), watched_scores(reference)
    loss: Any = dpo.compute_loss(model.train(), batch)
    loss.backward()
    inputs = LossInputs(laid(scores[0]), batch["completion_mask"], reference=laid(referred[0]))
    n = len(pairs)
    of = torch.stack([torch.arange(n), torch.arange(n) + n], 1)
    assert scores[0].grad is not None
    mask = batch["completion_mask"].bool()
    term = total(preference(inputs, of, BETA))
    assert gap(term.omega[mask], laid(scores[0].grad)[mask]) < CLOSE


@pytest.mark.parametrize("tokens", [None, 37])
def test_sft_trainers_gradient_at_its_tokens(tmp_path, tokens):
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    model = qwen2()
    sft = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, **OFFLINE),
        train_dataset=Dataset.from_list([{"prompt": "1+1=", "completion": "2"}] * 2),
        processing_class=TOKENIZER,
    )
    U = func.pad(PROMPTS, RESPONSES)
    labels = U.input_ids.masked_fill(~U.response_mask, -100)
    batch = {"input_ids": U.input_ids, "attention_mask": U.attention_mask.long(), "labels": labels}
    scores = watched_scores(model)
    loss: Any = sft.compute_loss(model.train(), batch, num_items_in_batch=tokens)
    loss.backward()
    assert scores[0].grad is not None
    w = loss_weights([*map(len, RESPONSES)], "dapo", tokens=tokens)
    term = total(cross_entropy(LossInputs(laid(scores[0]), U.response_mask, weights=w)))
    assert gap(term.omega[U.response_mask], laid(scores[0].grad)[U.response_mask]) < CLOSE
