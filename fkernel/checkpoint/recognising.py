"""Which optimizer wrote a state_dict? Its parameter groups' settings tell, and what it keeps of each parameter.

    momentum_decay → NAdam      dampening → SGD         centered → RMSprop        lr_decay → Adagrad
    beta2_decay → Adafactor     ns_steps → Muon         scale_parameter → transformers' Adafactor
    use_muon → Muon where it is True, AdamW with it where not (K. Jordan's)
    state1, state2 → bitsandbytes' AdamW; state1 with eps 0 and a second beta → its Lion
    betas without eps → Lion    decoupled_weight_decay without amsgrad and fused → RAdam
    amsgrad, bias_correction → Adam's family: AdamW in the plain, or AMSGrad, climbing, decay in the gradient

Every other is refused by name (`fkernel.checkpoint.foreign`), and so is a name that none of the optimizer has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fkernel.checkpoint.foreign import check_bitsandbytes, check_entry, check_group, check_settings
from fkernel.errors import OptimizerStateError, listing

WRAPPED = "__bnb_optimizer_quant_state__"
"""Where newer versions of bitsandbytes keep state1 and state2, so that FSDP does not gather them."""

TELLING = {
    "momentum_decay": ("nadam", "torch.optim.NAdam"),
    "dampening": ("sgd", "torch.optim.SGD"),
    "centered": ("rmsprop", "torch.optim.RMSprop"),
    "lr_decay": ("adagrad", "torch.optim.Adagrad"),
    "beta2_decay": ("adafactor", "torch.optim.Adafactor"),
    "scale_parameter": ("transformers_adafactor", "transformers.Adafactor"),
    "ns_steps": ("muon", "torch.optim.Muon"),
}
"""{a name in a parameter group that one optimizer has: (its kind, its class)}."""


class Written(NamedTuple):
    """Who wrote a parameter group.

    Attributes:
        kind: of `fkernel.precond.updates.OPTIMIZERS`.
        writer: the class.
        settings: what the class leaves out of the group, and is known.
    """

    kind: str
    writer: str
    settings: dict[str, Any]


def recognise(state_dict: Any, decoupled: bool | None = None) -> list[Written]:
    """Tell which optimizer wrote each parameter group.

    Args:
        state_dict: what `optimizer.state_dict()` returned.
        decoupled: whether decay is AdamW's (True) or Adam's (False), where the state does not say.

    Raises:
        OptimizerStateError: it is no optimizer's, or one that is not modelled; it says whose.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> [written.writer for written in recognise(torch.optim.NAdam(net.parameters()).state_dict())]
        ['torch.optim.NAdam']
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise OptimizerStateError("This is no optimizer state_dict: it lacks 'state' and 'param_groups'.")
    states, groups = state_dict["state"], state_dict["param_groups"]
    whole = isinstance(states, Mapping) and all(isinstance(entry, Mapping) for entry in states.values())
    whole = whole and isinstance(groups, Sequence) and bool(groups) and all(map(_is_group, groups))
    if not whole:
        raise OptimizerStateError(
            "This is no optimizer state_dict of torch: expected state as {number: {…}} and param_groups as a list of "
            "{'params': [number, …], …}, each with as many param_names where it has any."
        )
    orphans = [index for index in states if not any(index in group["params"] for group in groups)]
    if orphans:
        raise OptimizerStateError(
            f"The state is of parameters {listing([str(index) for index in orphans])}, which no parameter group has: "
            f"state and groups are of two optimizers, or were edited. Save the state again from the training."
        )
    written: list[Written] = []
    for number, group in enumerate(groups):
        entries = {index: flat_entry(states.get(index, {})) for index in group["params"]}
        written.append(_writer(group, entries, number, decoupled))
        for index, entry in entries.items():
            check_entry(entry, index, written[-1].kind)
    return _alike(written, [type(entry.get("exp_avg")) for entry in states.values()])


def _is_group(group: Any) -> bool:
    """Whether a parameter group has its parameters' numbers or names, and as many param_names where it has any."""
    params = group.get("params") if isinstance(group, Mapping) else None
    if not isinstance(params, list | tuple) or not all(isinstance(index, int | str | tuple) for index in params):
        return False
    names = group.get("param_names", [""] * len(params))
    return isinstance(names, list | tuple) and len(names) == len(params) and all(isinstance(n, str) for n in names)


def merged(state_dict: Any) -> Any:
    """Make one state_dict of a list of several optimizers', as a training with Muon and AdamW side by side keeps them.

    Example:
        >>> merged([{"state": {0: {}}, "param_groups": [{"params": [0]}]}] * 2)["param_groups"]
        [{'params': [(0, 0)]}, {'params': [(1, 0)]}]
    """
    if not isinstance(state_dict, list | tuple) or not all(isinstance(each, Mapping) for each in state_dict):
        return state_dict
    if not all({"state", "param_groups"} <= set(each) for each in state_dict):
        return state_dict
    return {
        "state": {(i, key): entry for i, each in enumerate(state_dict) for key, entry in each["state"].items()},
        "param_groups": [
            {**group, "params": [(i, key) for key in group["params"]]}
            for i, each in enumerate(state_dict)
            for group in each["param_groups"]
        ],
    }


def flat_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Give what an optimizer keeps of a parameter at one level, as its own class has it while it runs."""
    return {key: value for key, value in entry.items() if key != WRAPPED} | dict(entry.get(WRAPPED) or {})


def _writer(group: Mapping[str, Any], entries: Mapping[Any, dict[str, Any]], number: int, said: bool | None) -> Written:
    """Tell who wrote one group."""
    keys = {key for entry in entries.values() for key in entry}
    if "state1" in keys:
        check_bitsandbytes(group, keys, number)
        kind, name = ("adamw", "AdamW") if "state2" in keys else ("lion", "Lion")
        check_group(group, number, kind)
        check_settings(group, number, kind)
        return Written(kind, f"bitsandbytes.optim.{name}", {})
    kind, writer = next((known for key, known in TELLING.items() if key in group), ("", ""))
    if "use_muon" in group:
        kind, writer = ("muon", "torch.optim.Muon") if group["use_muon"] else ("adamw", "torch.optim.AdamW")
        said = True
    elif not kind and "betas" in group and "eps" not in group:
        kind, writer = "lion", "bitsandbytes.optim.Lion"
    elif not kind and not {"amsgrad", "fused"} & set(group) and "decoupled_weight_decay" in group:
        kind, writer = "radam", "torch.optim.RAdam"
    check_group(group, number, kind or "adamw")
    if kind and kind != "adamw":
        check_settings(group, number, kind)
        return Written(kind, writer, {})
    return _adams(group, number, said)


def _alike(written: list[Written], moments: Sequence[type]) -> list[Written]:
    """Say of all groups of Adam's family what some tell: that one climbs without decay, or is too small for codes."""
    kind = "adam" if any(by.kind == "adam" for by in written) else "adamw"
    codes = [each.__name__.removeprefix("OptimState") for each in moments if each.__module__.startswith("torchao.")]
    package, bits = ("torchao", codes[0]) if codes else ("torch", "")
    return [
        by._replace(kind=kind, writer=f"{package}{by.writer.removeprefix('torch')}{bits}") if by.settings else by
        for by in written
    ]


def _adams(group: Mapping[str, Any], number: int, said: bool | None) -> Written:
    """Tell which of Adam's family wrote a group."""
    check_settings(group, number, "adam")
    decoupled = group.get("decoupled_weight_decay", said)
    if group["weight_decay"] and decoupled is None:
        raise OptimizerStateError(
            f"Parameter group {number} has weight_decay={group['weight_decay']} and does not say whose: torch before "
            f"2.7, and torchao, write the same for AdamW and for Adam. Say decoupled=True if the training used AdamW."
        )
    decoupled = decoupled is not False
    plain = (decoupled or not group["weight_decay"]) and not group.get("amsgrad") and not group.get("maximize")
    return Written(
        "adamw" if plain else "adam", f"torch.optim.Adam{'W' * decoupled}", {"decoupled_weight_decay": decoupled}
    )
