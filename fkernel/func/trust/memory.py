"""Cache of certificates by function, and the contexts that skip or collect them.

Functions are weak keys, with the kinds of batches that they were certified on; no parameters, batches or results are
kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch.utils import _pytree as pytree

from fkernel.boundary import public
from fkernel.errors import ModelError, listing
from fkernel.func.inputs.batch import Sequences
from fkernel.func.inputs.objective import Function
from fkernel.func.taps.plan import GradientPlan
from fkernel.func.trust.comparisons import NAMES, Certificate
from fkernel.shapes import Tensor, Tree


@dataclass
class Known:
    """Cached results for f on batches of one kind.

    Attributes:
        width: of the widest batch that values were certified for; −1 for none.
        planned: of the widest batch that gradients were certified for.
        plan: how its gradients are computed.
        derivatives: {name of the order: the function that computes it}.
        cuts: {with fused attention: its model cut at layers, or why it cannot be}. See `fkernel.func.layers.cutting`.
        certificates: all certificates.
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
    """Skip certificates by name, to save their cost.

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
    """Collect all certificates that are made within the context, of any function.

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
    """Return whether a certificate is not skipped."""
    return name not in _skipped.get()


@public
def certificates(f: Function) -> tuple[Certificate, ...]:
    """List f's certificates: for each name and bound, the one with the largest error.

    Args:
        f: (params, batch) -> [n], after use.

    Returns:
        Certificates, in the order in which they were first made; empty before any use.

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
    """Cache a certificate that was made elsewhere."""
    keep(known_of(f, params, batch), certificate)


def keep(known: Known, certificate: Certificate) -> None:
    """Cache a certificate, and append it to the lists of `made_certificates`."""
    known.certificates.append(certificate)
    for made in _collecting.get():
        made.append(certificate)


def known_of(f: Any, params: Tree, batch: Any = None) -> Known:
    """Return the cached results of f for parameters and batches like these."""
    leaves = tuple((name, leaf.shape, leaf.dtype, leaf.device) for name, leaf in params.items())
    return _remembered(f).setdefault((leaves, _kind(batch)), Known())


def _remembered(f: Any) -> dict[Hashable, Known]:
    try:
        return _known.setdefault(f, {})
    except TypeError:  # f has no hash, or takes no weak reference
        return {}


def _kind(batch: Any) -> Hashable:
    """Return the key of a kind of batch: its structure, and the shape of a row except for tokens."""
    leaves, spec = pytree.tree_flatten(batch, is_leaf=lambda node: isinstance(node, Sequences))
    rows = [leaf.shape[1:] if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
    return str(spec), *rows
