"""A causal language model as pieces that run one after another: before ∘ layer_1 ∘ … ∘ layer_L ∘ after ∘ head.

    h_0 = before(ids)      h_i = layer_i(h_{i−1}; call_i)      x = after(h_L)      z = x Wᵀ

Nothing here knows a model. The module runs as it is, with other `forward`s in its layers' and its head's place for the
length of a call: `before` runs it with layers that return what they are given, and takes down how each is called
(rotary positions, masks); `after` runs it with a last layer that returns h_L, up to the head. A layer by itself is
`functional_call` of it, called as it was. So the model's own attention runs, fused or not, and nothing is ever vmapped.

A table that is only ever looked up in (tokens, learned positions) is looked up in the `Source` of the parameters
instead: its gradient is that of the rows, and it is never moved, cast or gathered as a whole.

Where a model may be cut, and whether the pieces make the whole, is asked in `fkernel.func.layers.cutting`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fkernel.func.constants import seen_through
from fkernel.func.functional import logits_of
from fkernel.func.handles.head import TableRows
from fkernel.func.inputs.objective import TokenWeights
from fkernel.func.inputs.source import HALF, Source, widened
from fkernel.func.padding import padding_rows
from fkernel.func.taps.plan import GradientPlan
from fkernel.shapes import Tensor, Tree


class Call(NamedTuple):
    """How a model calls a layer, but for the hidden states: those are first, or named."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool


class Lookup(NamedTuple):
    """One lookup in a table: ids of any shape, and the rows that were found."""

    name: str
    ids: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Cut:
    """A model in pieces, as `fkernel.func.layers.cutting.cut_of` makes it. Names are those of the parameters.

    Attributes:
        module: a structural copy of the model, with its own attention.
        layers: layer_1 … layer_L.
        outputs: how many things each returns in a tuple; 0 where it returns hidden states alone.
        head: a linear layer without a bias, whose output are the logits.
        names: {name: name within the layer} of each layer's trained parameters.
        before: trained parameters of the first piece, the tables that are looked up in included.
        after: trained parameters between the last layer and the head, and those that nothing uses.
        tables: {name: table} of all tables that are only looked up in, trained or not; the module's own.
        table: the head's own name.
        trained: whether the head is trained.
        frozen: {name: name within it} of each layer's parameters that are not trained and lie on the meta device, so
            that their values are asked of the source; and last, of what is outside of layers, tables and head.
        plans: how each layer tells the sequences of a block apart; None where it cannot. See
            `fkernel.func.taps.batched`.
        tokens: which tokens f weighs, at what temperature.
        withholds: as `Apply`.
        through_detach: as `Apply`.
    """

    module: nn.Module = field(repr=False)
    layers: tuple[nn.Module, ...] = field(repr=False)
    outputs: tuple[int, ...] = field(repr=False)
    head: nn.Linear
    names: tuple[dict[str, str], ...] = field(repr=False)
    before: tuple[str, ...]
    after: tuple[str, ...]
    tables: Tree = field(repr=False)
    table: str
    trained: bool
    tokens: TokenWeights
    frozen: tuple[dict[str, str], ...] = field(default=(), repr=False)
    plans: tuple[GradientPlan | None, ...] = field(default=(), repr=False)
    withholds: bool | None = None
    through_detach: bool = False

    @property
    def tied(self) -> bool:
        """Whether the head's table is one that tokens are looked up in."""
        return self.trained and self.table in self.tables

    @property
    def lowest(self) -> int:
        """The first piece that has a trained parameter: −1 `before`, i layer_{i+1}, L what comes after."""
        if self.before:
            return -1
        return next((i for i, names in enumerate(self.names) if names), len(self.layers))


def head_rows(cut: Cut, source: Source) -> TableRows:
    """Make the head's table, by rows; where it is not trained it is the module's own, if that has values."""
    if cut.trained or cut.head.weight.is_meta:
        return source.table(cut.table)
    return lambda rows: widened(cut.head.weight.detach()[rows])


def constants_of(cut: Cut, piece: int | None, source: Source) -> Tree:
    """Return what a piece cannot run with as its module has it and nobody differentiates, by the piece's own names.

    Args:
        cut: the model.
        piece: a layer; None for all that is outside of layers, tables and head apart.
        source: of what is frozen and lies on the meta device.

    Returns:
        Parameters and buffers in half precision, widened; parameters without values, from the source.
    """
    frozen = cut.frozen[-1 if piece is None else piece] if cut.frozen else {}
    given = source(frozen) if frozen else {}
    module = cut.module if piece is None else cut.layers[piece]
    trained = {*cut.before, *cut.after, cut.table} if piece is None else {*cut.names[piece].values()}
    elsewhere = set[int]()
    if piece is None:
        elsewhere = {id(leaf) for part in cut.layers for leaf in (*part.parameters(), *part.buffers())}
        elsewhere |= {id(leaf) for leaf in (*cut.tables.values(), cut.head.weight)}
    wide = {
        name: widened(leaf.detach())
        for name, leaf in (*module.named_parameters(), *module.named_buffers())
        if leaf.dtype in HALF and not leaf.is_meta and id(leaf) not in elsewhere and name not in trained
    }
    return wide | {frozen[name]: leaf for name, leaf in given.items()}


def before(
    cut: Cut, source: Source, leaves: Tree, ids: Tensor, mask: Tensor, only: bool = False
) -> tuple[Tensor, list[Call], list[Lookup]]:
    """Run what comes before the layers.

    Args:
        cut: the model.
        source: of its tables.
        leaves: parameters of this piece and `constants_of` it, tables apart.
        ids: [n t].
        mask: [n t], 1 on tokens.
        only: whether only h_0 is wanted, and no calls.

    Returns:
        h_0, [n t d]; how each layer is called; the lookups. Gradients are traced where they are enabled.
    """
    calls: list[Call] = []
    first: list[Tensor] = []

    def stub(i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            h, call = _taken_apart(args, kwargs)
            first.append(h)
            calls.append(call)
            if only or i == len(cut.layers) - 1:
                raise Stopped
            return _as_returned(h, cut.outputs[i])

        return forward

    looked_up = lookups({id(table): name for name, table in cut.tables.items()}, source, cut)
    with looked_up, _replaced(zip(cut.layers, map(stub, range(len(cut.layers))), strict=True)):
        _run(cut, leaves, ids, mask)
    return first[0], calls, looked_up.made


def layer(cut: Cut, i: int, leaves: Tree, h: Tensor, call: Call) -> Tensor:
    """Run one layer.

    Args:
        cut: the model.
        i: which layer, from 0.
        leaves: its parameters and `constants_of` it, by their names within it.
        h: [n t d].
        call: how it is called.

    Returns:
        [n t d].
    """
    args = call.args if call.named else (h, *call.args)
    kwargs = {**call.kwargs, "hidden_states": h} if call.named else call.kwargs
    with as_called(cut):
        out = functional_call(cut.layers[i], leaves, args, kwargs)
    return out[0] if cut.outputs[i] else out


def after(cut: Cut, source: Source, leaves: Tree, h: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Run what comes between the last layer and the head.

    Args:
        cut: the model.
        source: of its tables.
        leaves: parameters of this piece and `constants_of` it.
        h: h_L, [n t d].
        ids: [n t].
        mask: [n t].

    Returns:
        x, the head's input, [n t d].
    """
    inputs: list[Tensor] = []

    def stub(i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = _taken_apart(args, kwargs)[0]
            return _as_returned(h if i == len(cut.layers) - 1 else given, cut.outputs[i])

        return forward

    def last(x: Tensor) -> Any:
        inputs.append(x)
        raise Stopped

    stubs = [*zip(cut.layers, map(stub, range(len(cut.layers))), strict=True), (cut.head, last)]
    with lookups({id(table): name for name, table in cut.tables.items()}, source, cut), _replaced(stubs):
        _run(cut, leaves, ids, mask)
    return inputs[0]


class Stopped(BaseException):
    """A run has what it was for; no model's `except Exception` may swallow it."""


def _run(cut: Cut, leaves: Tree, ids: Tensor, mask: Tensor) -> None:
    try:
        with as_called(cut):
            logits_of(cut.module, leaves, ids, mask)
    except Stopped:
        pass


@contextmanager
def as_called(cut: Any) -> Iterator[None]:
    """Enter what `Apply` enters around its module, attention kernels apart."""
    with ExitStack() as stack:
        if cut.withholds is not None:
            stack.enter_context(padding_rows(cut.withholds))
        if cut.through_detach:
            stack.enter_context(seen_through())
        yield


class lookups(TorchFunctionMode):
    """While active, lookups in watched tables find their rows in a source; what else uses the tables is noted.

    Attributes:
        made: the lookups, in order.
        others: names of tables that something else used.
    """

    def __init__(self, names: dict[int, str], source: Source | None, cut: Cut | None = None) -> None:
        """Watch tables by identity. Without a source they are looked up in themselves, and nothing is traced."""
        super().__init__()
        self.names, self.source = names, source
        self.trained = frozenset(() if cut is None else cut.before)
        self.made: list[Lookup] = []
        self.others: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look up, pass everything else on."""
        kwargs = kwargs or {}
        if func is F.embedding and (use := _plain_lookup(*args, **kwargs)) and id(use[1]) in self.names:
            return self._looked_up(self.names[id(use[1])], *use)
        self.others.update(self.names[id(leaf)] for leaf in (*args, *kwargs.values()) if id(leaf) in self.names)
        return func(*args, **kwargs)

    def _looked_up(self, name: str, ids: Tensor, table: Tensor) -> Tensor:
        if self.source is None:
            rows = table[ids]
        elif name in self.trained:
            rows = self.source.leaf(name, ids).requires_grad_(torch.is_grad_enabled())
        else:
            rows = self.source.leaf(name, ids) if table.is_meta else widened(table.detach()[ids])
        self.made.append(Lookup(name, ids, rows))
        return rows.clone() if rows.requires_grad else rows  # what a model overwrites must not be a leaf


def _plain_lookup(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, Tensor] | None:
    changes = padding_idx is not None or max_norm is not None or scale_grad_by_freq
    return None if changes else (input, weight)


def _taken_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs, named=False)
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], Call((), rest, named=True)


def _as_returned(h: Tensor, outputs: int) -> Any:
    return (h, *[None] * (outputs - 1)) if outputs else h


@contextmanager
def _replaced(stubs: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Put other forwards in modules' place, and their own back: as attributes of an instance, where some were."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in stubs:
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own
