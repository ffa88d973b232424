"""Where a language model has its layers, its head and its tables, seen in one forward pass.

The layers are the `ModuleList` whose elements are called once each, in order, each with what the one before it
returned; the head is the linear layer whose output are the logits; a table is what is only looked up in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fkernel.func.functional import Apply, logits_of
from fkernel.func.inputs.batch import Sequences, take, trim
from fkernel.func.inputs.leaves import leaves_of
from fkernel.func.layers.cut import as_called, lookups
from fkernel.shapes import Tensor, Tree


class Refusal(Exception):
    """Why a model is not cut; it never leaves `fkernel.func.layers.cutting`."""


class Anatomy(NamedTuple):
    """What one forward pass shows.

    Attributes:
        layers: in the order in which they are called.
        outputs: how many things each returns in a tuple; 0 where it returns hidden states alone.
        head: whose output are the logits.
        tables: {name: table} of those that are only looked up in; the head's, where tokens are looked up in it.
    """

    layers: tuple[nn.Module, ...]
    outputs: tuple[int, ...]
    head: nn.Linear
    tables: Tree


def observed(module: nn.Module, apply: Apply, params: Tree, sequences: Sequences) -> Anatomy:
    """Run a module once, and see which layers it calls, which linear layer returns its logits, what it looks up.

    Args:
        module: the model.
        apply: how it is called; see `fkernel.func.layers.cut.as_called`.
        params: θ; for what it does not name, the module's own.
        sequences: the first of them is run.

    Raises:
        Refusal: there is no head, or no chain of layers.
    """
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part)]
    owner = {id(part): parts for parts in lists for part in parts}
    calls: dict[int, list[tuple[nn.Module, Any, Any]]] = {id(parts): [] for parts in lists}
    heads: list[tuple[nn.Linear, Tensor]] = []

    def layer_hook(part: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        calls[id(owner[id(part)])].append((part, args[0] if args else kwargs.get("hidden_states"), out))

    def head_hook(part: nn.Module, args: Any, out: Any) -> None:
        heads[:] = [(part, out)] if isinstance(part, nn.Linear) else []

    hooks = [part.register_forward_hook(layer_hook, with_kwargs=True) for parts in lists for part in parts]
    hooks += [part.register_forward_hook(head_hook) for part in module.modules() if type(part) is nn.Linear]
    named: Tree = dict(module.named_parameters())
    leaves = leaves_of(params)
    own = {**named, **leaves.constants, **leaves.trained}
    watched = lookups({id(leaf): name for name, leaf in own.items()}, None)
    first = trim(take(sequences, slice(0, 1)))

    def logits_now() -> Tensor:
        with watched, as_called(apply):
            return logits_of(module, own, first.input_ids, first.attention_mask)

    try:
        with torch.no_grad():
            logits = leaves.run(logits_now)
    finally:
        for hook in hooks:
            hook.remove()
    if not heads or heads[0][0].bias is not None or not _same(heads[0][1], logits):
        raise Refusal("its logits are not what a linear layer without a bias returns")
    head = heads[0][0]
    layers, outputs = _chain([calls[id(parts)] for parts in lists if len(calls[id(parts)]) == len(parts)], lists)
    table = next(name for name, leaf in named.items() if leaf is head.weight)
    looked_up = dict.fromkeys(use.name for use in watched.made)  # in an order that is every rank's: they gather in it
    inner = {id(leaf) for part in layers for leaf in part.parameters()}
    tables = {
        name: named[name]
        for name in looked_up
        if id(named[name]) not in inner and (name not in watched.others or name == table)
    }
    return Anatomy(layers, outputs, head, tables)


def _same(out: Any, logits: Tensor) -> bool:
    return isinstance(out, Tensor) and out.shape == logits.shape and torch.equal(out.to(logits.dtype), logits)


def _chain(runs: list[list[tuple[nn.Module, Any, Any]]], lists: list[nn.ModuleList]) -> Any:
    """Choose the largest list that runs as a chain of [n t d] -> [n t d]: its layers, how many things they return."""
    chains: list[tuple[int, tuple[nn.Module, ...], tuple[int, ...]]] = []
    orders = {tuple(map(id, parts)) for parts in lists}
    for run in runs:
        out = [len(returned) if isinstance(returned, tuple) else 0 for _, _, returned in run]
        hidden = [returned[0] if isinstance(returned, tuple) else returned for _, _, returned in run]
        given = [h for _, h, _ in run]
        if tuple(id(part) for part, _, _ in run) not in orders:
            continue
        if not all(isinstance(h, Tensor) and h.ndim == 3 and h.shape == given[0].shape for h in (*given, *hidden)):
            continue
        if any(h is not returned for h, returned in zip(given[1:], hidden[:-1], strict=True)):
            continue
        layers = tuple(part for part, _, _ in run)
        chains.append((sum(leaf.numel() for part in layers for leaf in part.parameters()), layers, tuple(out)))
    if not chains:
        raise Refusal("no list of modules in it is called one after another on hidden states")
    return max(chains, key=lambda chain: chain[0])[1:]
