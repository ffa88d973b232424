"""Whose state is it? AdamW's is read; every other is refused by name.

Many optimizers keep `exp_avg` and `exp_avg_sq`, and what they do with them differs: NAdam taken for AdamW is 56 % off,
RAdam twenty times. What tells them apart are the names in their groups and states, those that are missing too:

    torch.optim.Adam, AdamW        amsgrad in each group, in every version
    apex's and DeepSpeed's fused   bias_correction
    bitsandbytes                   state1, state2: exp_avg and exp_avg_sq, where they are not quantised

A name that none of these has is another optimizer's, and so is a group that lacks what all of them have. An optimizer
whose names are Adam's to the letter and whose mathematics is another one cannot be told from its state.

Source: the state_dicts of torch 2.13's optimizers, transformers 5.23, bitsandbytes 0.50 (`Optimizer2State`; its Adam
has decoupled decay as its AdamW has), apex, schedulefree 1.4, prodigyopt 1.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fkernel.errors import OptimizerStateError, listing

NUMBERS = ("lr", "betas", "eps", "weight_decay")
FLAGS = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
INERT = (
    *("params", "param_names", "step", "bias_correction", "initial_lr", "name", "names", "group_name"),
    *("max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"),  # of schedulers, which set lr and betas
)
"""What a group of AdamW may have besides: where it came from, and what a scheduler notes in it."""
EMPTY_UNLESS = {"alpha": "AdEMAMix's", "t_alpha": "AdEMAMix's", "t_beta3": "AdEMAMix's"}
"""What bitsandbytes writes for every optimizer of two moments, and fills in for one of them."""

GROUP_OF = {
    "momentum_decay": "NAdam's, which looks ahead along its momentum",
    "d0": "Prodigy's, which estimates its own learning rate",
    "weight_lr_power": "a schedule-free optimizer's, which averages its weights",
    "no_prox": "Adan's",
    "ns_steps": "Muon's, which makes its update orthogonal",
    "use_muon": "Muon's, which makes its update orthogonal",
    "scale_parameter": "Adafactor's, whose second moment is a product of rows and columns",
    "beta2_decay": "Adafactor's, whose second moment is a product of rows and columns",
    "grad_averaging": "LAMB's or NovoGrad's, which scale a step by layers",
    "precondition_frequency": "SOAP's, which rotates the gradient",
    "update_proj_gap": "GaLore's, whose moments are of a projection",
    "use_kahan_summation": "AnyPrecisionAdamW's, which carries the rounding errors of its weights",
    "kahan_sum": "torch-optimi's, which carries the rounding errors of its weights",
    "decouple": "ADOPT's, which divides by the second moment before the gradient enters it",
    "dampening": "SGD's, which has no second moment",
    "centered": "RMSprop's, which has no first moment of Adam's kind",
    "rho": "Adadelta's",
    "lambd": "ASGD's",
    "etas": "Rprop's",
    "lr_decay": "Adagrad's, whose second moment does not decay",
    "history_size": "LBFGS's",
}
"""{a name in a parameter group: whose it is}, the telling ones before those that several have."""

STATE_OF = {
    "exp_avg_sq_row": "Adafactor's: its second moment is a product of rows and columns, and no diagonal of ours",
    "row_var": "Adafactor's: its second moment is a product of rows and columns, and no diagonal of ours",
    "mu_product": "NAdam's, which looks ahead along its momentum",
    "max_exp_avg_sq": "AMSGrad's, whose second moment is a maximum",
    "exp_inf": "Adamax's, whose second moment is a maximum",
    "exp_avg_var": "AdaBelief's, whose second moment is of deviations",
    "exp_avg_diff": "Adan's",
    "exp_avg_slow": "AdEMAMix's",
    "hessian": "Sophia's",
    "GG": "SOAP's, which rotates the gradient",
    "vmean": "Adam-mini's, whose second moment is shared by a block",
    "p0": "Prodigy's, which estimates its own learning rate",
    "z": "a schedule-free optimizer's, which averages its weights",
    "compensation": "AnyPrecisionAdamW's, which carries the rounding errors of its weights",
    "kahan_comp": "torch-optimi's, which carries the rounding errors of its weights",
    "momentum_buffer": "SGD's or Muon's, which have no second moment",
    "acc_delta": "Adadelta's",
    "square_avg": "RMSprop's",
    "step_size": "Rprop's",
    "ax": "ASGD's",
    "sum": "Adagrad's, whose second moment does not decay",
    "master_param": "of a fused Adam that keeps master weights in its state; they are not read, and the weights beside "
    "it are rounded",
}
"""{a name in a parameter's state: whose it is}."""

QUANTISED = (
    "bitsandbytes' 8-bit state: its moments are quantised in blocks, and D = 1/(√v̂+ε) of them is not the optimizer's"
)
WRAPPED = "__bnb_optimizer_quant_state__"
"""Where newer versions of bitsandbytes keep state1 and state2, so that FSDP does not gather them."""


def plain_entry(entry: Mapping[str, Any], index: Any) -> dict[str, Any]:
    """Give a parameter's state under AdamW's own names: step, exp_avg, exp_avg_sq.

    Args:
        entry: what a state_dict has under `index`; empty where the optimizer never stepped the parameter.
        index: the parameter's number or name, for messages.

    Raises:
        OptimizerStateError: it is another optimizer's; it says whose.

    Example:
        >>> plain_entry({"step": 3, "state1": torch.zeros(2), "state2": torch.ones(2)}, 0)
        {'step': 3, 'exp_avg': tensor([0., 0.]), 'exp_avg_sq': tensor([1., 1.])}
    """
    flat = {key: value for key, value in entry.items() if key != WRAPPED} | dict(entry.get(WRAPPED) or {})
    if "state1" in flat:
        flat = _of_bitsandbytes(flat, index)
    for key, whose in STATE_OF.items():
        if key in flat:
            raise OptimizerStateError(f"The state of parameter {index} is {whose}; only AdamW's is modelled.")
    missing = [key for key in ("exp_avg", "exp_avg_sq") if key not in flat]
    if flat and missing:
        raise OptimizerStateError(
            f"The state of parameter {index} has {listing([*flat])} but no {missing[0]}: not an AdamW state."
        )
    unknown = [key for key in flat if key not in ("step", "exp_avg", "exp_avg_sq")]
    if unknown:
        raise OptimizerStateError(
            f"The state of parameter {index} has {listing(unknown)}, which AdamW's does not have: it is another "
            f"optimizer's; only AdamW's is modelled."
        )
    for key in ("exp_avg", "exp_avg_sq"):
        _check_plain(flat.get(key), key, index)
    return flat


def check_group(group: Mapping[str, Any], number: int, decoupled: bool | None, bitsandbytes: bool = False) -> None:
    """Raise OptimizerStateError unless a parameter group is of AdamW as it is modelled.

    Args:
        group: the group.
        number: its position, for messages.
        decoupled: what the caller says of the decay, where the group does not.
        bitsandbytes: whether the states of its parameters are bitsandbytes', whose decay is always decoupled.
    """
    if "correct_bias" in group or group.get("bias_correction", True) not in (True, 1):
        raise OptimizerStateError(
            f"Parameter group {number} is of an Adam that adds ε before the bias correction, or corrects none "
            f"(transformers' old AdamW, apex), which is not modelled; torch.optim.AdamW is."
        )
    for key, whose in GROUP_OF.items():
        if key in group:
            raise OptimizerStateError(
                f"Parameter group {number} has {key!r}: it is {whose}; this is not an AdamW state."
            )
    missing = [key for key in NUMBERS if key not in group]
    if missing:
        raise OptimizerStateError(f"Parameter group {number} lacks {listing(missing)}: this is not an AdamW state.")
    _check_names(group, number, bitsandbytes)
    _check_numbers(group, number)
    said = True if bitsandbytes else group.get("decoupled_weight_decay", decoupled)
    if group["weight_decay"] and said is None:
        raise OptimizerStateError(
            f"Parameter group {number} has weight_decay={group['weight_decay']} and does not say whose: torch before "
            f"2.7 wrote the same for AdamW and for Adam. Say decoupled=True if the training used AdamW."
        )
    if group["weight_decay"] and not said:
        raise OptimizerStateError(
            f"Parameter group {number} is Adam's with weight_decay={group['weight_decay']} added to the gradient; only "
            f"AdamW's decoupled decay is modelled."
        )


def check_flags(group: Mapping[str, Any], number: int) -> None:
    """Raise OptimizerStateError where a group switched on what is not modelled."""
    for flag in ("amsgrad", "maximize"):
        if group.get(flag, False):
            raise OptimizerStateError(f"Parameter group {number} has {flag}=True, which is not modelled.")


def is_of_bitsandbytes(entry: Any) -> bool:
    """Whether a parameter's state has bitsandbytes' names."""
    return isinstance(entry, Mapping) and ("state1" in entry or WRAPPED in entry)


def _of_bitsandbytes(flat: dict[str, Any], index: Any) -> dict[str, Any]:
    """Give its AdamW's moments, which are fp32 in 32-bit and paged optimizers and below 4,096 elements."""
    quantised = any(key.startswith(("qmap", "absmax", "max1", "new_max")) for key in flat)
    if quantised or not flat["state1"].is_floating_point():
        raise OptimizerStateError(f"The state of parameter {index} is {QUANTISED}; only AdamW's is modelled.")
    if "state2" not in flat:
        whose = "of a bitsandbytes optimizer with one moment (Lion, SGD, RMSprop, Adagrad)"
    elif "unorm_vec" in flat:
        whose = "of a bitsandbytes optimizer that scales a step by layers (LAMB, LARS, max_unorm)"
    elif "gnorm_vec" in flat:
        whose = "of a bitsandbytes optimizer that clips by percentiles of earlier gradients (percentile_clipping)"
    else:
        rest = {key: value for key, value in flat.items() if key not in ("state1", "state2")}
        return {**rest, "exp_avg": flat["state1"], "exp_avg_sq": flat["state2"]}
    raise OptimizerStateError(f"The state of parameter {index} is {whose}; only AdamW's is modelled.")


def _check_plain(moment: Any, key: str, index: Any) -> None:
    if moment is None or type(moment) in (torch.Tensor, torch.nn.Parameter):
        return
    raise OptimizerStateError(
        f"{key} of parameter {index} is a {type(moment).__name__}; expected a plain tensor. Quantised moments "
        f"(torchao's) are not modelled, and one rank's part of a sharded one (DTensor) is not the whole: save the "
        f"full state."
    )


def _check_names(group: Mapping[str, Any], number: int, bitsandbytes: bool) -> None:
    for key, whose in EMPTY_UNLESS.items():
        if group.get(key):
            raise OptimizerStateError(f"Parameter group {number} has {key}={group[key]}: it is {whose}, not AdamW's.")
    unknown = [key for key in group if key not in (*NUMBERS, *FLAGS, *INERT, *EMPTY_UNLESS)]
    if unknown:
        raise OptimizerStateError(
            f"Parameter group {number} has {listing(unknown)}, which no AdamW has: it may be another optimizer's, with "
            f"other mathematics. If it is a note of your own that changes no step, take it out of the group and save "
            f"the state again."
        )
    if "amsgrad" in group or "bias_correction" in group or bitsandbytes or "alpha" in group:
        return
    of_torch = "foreach" in group or "decoupled_weight_decay" in group
    whose = "RAdam's or Adamax's, whose steps differ" if of_torch else "another optimizer's, such as RAdam's or LAMB's"
    raise OptimizerStateError(
        f"Parameter group {number} has no 'amsgrad', which torch.optim.AdamW always writes: it is {whose}. Only AdamW "
        f"is modelled; if it was AdamW, add 'amsgrad': False to the group and save the state again."
    )


def _check_numbers(group: Mapping[str, Any], number: int) -> None:
    """Raise unless lr, ε and decay are numbers, and the betas two of them."""
    betas = group["betas"]
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise OptimizerStateError(
            f"Parameter group {number} has betas={betas}; AdamW has two, and another number is another optimizer's."
        )
    for key, value in (("lr", group["lr"]), ("eps", group["eps"]), ("weight_decay", group["weight_decay"])):
        try:
            float(value)
        except (TypeError, ValueError, RuntimeError):
            raise OptimizerStateError(
                f"Parameter group {number} has {key}={value!r}; expected one number, as AdamW has."
            ) from None
