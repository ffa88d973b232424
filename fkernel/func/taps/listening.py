"""The mode that taps every use of every parameter in one plain pass over the whole batch.

    linear      y_nt = W a_nt + b         ∂f_n/∂W = Σ_t δ_nt a_ntᵀ      ∂f_n/∂b = Σ_t δ_nt      δ_nt = ∂Σ_m f_m/∂y_nt
    conv1d      y_nt = Wᵀ a_nt + b        ∂f_n/∂W = Σ_t a_nt δ_ntᵀ      ∂f_n/∂b = Σ_t δ_nt
    embedding   y_nt = W[i_nt]            ∂f_n/∂W[v] = Σ_{t: i_nt = v} δ_nt
    grouped     y_nt = W[e_nt]ᵀ a_nt      ∂f_n/∂W[e] = Σ_{t: e_nt = e} a_nt δ_ntᵀ
    stacked     y_ent = W[e]ᵀ a_ent       ∂f_n/∂W[e] = Σ_t a_ent δ_entᵀ
    scale       y_nt = w ⊙ x_nt + b       ∂f_n/∂w = Σ_t δ_nt ⊙ x_nt     ∂f_n/∂b = Σ_t δ_nt      (x: a norm's input)
    rows        v = W[i] in any operation as an embedding's, δ_v = ∂Σ_m f_m/∂v
    own         any other                 v_n = v for every n, the operation under vmap:  ∂f_n/∂v = ∂Σ_m f_m/∂v_n

W may be computed from parameters (`fkernel.func.taps.made`), rows may be gathered from all sequences
(`fkernel.func.taps.whose`), and where a sequence uses few of many matrices, only those are stored
(`fkernel.func.handles.touched`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fkernel.errors import ModelError
from fkernel.func.handles.forms import Factored, SparseRows, Summand
from fkernel.func.handles.touched import Touch
from fkernel.func.taps.known import Part, parts_of
from fkernel.func.taps.made import Made, made_by
from fkernel.func.taps.plan import GradientPlan
from fkernel.func.taps.uses import Layer, LayerCall, listen, listen_to
from fkernel.func.taps.whose import Whose, by_sequence
from fkernel.shapes import Tensor, Tree


class Tap(LayerCall):
    """One use, over n sequences, of a parameter or of a tensor computed from parameters.

    Attributes:
        made: W, or v.
        shape: of the operation's result, as f computes it.
        owners: the sequence of each row; None where sequences are outermost.
        row: [n, *shape of W], for gradients that are summed as soon as δ arrives.
    """

    def __init__(self, made: Made, part: Part, n: int, shape: torch.Size, owners: Tensor | None = None) -> None:
        """Store the input."""
        self.turned = made.turned and part.layer in _OF_TURNED
        super().__init__(made.name, _OF_TURNED[part.layer] if self.turned else part.layer)
        if (made.turned and not self.turned) or (made.ids is not None and part.layer not in _BY_ROW):
            made = made._replace(whole=None)  # pulled back through its own graph
        self.made, self.n, self.shape, self.owners = made, n, shape, owners
        self.normalised, self.ends, self.size = part.normalised, part.ends, made.value.shape
        self.input = None if part.input is None else part.input.detach()
        self.row: Tensor | None = None

    def hear(self, cotangent: Tensor) -> None:
        """Split δ by sequence."""
        cotangent = cotangent.transpose(0, 1) if self.layer == "stacked" else cotangent
        self.cotangent = δ = by_sequence(cotangent, self.n, self.owners)
        if self.layer == "own":
            self.row = cotangent
        if self.layer not in ("scale", "shift"):
            return
        if self.layer == "scale":
            x = self.normalised() if self.normalised is not None else self.input
            assert x is not None
            δ = δ * by_sequence(x.expand(cotangent.shape), self.n, self.owners)
        repeated = (1,) * (cotangent.ndim - len(self.size))
        self.cotangent = self.row = δ.sum_to_size(self.n, *repeated, *self.size).reshape(self.n, *self.size)
        self.input, self.normalised = None, None

    def gradient(self) -> Summand | Touch | None:
        """Return the gradients of its n sequences, or those of used matrices; None without a cotangent."""
        δ, e = self.cotangent, self.made.chosen
        if δ is None:
            return None
        if self.row is not None and self.made.whole is not None and self.made.ids is not None:
            return Touch(self.made.ids.expand(self.n, -1), self.row)
        if self.row is not None:
            return self.row if e is None else Touch(δ.new_full((self.n, 1), e).long(), self.row[:, None])
        if self.layer == "rows":
            assert self.made.ids is not None
            return Touch(by_sequence(self.made.ids, self.n, self.owners, -1), δ)
        assert self.input is not None
        a = self.input.transpose(0, 1) if self.layer == "stacked" else self.input
        a = a.expand(self.n, *a.shape[1:]) if len(a) == 1 else a
        a = by_sequence(a, self.n, self.owners)
        δ = δ.reshape(self.n, -1, δ.shape[-1])
        if self.layer == "embedding":
            return SparseRows(a.reshape(self.n, -1), δ, self.size[0])
        a = a.reshape(self.n, -1, a.shape[-1])
        several = self.layer in ("grouped", "stacked")
        left, right = (δ, a) if self.layer == "linear" or (several and self.turned) else (a, δ)
        if several:
            return Touch(self._groups(left.shape[1]), left, right)
        return Factored(right, left) if e is None else Touch(δ.new_full(δ.shape[:2], e).long(), left, right)

    def _groups(self, r: int) -> Tensor:
        """Return the matrix of each row of a sequence, [n r]; −1 for none."""
        assert self.input is not None
        if self.ends is None:  # all of them, one after another
            e = torch.arange(self.size[0], device=self.input.device)
            return e.repeat(r // len(e)).expand(self.n, -1)
        rows = torch.arange(len(self.input), device=self.ends.device, dtype=self.ends.dtype)
        groups = torch.searchsorted(self.ends, rows, right=True)
        return by_sequence(torch.where(groups < len(self.ends), groups, -1), self.n, self.owners, -1)


_OF_TURNED: dict[Layer, Layer] = {"linear": "conv1d", "conv1d": "linear", "grouped": "grouped", "stacked": "stacked"}
"""The kind of layer in terms of W, where the operation uses Wᵀ."""
_BY_ROW: tuple[Layer, ...] = ("rows", "scale", "shift", "own")
"""Kinds of layers whose gradients of W[i] are by row."""


class tap(TorchFunctionMode):
    """While active, uses of watched parameters are taken out of the graph, and tapped.

    Attributes:
        n: sequences of the batch.
        uses: the tapped ones, in order.
        loose: (parameter, function) of all other uses.
    """

    def __init__(self, watched: Tree, zero: Tensor, n: int, plan: GradientPlan | None = None) -> None:
        """Watch parameters that are traced; `zero` is a traced 0."""
        super().__init__()
        self.zero, self.n, self.whose, self.plan = zero, n, Whose(n), plan
        self.uses: list[LayerCall] = []
        self.loose: set[tuple[str, str]] = set()
        self.made = {id(leaf): Made(leaf, {name: leaf}, name) for name, leaf in watched.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take uses of watched parameters out of the graph, pass everything else on."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, Tensor)]
        given = [self.made[id(leaf)] for leaf in tensors if id(leaf) in self.made]
        if not given:
            out = func(*args, **kwargs)
            self.whose.follow(func, args, kwargs, out)
            return out
        data = [leaf for leaf in tensors if id(leaf) not in self.made]
        parts = [part for part in parts_of(func, args, kwargs) if self._stands_for_all(part)]
        # An operation on parameters alone (positions) is computed once for all sequences, even if its layer is known;
        # and a parameter in the place of data is not a layer's weight.
        alone = not any(leaf.is_floating_point() for leaf in data) and all(leaf.ndim < 2 for leaf in data)
        if not alone and len(parts) == len(given) and all(id(part.input) not in self.made for part in parts):
            return self._known(func, args, kwargs, parts)
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in data):
            return self._combined(func, args, kwargs, given, data)
        out = func(*args, **kwargs)
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not made or _is_in_place(func):
            self._note(func, given, out)
        for leaf in made:
            if id(leaf) not in self.made:
                self.made[id(leaf)] = made_by(func, args, kwargs, leaf, given)
        return out

    def _note(self, func: Any, given: Sequence[Made], out: Any) -> None:
        """Record another use of watched parameters; a use that is not in the plan is an error."""
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(out)):
            return  # a shape or dtype has no gradient
        for use in ((name, getattr(func, "__qualname__", repr(func))) for one in given for name in one.leaves):
            if self.plan is not None and use not in self.plan.loose:
                raise ModelError(
                    f"{use[0]!r} is used by {use[1]} in one sequence and not in another, so its gradient cannot be "
                    f"captured; f must do the same operations for every sequence."
                )
            self.loose.add(use)

    def _stands_for_all(self, part: Part) -> bool:
        """Return whether the weight is a parameter, and not one for each row of data (W[i] in a bmm)."""
        made = self.made.get(id(part.weight))
        return made is not None and not (part.layer == "stacked" and made.ids is not None)

    def _known(self, func: Any, args: Any, kwargs: Any, parts: Sequence[Part]) -> Any:
        """Compute with constants, and tap the result."""
        made = [self.made[id(part.weight)] for part in parts]

        def constant(leaf: Any) -> Any:
            return leaf.detach() if id(leaf) in self.made else leaf

        out = func(*map(constant, args), **{key: constant(arg) for key, arg in kwargs.items()})
        if not torch.is_grad_enabled():
            return out  # under no_grad this layer has no gradient
        stacked = parts[0].layer == "stacked"
        owners = None if stacked or not out.ndim else self.whose.of((args, kwargs), len(out))
        shape = out.transpose(0, 1).shape if stacked else out.shape
        taps = [Tap(one, part, self.n, shape, owners) for one, part in zip(made, parts, strict=True)]
        self.uses.extend(taps)
        out = listen(out if owners is not None else self._expanded(out, taps), *taps, zero=self.zero)
        self.whose.note(out, owners)
        return out

    def _expanded(self, out: Tensor, taps: Sequence[Tap]) -> Tensor:
        """Check that an operation's rows belong to sequences; expand a result that was computed once for all."""
        shape, stacked = taps[0].shape, taps[0].layer == "stacked"
        if len(shape) > 1 and shape[0] % self.n == 0:
            return out
        if len(shape) > 1 and shape[0] == 1 and not stacked:
            return out.expand(self.n, *out.shape[1:])
        raise ModelError(
            f"{taps[0].parameter!r} is used in an operation whose result has shape {list(out.shape)}, in a batch of "
            f"{self.n}; its gradients can be told apart only where the first dimension counts sequences."
        )

    def _combined(self, func: Any, args: Any, kwargs: Any, given: Sequence[Made], data: Sequence[Tensor]) -> Any:
        """Tap parameters themselves where an unknown operation combines them with the batch."""
        first = args[0] if args else None
        if all(self._is_by_row(one) for one in given) and not (_is_in_place(func) and id(first) in self.made):
            rows = {id(one.value): one for one in given}

            def tapped(leaf: Any) -> Any:
                return self._row(rows[id(leaf)], data) if id(leaf) in rows else leaf

            args, kwargs = pytree.tree_map(tapped, (args, kwargs))
            out = func(*args, **kwargs)
            self.whose.follow(func, args, kwargs, out)
            return out
        traced = [leaf for leaf in data if leaf.requires_grad]
        if _is_in_place(func) or any(not leaf.ndim or len(leaf) != self.n for leaf in traced):
            out = func(*args, **kwargs)
            self._note(func, given, out)
            return out
        return self._mapped(func, args, kwargs)

    def _is_by_row(self, one: Made) -> bool:
        return one.ids is not None or (one.of is not None and len(one.value) == self.n)

    def _row(self, one: Made, data: Sequence[Tensor]) -> Tensor:
        """Tap a tensor that has one row for each row of the batch."""
        owners = self.whose.of(list(data), len(one.value))
        if owners is None and len(one.value) % self.n:
            raise ModelError(f"Rows of {one.name!r} are used beside data whose rows are no sequence's.")
        part = Part("shift" if one.of is not None else "rows", one.value)
        use = Tap(one if one.of is None else one.of, part, self.n, one.value.shape, owners)
        self.uses.append(use)
        return listen_to(one.value.detach(), use, self.zero)

    def _mapped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation under vmap, with an own copy of the parameters for every sequence."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        dims: list[int | None] = []
        for i, leaf in enumerate(leaves):
            one = self.made.get(id(leaf))
            if one is not None:
                use = Tap(one, Part("own", one.value), self.n, torch.Size((self.n, *leaf.shape)))
                self.uses.append(use)
                leaves[i] = listen_to(leaf.detach().expand(self.n, *leaf.shape), use, self.zero)
            is_rows = isinstance(leaf, Tensor) and bool(leaf.ndim) and len(leaf) == self.n
            dims.append(0 if one is not None or is_rows else None)
            if one is None and is_rows:
                leaves[i] = leaf[:, None]  # each is a batch of one
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def each(*tensors: Tensor) -> Tensor:
            own = [*leaves]
            for i, leaf in zip(places, tensors, strict=True):
                own[i] = leaf
            more, named = pytree.tree_unflatten(own, spec)
            return func(*more, **named)[0]

        out = vmap(each, in_dims=tuple(dims[i] for i in places), randomness="error")(*[leaves[i] for i in places])
        if self.plan is None:
            with torch.no_grad():
                whole = func(*args, **kwargs)
            if out.shape != whole.shape or not (out.is_meta or torch.allclose(out, whole, rtol=1e-4, atol=1e-5)):
                raise ModelError(f"{func.__name__} does not treat sequences one by one.")
        return out


def _leaves(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """List an operation's arguments; only nested ones are flattened, since every operation calls this."""
    given = [*args, *kwargs.values()]
    return pytree.tree_leaves(given) if any(isinstance(arg, (list, tuple, dict)) for arg in given) else given


def _is_in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (
        name == "__setitem__"
        or (name.startswith("__i") and name != "__invert__")
        or (name.endswith("_") and not name.endswith("__"))
    )
