"""A directory or a file that a training run left → the model, its tokenizer and the optimizer's state, by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint.conditions import Condition, unread_condition, unstepped_condition, weights_only_condition
from fkernel.checkpoint.evidence import conditions_of, trained_dtypes
from fkernel.checkpoint.files import read_json, read_tensors
from fkernel.checkpoint.formats import FORMATS, find_layout, read, wrapped
from fkernel.checkpoint.layout import Layout, is_inner
from fkernel.checkpoint.model import ADAPTER, HUB, load_adapter, load_model, load_tokenizer
from fkernel.checkpoint.optimizer import Names, names_of, stored_optimizer_state
from fkernel.checkpoint.recognising import recognise
from fkernel.checkpoint.unread import unread_optimizers
from fkernel.checkpoint.weights import architecture, filled
from fkernel.distributed import ShardedTree
from fkernel.errors import CheckpointError, CheckpointWarning, ModelError, OptimizerStateError, listing
from fkernel.func import InShards
from fkernel.io import fingerprint
from fkernel.precond import OptimizerState, StoredState, exact_state
from fkernel.shapes import Tree


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint came from.

    Attributes:
        path: what was asked for.
        layout: which of `fkernel.checkpoint.layout`.
        fingerprint: hash over names, shapes, dtypes and contents of all parameters, frozen ones too, as the policy ran
            with them; what is computed from the checkpoint records it, and is refused beside another.
        optimizer: where the optimizer's state was read, or None.
        base: an adapter's base model, or None.
    """

    path: str
    layout: str
    fingerprint: str
    optimizer: str | None = None
    base: str | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a training run left, as the engine takes it.

    Attributes:
        model: the policy, in eval mode, with eager attention; parameters that were not trained do not require grad.
        tokenizer: its tokenizer, or None where none was saved.
        optimizer: the optimizer's state before the next step, about exactly the trained parameters, in real numbers:
            `AdamWState` for AdamW, else that of its kind; None where none was saved.
        step: optimizer steps taken, or None where nothing tells.
        provenance: where it came from.
        stored: that state in the dtypes and codes in which it is kept, for `precond.executed_step`; None with it.
        trained_dtypes: {name: dtype} in which each trained parameter is stored.
        conditions: what the training did, as far as it is known, that the function here does not: dropout, a loss of
            the routers', half precision, frozen parameters. Loading warns of each.
        rounded: the weights that the policy ran with, where θ are the optimizer's float32 masters and differ from them.
        params: θ, where ranks hold it in shards and `model` has no weights; None where `model` has them.
    """

    model: Any
    tokenizer: Any
    optimizer: OptimizerState | None
    step: int | None
    provenance: Provenance
    conditions: tuple[Condition, ...] = ()
    stored: StoredState | None = None
    trained_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    rounded: Tree = field(default_factory=dict)
    params: ShardedTree | None = None

    def as_it_ran(self) -> Any:
        """Give the policy with the weights that it ran with: a copy with `rounded` in it, or `model` itself.

        `func.InShards` of them, where ranks hold θ in shards.
        """
        if self.params is not None:
            rounded = {name: leaf.to(self.params.shards[name]) for name, leaf in self.rounded.items()}
            return InShards(self.model, self.params.replaced(rounded))
        if not self.rounded:
            return self.model
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, leaf in model.named_parameters():
                if name in self.rounded:
                    leaf.copy_(self.rounded[name])
        return model


def load(
    path: str | Path,
    *,
    model: str | Path | torch.nn.Module | None = None,
    base: str | Path | None = None,
    names: Names | None = None,
    order: str | None = None,
    decoupled: bool | None = None,
    optimizer: bool = True,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Load a checkpoint as its training wrote it; `fkernel.checkpoint.layout` and `.formats` say what is recognised.

    Where the optimizer keeps float32 master weights, those are the model's parameters: they are what it steps. The
    weights that the policy ran with are their rounding, `Checkpoint.rounded`; with `optimizer=False`, they are the
    model's.

    Nothing that a file contains is executed, and nothing is fetched unless a name begins with "hub:".

    Args:
        path: a directory, a file of `torch.save({"model": …, "optimizer": …})`, or "hub:org/name".
        model: for layouts without an architecture: a directory with config.json, or a model, which is copied.
        base: an adapter's base model, where the adapter does not record a directory that is here.
        names: the parameters' names in the optimizer's order, where the state records none; a file
            optimizer_param_names.json beside it is read by itself. Parameters that are not named, given or recorded,
            were frozen, and do not require grad.
        order: which known order of the parameters the optimizer had, where several fit; `fkernel.checkpoint.order`.
        decoupled: whether weight decay is AdamW's, where the state does not say; known for Hugging Face's Trainer.
        optimizer: False to leave the optimizer's state unread, where none is wanted or it is of no use here.
        dtype: of the parameters: float32, or float64 for laws.
        trust_remote_code: whether code that came with the model may be executed.

    Raises:
        CheckpointError: no layout is recognised, a file is missing or damaged, or an optimizer's files lie there that
            are not read.
        ModelError: the weights do not fit the model or are not finite, or there is none.
        OptimizerStateError, TreeError: see `adamw_state`; or the scheduler's learning rate is not the optimizer's.

    Warns:
        CheckpointWarning: one for each of `Checkpoint.conditions`.

    Example:
        >>> import tempfile
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, f"{run}/last.pt")
        ...     loaded = load(f"{run}/last.pt", model=net)
        >>> loaded.optimizer.lr
        {'weight': 0.1, 'bias': 0.1}
    """
    if str(path).startswith(HUB):
        policy = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        known_by = fingerprint(dict(policy.named_parameters()))
        return Checkpoint(policy, tokenizer, None, None, Provenance(str(path), "generator", known_by))
    layout = find_layout(path)
    if layout.needs_model and model is None and base is None:
        raise ModelError(
            f"{path} holds weights and says nothing about the architecture ({layout.kind} layout); give model=, a "
            f"directory with config.json or a model."
        )
    policy = _policy(layout, model, base, dtype, trust_remote_code)
    saved = read(layout, policy, optimizer)
    if saved.weights:
        policy = filled(policy, saved.weights, dtype, layout.model)
    _check_finite(policy, layout.model)
    known_by = fingerprint(dict(policy.named_parameters()))
    trainer_state = None if layout.trainer_state is None else read_json(layout.trainer_state, "a trainer's state")
    if layout.names is not None and names is None:
        names = read_json(layout.names, "names of the optimizer's parameters")
    stored, frozen = None, list[str]()
    if saved.optimizer is not None:
        known = (
            True if trainer_state is not None and decoupled is None else decoupled
        )  # Trainer has AdamW, and no other Adam
        recognise(saved.optimizer, known)  # before names are looked for: what is not modelled is said first
        names = names_of(saved.optimizer, _trained(policy), policy, names, order)
        frozen = _freeze(policy, names, path, [] if layout.kind in FORMATS else unread_optimizers(path))
        stored = stored_optimizer_state(saved.optimizer, _trained(policy), names=names, decoupled=known)
        _check_schedule(layout.scheduler, saved.optimizer)
    elif optimizer and (unread := unread_optimizers(path)) and not is_inner(path):
        raise CheckpointError(_advice(path, unread))
    dtypes = trained_dtypes(policy, layout, saved.weights)
    rounded = {} if stored is None else _take_masters(policy, stored, dtypes)
    state = None if stored is None else exact_state(stored, _trained(policy))
    loaded = Checkpoint(
        model=policy,
        tokenizer=tokenizer_of(layout, model, base, trust_remote_code),
        optimizer=state,
        step=step_of(trainer_state, saved.step, stored),
        provenance=Provenance(
            path=str(path),
            layout=layout.kind,
            fingerprint=known_by,
            optimizer=str(layout.optimizer or layout.model) if state else None,
            base=None if base is None else str(base),
        ),
        stored=stored,
        trained_dtypes=dtypes,
        rounded=rounded,
    )
    conditions = conditions_of(policy, layout, saved.weights, saved.optimizer, frozen, rounded)
    entries = {} if stored is None else stored.entries
    unstepped = [name for name, entry in entries.items() if not entry]
    if 0 < len(unstepped) < len(entries) and any("step" in entry for entry in entries.values()):
        conditions += (unstepped_condition(unstepped, len(entries)),)
    if state is None and optimizer and is_inner(path) and (unread := unread_optimizers(path)):
        conditions += (unread_condition(path, unread),)
    elif state is None and optimizer and (trainer_state is not None or layout.kind in FORMATS):
        conditions += (weights_only_condition(path),)
    for condition in conditions:
        warnings.warn(str(condition), CheckpointWarning, stacklevel=2)
    return replace(loaded, conditions=conditions)


def _policy(
    layout: Layout, model: Any, base: str | Path | None, dtype: torch.dtype, trust_remote_code: bool
) -> torch.nn.Module:
    """Load the weights that save_pretrained wrote; or make the architecture, whose weights are read after it."""
    if (layout.model / ADAPTER).is_file():
        return load_adapter(layout.model, base, dtype=dtype, trust_remote_code=trust_remote_code, name=layout.adapter)
    if layout.pretrained:
        return load_model(layout.model, dtype=dtype, trust_remote_code=trust_remote_code)
    if base is not None:  # an adapter's, of a layout that may not keep it
        return wrapped(layout, load_model(base, dtype=dtype, trust_remote_code=trust_remote_code))
    given = layout.config if model is None else model
    assert given is not None  # `load` has asked for it
    return wrapped(layout, architecture(given, trust_remote_code))


def _check_finite(policy: torch.nn.Module, source: Path) -> None:
    for name, leaf in policy.named_parameters():
        if leaf.is_floating_point() and leaf.numel() and not all(bool(end.isfinite()) for end in leaf.aminmax()):
            raise ModelError(
                f"{source} has {name!r} with a NaN or an infinite number in it: the training diverged, or the file is "
                f"damaged. Take an earlier checkpoint."
            )


def _take_masters(policy: Any, stored: StoredState, dtypes: Mapping[str, torch.dtype]) -> Tree:
    """Make the float32 masters θ, where the optimizer keeps any; the rounded weights that they replace are returned."""
    rounded: Tree = {}
    for name, leaf in policy.named_parameters():
        if name in stored.masters:
            rounded[name] = leaf.detach().to(dtypes.get(name, leaf.dtype), copy=True)
            leaf.data = stored.masters[name].to(leaf.device, leaf.dtype)
            if bool((rounded[name] == leaf).all()):
                del rounded[name]
    return rounded


def _trained(model: torch.nn.Module) -> Tree:
    return {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad}


def _freeze(model: torch.nn.Module, names: Any, path: str | Path, files: list[Path]) -> list[str]:
    """Mark the parameters that the optimizer does not have as not trained; they are returned.

    Where several files of optimizers lie there, and they are not one's that a format brings together, it is refused.
    """
    own = {name for group in names for name in group}
    foreign = sorted(own - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if foreign:
        raise OptimizerStateError(
            f"The optimizer's parameters are named {listing(foreign)}, which the model does not have. Names are those "
            f"of model.named_parameters()."
        )
    frozen = [name for name in _trained(model) if name not in own]
    if frozen and len(files) > 1:
        raise CheckpointError(
            f"The optimizer at {path} does not have {listing(frozen)}, and several files of optimizers lie there: "
            f"{listing([str(item) for item in files])}. One step of one optimizer is explained; "
            f"remove the others, or say optimizer=False to go on without any."
        )
    for name, leaf in model.named_parameters():
        if name in frozen:
            leaf.requires_grad_(False)
    return frozen


def _advice(path: str | Path, unread: list[Path]) -> str:
    files = listing([str(item) for item in unread])
    return (
        f"In or beside {path} lies an optimizer's state that is not read: {files}. It is of a layout that is not "
        f"recognised, or of the directory above: load that one; or convert it to one optimizer.pt of the whole model "
        f"beside the weights. Say optimizer=False to load the weights without it: then no step can be explained."
    )


def _check_schedule(path: Path | None, state_dict: Any) -> None:
    """Hold the scheduler's learning rates against the optimizer's: both are those of the next step."""
    if path is None:
        return
    last = read_tensors(path, "a scheduler's state").get("_last_lr")
    own = [float(group["lr"]) for group in state_dict["param_groups"]]
    if last is None or len(last) != len(own):
        return  # a scheduler of another kind
    if any(abs(float(a) - b) > 1e-6 * abs(b) for a, b in zip(last, own, strict=True)):
        raise OptimizerStateError(
            f"The optimizer's learning rates are {own}, its scheduler at {path} has set {last}: the two are not of the "
            f"same step. Remove the one that is stale."
        )


def step_of(trainer_state: Any, saved: int | None, optimizer: StoredState | None) -> int | None:
    """Tell how many optimizer steps were taken, by what knows it first; None where nothing tells."""
    if isinstance(trainer_state, Mapping) and "global_step" in trainer_state:
        return int(trainer_state["global_step"])
    if saved is not None:
        return saved
    steps = [int(float(entry.get("step", 0))) for entry in optimizer.entries.values()] if optimizer else []
    return max(steps) if steps else None


def tokenizer_of(layout: Layout, model: Any, base: str | Path | None, trust_remote_code: bool) -> Any:
    """Load the tokenizer from beside the checkpoint, its weights, its base model or its architecture."""
    for place in (*layout.places, base, None if isinstance(model, torch.nn.Module) else model):
        if place is not None and (str(place).startswith(HUB) or Path(place).is_dir()):
            found = load_tokenizer(place, trust_remote_code=trust_remote_code)
            if found is not None:
                return found
    return None
