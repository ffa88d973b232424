"""What a training did that the function here does not: found in configurations, settings and dtypes, and told.

What is differentiated is the log-probability of the model in eval mode, in float32. A training may have drawn dropout
masks, added a loss of the routers', computed in bfloat16 or rounded its weights. Each is a condition under which the
exact step is another than the one taken; what arithmetic did is a column of its own where a plan executes the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fkernel.errors import listing

HALF = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
HEADS = ("classifier", "summary", "seq_", "qa_", "pooler")
"""Beginnings of settings that concern no language model's head."""
BALANCE = ("router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha", "moe_loss_weight", "router_z_loss_coef")

Dtypes = Mapping[str, int]
"""{dtype, as torch names it: how many tensors have it}."""


@dataclass(frozen=True)
class Condition:
    """One thing that the training did, or may have done, and that is not modelled.

    Attributes:
        kind: "dropout", "router loss", "embedding noise", "autocast", "half precision", "rounded weights",
            "rounded moments", "half precision base", "masters", "frozen", "unstepped" or "no optimizer".
        found: what was found.
        where: in which file or part of the checkpoint.
        effect: how much it may matter, with numbers where they were measured.
        advice: what to do.
    """

    kind: str
    found: str
    where: str
    effect: str
    advice: str

    def __str__(self) -> str:
        return f"{self.found} ({self.where}). {self.effect} {self.advice}"


def find_conditions(
    config: Mapping[str, Any],
    adapter: Mapping[str, Any],
    settings: Mapping[str, Any],
    dropping: Mapping[str, float],
) -> tuple[Condition, ...]:
    """List what a training added to its loss and its forward pass.

    Args:
        config: the model's configuration; nested ones are looked into.
        adapter: a PEFT adapter's, or {}.
        settings: the trainer's, as far as they are known.
        dropping: {module: probability} of dropout modules in the model itself.

    Example:
        >>> [c.found for c in find_conditions({"attn_pdrop": 0.1, "resid_pdrop": 0.0}, {}, {}, {})]
        ['Dropout above 0: attn_pdrop 0.1']
    """
    found = [_dropout(config, adapter, dropping, settings), _router(config), _noise(settings), _autocast(settings)]
    return tuple(condition for condition in found if condition is not None)


def precision_conditions(weights: Dtypes, moments: Dtypes, base: Dtypes | None = None) -> tuple[Condition, ...]:
    """List what rounding a training did, from the dtypes of what it stored beside an optimizer's state.

    Args:
        weights: of the trained parameters, as they are stored.
        moments: of the optimizer's, as they are stored.
        base: of an adapter's frozen base model.

    Example:
        >>> [c.kind for c in precision_conditions({"bfloat16": 9}, {"bfloat16": 18})]
        ['half precision']
    """
    w, m, b = _half(weights), _half(moments), _half(base or {})
    found: list[Condition] = []
    if w and m:
        found.append(
            Condition(
                "half precision",
                f"The weights are stored in {w} and the optimizer's moments in {m}: pure half-precision training, "
                f"without float32 masters",
                "dtypes of the weights and of the optimizer's state",
                "Updates below 2⁻⁸ of a weight (bfloat16) or 2⁻¹¹ (float16) are lost when they are added: at a "
                "learning rate of 1e-5 most weights do not move at all, and a step predicted in float32 was 700 % "
                "off the one taken, its effect on log-probabilities 4300 %.",
                "Execute the step in its own precision: a plan does so by itself (the effect `arithmetic`).",
            )
        )
    elif w:
        found.append(
            Condition(
                "rounded weights",
                f"The weights are stored in {w}, the moments in {_all(moments)}: the training's float32 masters are "
                f"not here, or the optimizer adds to rounded weights",
                "dtypes of the weights and of the optimizer's state",
                "Weights are known to 0.4 % (bfloat16) or 0.05 % (float16) each, so that log-probabilities, gradients "
                "and the change of weights may be some per cent off.",
                "Load the float32 masters, where the training kept them.",
            )
        )
    elif m:
        found.append(
            Condition(
                "rounded moments",
                f"The optimizer's moments are stored in {m}, the weights in {_all(weights)}",
                "dtypes of the optimizer's state",
                "Moments are known to 0.4 % (bfloat16) each, and the training rounds them again after each step.",
                "Expect the predicted step to be off by about as much.",
            )
        )
    if b:
        found.append(
            Condition(
                "half precision base",
                f"The adapter's base model is stored in {b}",
                "dtypes of the base model's weights",
                "It is widened to float32 here, which is exact; a training that computed in it rounded each layer, "
                "and its gradient may be 1 to 5 % off the one here.",
                "Nothing, where the training loaded the base in float32.",
            )
        )
    return tuple(found)


def frozen_condition(names: list[str], total: int) -> Condition:
    """Tell that parameters are taken as frozen because the optimizer does not have them."""
    return Condition(
        "frozen",
        f"The optimizer has {total - len(names)} of the model's {total} trainable parameters; the others are taken as "
        f"frozen: {listing(names, 3)}",
        "the optimizer's state",
        "Kernels and steps are about what it has.",
        "If a second optimizer trained them, its part of the step is missing here.",
    )


def unstepped_condition(names: list[str], total: int) -> Condition:
    """Tell that the optimizer keeps nothing of some parameters while it has stepped others."""
    return Condition(
        "unstepped",
        f"The optimizer's state has nothing of {len(names)} of its {total} parameters, which are taken as never "
        f"stepped: {listing(names, 3)}",
        "the optimizer's state",
        "A first step moves a weight by the whole learning rate.",
        "Right where they never had a gradient, as experts that no token reached; if they had, the state lost them: "
        "take another checkpoint.",
    )


def masters_condition(model: Any, rounded: Mapping[str, Any]) -> Condition:
    """Tell that the parameters are the optimizer's float32 masters, and how far the weights that ran are from them.

    Args:
        model: with the masters as its parameters.
        rounded: {name: the weights that the policy ran with}.
    """
    masters = {name: leaf.detach().double() for name, leaf in model.named_parameters() if name in rounded}
    apart = sum(float((leaf - rounded[name].double()).square().sum()) for name, leaf in masters.items())
    whole = sum(float(leaf.square().sum()) for leaf in masters.values())
    return Condition(
        "masters",
        f"The optimizer keeps float32 masters, which are the parameters here; the policy ran with their rounding to "
        f"{', '.join(counted(leaf.dtype for leaf in rounded.values()))}, which is {(apart / whole) ** 0.5:.1e} of "
        f"their norm away",
        "the optimizer's state and the weights",
        "Log-probabilities and gradients are at the masters; those of the policy that ran are at the rounded weights, "
        "by about as much off.",
        "Nothing for a step's account: the optimizer steps the masters. Checkpoint.rounded has the weights that ran.",
    )


def weights_only_condition(path: Any) -> Condition:
    """Tell that a trainer left its state and weights and no optimizer's state, as with save_only_model."""
    return Condition(
        "no optimizer",
        f"{path} has a trainer's state and weights, and no optimizer's state: it was saved with save_only_model, or "
        f"the file is gone",
        "the checkpoint's directory",
        "Moments and learning rates are missing, so that no step can be explained.",
        "A recording of the run has them (fkernel.record.Recorder; checkpoint: {recording: DIR, step: N}); or save "
        "with save_only_model=False.",
    )


def unread_condition(path: Any, unread: Sequence[Any]) -> Condition:
    """Tell that the weights of a checkpoint were loaded without the optimizer's state that lies beside them."""
    return Condition(
        "no optimizer",
        f"{path} is the model of a checkpoint, and the optimizer's state beside it was not read: "
        f"{listing([str(item) for item in unread])}",
        "the directory above",
        "Without it no step can be explained.",
        "Load the directory above for both, or say optimizer=False for the weights alone.",
    )


def _dropout(
    config: Mapping[str, Any], adapter: Mapping[str, Any], dropping: Mapping[str, float], settings: Mapping[str, Any]
) -> Condition | None:
    parts = {"adapter_config.json": [*_rates(adapter)], "config.json": [*_rates(config)]}
    if not any(parts.values()):
        parts = {"the model's dropout modules": [*dropping.items()]}
    if settings.get("disable_dropout") is True:  # TRL's silences modules, not what attention passes to a function
        parts = {place: [r for r in rates if r[0].endswith("attention_dropout")] for place, rates in parts.items()}
    rates = [rate for rates in parts.values() for rate in rates]
    where = " and ".join(place for place, inside in parts.items() if inside)
    if not rates:
        return None
    shown = ", ".join(f"{name} {rate:g}" for name, rate in rates[:4])
    return Condition(
        "dropout",
        "Dropout above 0: " + shown + (f" and {len(rates) - 4} more" if len(rates) > 4 else ""),
        where,
        "Where the training left it on, it drew masks that nobody recorded, and its gradient is of a random function: "
        "with 0.3 on LoRA, 46 % off the gradient here, which is without dropout.",
        "Read kernels and steps as of the model without dropout; train with dropout 0 (TRL: disable_dropout) for exact "
        "ones.",
    )


def _rates(config: Mapping[Any, Any], inside: str = "") -> Iterator[tuple[str, float]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _rates(value, f"{inside}{key}.")
        elif _is_rate(str(key), value):
            yield f"{inside}{key}", float(value)


def _is_rate(key: str, value: Any) -> bool:
    named = "drop" in key.lower() and not key.startswith(HEADS)
    return named and isinstance(value, float | int) and not isinstance(value, bool) and 0 < value <= 1


def _router(config: Mapping[str, Any]) -> Condition | None:
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        weights = {key: part[key] for key in BALANCE if isinstance(part.get(key), float | int) and part[key]}
        if part.get("output_router_logits") is True and weights:
            shown = ", ".join(f"{key} {value:g}" for key, value in weights.items())
            return Condition(
                "router loss",
                f"output_router_logits true, {shown}",
                "config.json",
                "A training with this configuration adds a loss that balances the experts; it is in no "
                "log-probability, and left out here. The step of the routers was 31 % off without it.",
                "Leave the routers out (parameters select), or train without it (router_aux_loss_coef 0).",
            )
    return None


def _noise(settings: Mapping[str, Any]) -> Condition | None:
    alpha = settings.get("neftune_noise_alpha")
    if not isinstance(alpha, float | int) or not alpha:
        return None
    return Condition(
        "embedding noise",
        f"neftune_noise_alpha {alpha:g}",
        "the trainer's settings",
        "The training added noise to the embeddings, which nobody recorded: its gradient is of another function.",
        "Read kernels and steps as of the model without noise.",
    )


def _autocast(settings: Mapping[str, Any]) -> Condition | None:
    dtype = next((name for key, name in (("bf16", "bfloat16"), ("fp16", "float16")) if settings.get(key) is True), None)
    if dtype is None:
        return None
    return Condition(
        "autocast",
        f"{'bf16' if dtype == 'bfloat16' else 'fp16'} true: the training computed in {dtype} (autocast)",
        "the trainer's settings, or its loss scaler",
        "Its gradient was 1 to 4 % off the float32 one that is computed here, and the predicted step about 1 %.",
        "Execute the step in it: step: {autocast: bfloat16} in a plan (the effect `arithmetic`).",
    )


def _half(dtypes: Dtypes) -> str:
    """Name the half-precision dtypes, and of how many tensors; nothing where there is none."""
    total = sum(dtypes.values())
    halves = {name: count for name, count in dtypes.items() if name in HALF}
    return ", ".join(name if count == total else f"{name} ({count} of {total})" for name, count in halves.items())


def _all(dtypes: Dtypes) -> str:
    return ", ".join(dtypes) or "no dtype that is known"


def counted(dtypes: Iterator[Any]) -> Dtypes:
    """Count dtypes by name.

    Example:
        >>> import torch
        >>> counted(iter([torch.bfloat16, torch.bfloat16]))
        {'bfloat16': 2}
    """
    return dict(Counter(str(dtype).removeprefix("torch.") for dtype in dtypes))
