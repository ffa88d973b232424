"""Optimizers that are not modelled are refused by name, and so is what a known one does not have.

Many optimizers keep `exp_avg` and `exp_avg_sq`, and what they do with them differs: NAdam taken for AdamW is 56 % off,
RAdam twenty times. A name that the recognised optimizer does not have is another's, and so is a group that lacks what
all of its have: torch.optim.Adam and AdamW write amsgrad in every version, apex's and DeepSpeed's fused ones
bias_correction. An optimizer whose names are a known one's to the letter and whose mathematics is another one cannot be
told from its state.

Source: the state_dicts of torch 2.13's optimizers, transformers 5.23, bitsandbytes 0.50 (`Optimizer2State`; its Adam
has decoupled decay as its AdamW has), apex, schedulefree 1.4, prodigyopt 1.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fkernel.errors import OptimizerStateError, listing
from fkernel.precond.updates import OPTIMIZERS

NUMBERS = ("lr", "betas", "eps", "weight_decay")
FLAGS = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
STOCHASTIC = ("bf16_stochastic_round", "stochastic_rounding", "use_stochastic_rounding")
INERT = (
    *("params", "param_names", "step", "bias_correction", "initial_lr", "name", "names", "group_name"),
    *("max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"),  # of schedulers, which set lr and betas
    *("initial_accumulator_value", "use_muon"),
)
"""What a group may have besides: where it came from, and what a scheduler notes in it."""
EMPTY_UNLESS = {"alpha": "AdEMAMix's", "t_alpha": "AdEMAMix's", "t_beta3": "AdEMAMix's"}
"""What bitsandbytes writes for every optimizer of two moments, and fills in for one of them."""

GROUP_OF = {
    "d0": "Prodigy's, which estimates its own learning rate",
    "weight_lr_power": "a schedule-free optimizer's, which averages its weights",
    "no_prox": "Adan's",
    "grad_averaging": "LAMB's or NovoGrad's, which scale a step by layers",
    "precondition_frequency": "SOAP's, which rotates the gradient",
    "update_proj_gap": "GaLore's, whose moments are of a projection",
    "use_kahan_summation": "AnyPrecisionAdamW's, which carries the rounding errors of its weights",
    "kahan_sum": "torch-optimi's, which carries the rounding errors of its weights",
    "decouple": "ADOPT's, which divides by the second moment before the gradient enters it",
    "rho": "Adadelta's",
    "lambd": "ASGD's",
    "etas": "Rprop's",
    "history_size": "LBFGS's",
}
"""{a name in a parameter group: whose it is}, the telling ones before those that several have."""

STATE_OF = {
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
    "acc_delta": "Adadelta's",
    "step_size": "Rprop's",
    "ax": "ASGD's",
}
"""{a name in a parameter's state: whose it is}."""

KEPT = {"bitsandbytes": ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")}
"""What an entry may have beside the moments of its kind."""
SUPPORTED = "supported are " + ", ".join(OPTIMIZERS)


def check_entry(entry: Mapping[str, Any], index: Any, kind: str) -> None:
    """Raise OptimizerStateError unless what is kept of a parameter is what its optimizer keeps.

    Args:
        entry: what a state_dict has under `index`; empty where the optimizer never stepped the parameter.
        index: the parameter's number or name, for messages.
        kind: its optimizer, of `fkernel.precond.updates.OPTIMIZERS`.

    Example:
        >>> check_entry({"step": 3, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.ones(2)}, 0, "adamw")
    """
    for key, whose in STATE_OF.items():
        if key in entry:
            raise OptimizerStateError(f"The state of parameter {index} is {whose}; {SUPPORTED}.")
    state = OPTIMIZERS[kind].state
    known = {*state.MOMENTS, *state.OPTIONAL, *OPTIMIZERS[kind].numbers, "step", "master_param"}
    if "state1" in entry:
        known |= {*KEPT["bitsandbytes"]}
    if kind == "transformers_adafactor":
        known |= {"RMS"}
    unknown = [key for key in entry if key not in known]
    if unknown:
        owners = [
            name for name, each in OPTIMIZERS.items() if unknown[0] in (*each.state.MOMENTS, *each.state.OPTIONAL)
        ]
        whose = " and ".join(owners) or "no known optimizer"
        raise OptimizerStateError(
            f"The state of parameter {index} has {listing(unknown)}, which {whose} keeps "
            f"and {kind}, whose settings its group has, does not; {SUPPORTED}."
        )
    adams = kind in ("adamw", "adam") and "state1" not in entry
    missing = [key for key in state.MOMENTS if adams and entry and key not in entry]
    if missing:
        raise OptimizerStateError(
            f"The state of parameter {index} has {listing([*entry])} but no {missing[0]}: not an AdamW state."
        )
    for key, moment in entry.items():
        if key in (*state.MOMENTS, *state.OPTIONAL, *KEPT["bitsandbytes"], "master_param"):
            _check_readable(moment, key, index)


def check_group(group: Mapping[str, Any], number: int, kind: str) -> None:
    """Raise OptimizerStateError where a parameter group is of an optimizer that is not modelled, and say which.

    Args:
        group: the group.
        number: its position, for messages.
        kind: what it was recognised as.
    """
    if kind == "adamw" and ("correct_bias" in group or group.get("bias_correction", True) not in (True, 1)):
        raise OptimizerStateError(
            f"Parameter group {number} is of an Adam that adds ε before the bias correction, or corrects none "
            f"(transformers' old AdamW, apex), which is not modelled; torch.optim.AdamW is."
        )
    for key, whose in GROUP_OF.items():
        if key in group:
            raise OptimizerStateError(f"Parameter group {number} has {key!r}: it is {whose}; {SUPPORTED}.")


def check_settings(group: Mapping[str, Any], number: int, kind: str) -> None:
    """Raise OptimizerStateError unless a parameter group has its optimizer's settings, all of them and no others.

    Args:
        group: the group.
        number: its position, for messages.
        kind: of `fkernel.precond.updates.OPTIMIZERS`.
    """
    if kind == "adam":
        missing = [key for key in NUMBERS if key not in group]
        if missing:
            raise OptimizerStateError(f"Parameter group {number} lacks {listing(missing)}: this is not an AdamW state.")
    for key, whose in EMPTY_UNLESS.items():
        if group.get(key) and key not in {key for key, _ in OPTIMIZERS[kind].settings.values()}:
            raise OptimizerStateError(f"Parameter group {number} has {key}={group[key]}: it is {whose}, not AdamW's.")
    known = {key for key, _ in OPTIMIZERS[kind].settings.values()}
    unknown = [key for key in group if key not in (*known, *FLAGS, *INERT, *EMPTY_UNLESS, *STOCHASTIC, "eps")]
    if unknown:
        raise OptimizerStateError(
            f"Parameter group {number} has {listing(unknown)}, which no {NAMES.get(kind, kind)} has: it may be another "
            f"optimizer's, with other mathematics. If it is a note of your own that changes no step, take it out of "
            f"the group and save the state again."
        )
    _check_numbers(group, number)
    if kind != "adam" or "amsgrad" in group or "bias_correction" in group or "alpha" in group or "use_muon" in group:
        return
    of_torch = "foreach" in group
    whose = "Adamax's, whose steps differ" if of_torch else "another optimizer's, such as RAdam's or LAMB's"
    raise OptimizerStateError(
        f"Parameter group {number} has no 'amsgrad', which torch.optim.AdamW always writes: it is {whose}; "
        f"{SUPPORTED}. If it was AdamW, add 'amsgrad': False to the group and save the state again."
    )


NAMES = {"adam": "AdamW", "adamw": "AdamW"}


def check_bitsandbytes(group: Mapping[str, Any], keys: set[str], number: int) -> None:
    """Raise OptimizerStateError unless bitsandbytes' states are of its AdamW (32 or 8 bits, paged or not) or Lion."""
    betas = group.get("betas", (0.0, 0.0))
    if "unorm_vec" in keys:
        whose = "of a bitsandbytes optimizer that scales a step by layers (LAMB, LARS, max_unorm)"
    elif "gnorm_vec" in keys:
        whose = "of a bitsandbytes optimizer that clips by percentiles of earlier gradients (percentile_clipping)"
    elif "state2" not in keys and not (group.get("eps") == 0 and betas[1] > 0):
        whose = "of a bitsandbytes optimizer with one moment that is not Lion (SGD, RMSprop, Adagrad)"
    else:
        return
    raise OptimizerStateError(f"Parameter group {number} is {whose}; {SUPPORTED}.")


def _check_readable(moment: Any, key: str, index: Any) -> None:
    """Raise unless a moment is a tensor of torch's own, or one that gives its numbers (torchao's)."""
    if moment is None or type(moment).__module__.startswith("torchao."):
        return
    if type(moment) in (torch.Tensor, torch.nn.Parameter):
        dense = moment.layout == torch.strided and not moment.is_meta and not moment.is_quantized
        codes = key in ("state1", "state2") and moment.dtype == torch.uint8
        if dense and (moment.is_floating_point() or codes):
            return
        of = "no numbers (meta)" if moment.is_meta else f"{moment.dtype}, {moment.layout}"
        raise OptimizerStateError(
            f"{key} of parameter {index} is a tensor of {of}; expected real numbers in a dense tensor, as an optimizer "
            f"keeps them. Save the state again from the training."
        )
    raise OptimizerStateError(
        f"{key} of parameter {index} is a {type(moment).__name__}; expected a plain tensor, or one of torchao's. One "
        f"rank's part of a sharded one (DTensor) is not the whole: save the full state."
    )


def _check_numbers(group: Mapping[str, Any], number: int) -> None:
    """Raise unless lr, ε and decay are numbers, the betas two of them, and flags true or false."""
    betas = group.get("betas", (0.0, 0.0))
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise OptimizerStateError(
            f"Parameter group {number} has betas={betas}; AdamW has two, and another number is another optimizer's."
        )
    for key in FLAGS:
        if not isinstance(group.get(key), bool | int | None):
            raise OptimizerStateError(f"Parameter group {number} has {key}={group[key]!r}; expected true or false.")
    pairs = ("scale_parameter", "beta2_decay")  # Adafactor's ε are two, and its lr may be none
    settings = () if any(pair in group for pair in pairs) else ("lr", "eps", "weight_decay")
    for key, value in [*((key, group.get(key, 0.0)) for key in settings), *(("betas", beta) for beta in betas)]:
        try:
            is_number = not isinstance(value, bool | str) and float(value) == float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            is_number = False
        if not is_number:
            expected = "two numbers" if key == "betas" else "one number"
            raise OptimizerStateError(
                f"Parameter group {number} has {key}={group[key]!r}; expected {expected}, as AdamW has."
            )
