"""What is remembered of the functions that were certified, and which certificates are left out.

A function is remembered by itself, weakly, with the kinds of batches that it was certified on: nothing of its
parameters, batches or results stays.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch.utils import _pytree as pytree

from fkernel.errors import ModelError, listing
from fkernel.func.inputs.batch import Sequences
from fkernel.func.inputs.objective import Function
from fkernel.func.taps.plan import GradientPlan
from fkernel.func.trust.comparisons import NAMES, Certificate
from fkernel.shapes import Tensor, Tree


@dataclass
class Known:
    """What is known of f on batches of one kind.

    Attributes:
        width: of the widest batch that values were certified for; −1 for none.
        planned: of the widest batch that gradients were certified for.
        plan: how its gradients are taken.
        derivatives: {name of the order: how it is taken}.
        cuts: {with fused attention: its model in pieces, or why it cannot be cut}. See `fkernel.func.layers.cutting`.
        certificates: all that were made.
    """

    width: int = -1
    planned: int = -1
    plan: GradientPlan | None = None
    derivatives: dict[str, Any] = field(default_factory=dict)
    cuts: dict[bool, Any] = field(default_factory=dict)
    certificates: list[Certificate] = field(default_factory=list)


_known: weakref.WeakKeyDictionary[Any, dict[Hashable, Known]] = weakref.WeakKeyDictionary()
_collecting: ContextVar[tuple[list[Certificate], ...]] = ContextVar("collecting", default=())
_skipped: ContextVar[frozenset[str]] = ContextVar("skipped", default=frozenset())


@contextmanager
def skip_certificates(*names: str) -> Iterator[None]:
    """Leave certificates out, by name, where their price is not worth it.

    Args:
        names: of "rows", "values", "company", "forward", "derivative".

    Raises:
        ModelError: there is no certificate of that name, or none is named.

    Example:
        >>> with skip_certificates("company"):
        ...     pass
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ModelError(f"There is no certificate {listing(unknown)}; name some of {', '.join(NAMES)}.")
    token = _skipped.set(_skipped.get() | {*names})
    try:
        yield
    finally:
        _skipped.reset(token)


@contextmanager
def made_certificates() -> Iterator[list[Certificate]]:
    """Collect the certificates that are made meanwhile, of whatever function.

    Example:
        >>> import torch
        >>> from fkernel.func import evaluate
        >>> with made_certificates() as made:
        ...     _ = evaluate(lambda params, x: x @ params["w"])({"w": torch.zeros(2)}, torch.eye(2))
        >>> [one.name for one in made]
        ['company']
    """
    made: list[Certificate] = []
    token = _collecting.set((*_collecting.get(), made))
    try:
        yield made
    finally:
        _collecting.reset(token)


def runs(name: str) -> bool:
    """Tell whether a certificate is to be made."""
    return name not in _skipped.get()


def certificates(f: Function) -> tuple[Certificate, ...]:
    """List what was certified of f: of each name and wording, what was furthest off.

    Args:
        f: (params, batch) -> [n], after it was computed with.

    Returns:
        Certificates, in the order in which they were first made; none where nothing was computed.

    Example:
        >>> import torch
        >>> from fkernel.func import per_sequence_grad
        >>> f = lambda params, x: x @ params["w"]
        >>> _ = per_sequence_grad(f)({"w": torch.zeros(2)}, torch.eye(2))
        >>> [one.name for one in certificates(f) if one.passed]
        ['company', 'rows']
    """
    worst: dict[tuple[str, float], Certificate] = {}
    for known in _remembered(f).values():
        for one in known.certificates:
            key = (one.name, one.bound if one.name != "derivative" else 0.0)
            if key not in worst or not one.error <= worst[key].error:
                worst[key] = one
    return tuple(worst.values())


def note(f: Function, params: Tree, batch: Any, certificate: Certificate) -> None:
    """Remember a certificate that was made elsewhere."""
    keep(known_of(f, params, batch), certificate)


def keep(known: Known, certificate: Certificate) -> None:
    """Remember a certificate, and hand it to whoever collects them."""
    known.certificates.append(certificate)
    for made in _collecting.get():
        made.append(certificate)


def known_of(f: Any, params: Tree, batch: Any = None) -> Known:
    """What is known of f on parameters and batches like these."""
    leaves = tuple((name, leaf.shape, leaf.dtype, leaf.device) for name, leaf in params.items())
    return _remembered(f).setdefault((leaves, _kind(batch)), Known())


def _remembered(f: Any) -> dict[Hashable, Known]:
    try:
        return _known.setdefault(f, {})
    except TypeError:  # f cannot be remembered: it has no hash, or takes no weak reference
        return {}


def _kind(batch: Any) -> Hashable:
    """What batches of one kind share: their structure, and the shape of a row where it is not tokens."""
    leaves, spec = pytree.tree_flatten(batch, is_leaf=lambda node: isinstance(node, Sequences))
    rows = [leaf.shape[1:] if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
    return str(spec), *rows
