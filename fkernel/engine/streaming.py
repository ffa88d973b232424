"""The one contraction: everything that is asked of E's and U's gradients, a block of E's rows at a time.

    for tile in E:  for block in U:  for share in shares:   sums += products(J_E[tile, share], J_U[block, share])

Each side's gradients are computed, held or on disk (`fkernel.engine.gradients`); all that is asked of them is taken of
one walk over the tiles of parameter space (`fkernel.func.handles.products`). Callers keep of a block what they want.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fkernel.engine.batching import SortedBatch
from fkernel.engine.gradients import Gradients
from fkernel.func.handles import Products, ProductSpec, RowSpec, device_of
from fkernel.shapes import Tensor, Tree

Sums = dict[str, dict[str, Tensor]]
"""{what: {group of parameters: sums}}."""


class KernelBlock:
    """Some rows of everything that was asked.

    Attributes:
        at: [r] which rows of the caller's E they are.
    """

    def __init__(self, at: Tensor, kernels: Sums, rows: Sums, columns: Sums) -> None:
        """Take sums by group: kernels [r n_U], of the rows by themselves [r], of U by itself [n_U]."""
        self.at, self._kernels, self._rows, self._columns = at, kernels, rows, columns

    def kernel(self, what: str = "") -> Tensor:
        """One of the kernels, [r n_U] float64, rows as in `at`, columns as the caller has them."""
        return _whole(self._kernels[what])

    def parts(self, what: str = "") -> dict[str, Tensor]:
        """The same by groups of parameters, {group: [r n_U]}."""
        return self._kernels[what]

    def rows(self, what: str) -> Tensor:
        """What was asked of the rows by themselves, [r] float64."""
        return _whole(self._rows[what])

    def row_parts(self, what: str) -> dict[str, Tensor]:
        """The same by groups of parameters, {group: [r]}."""
        return self._rows[what]

    def columns(self, what: str) -> Tensor:
        """What was asked of U by itself, [n_U] float64; only the first block has it."""
        return _whole(self._columns[what])


def contraction(
    E: Gradients,
    U: Gradients | None,
    spec: ProductSpec,
    *,
    held: str = "E",
    tile: int | None = None,
    block: int | None = None,
) -> Iterator[KernelBlock]:
    """Walk everything that is asked of two sides, a block of E's rows at a time.

    Args:
        E: the rows.
        U: the columns; E itself where the two are one; None where rows are asked about by themselves alone.
        spec: what is asked; x is E, y is U.
        held: the side whose gradients are held while the other's stream past.
        tile: tokens of the held side that are held at a time; None for all.
        block: tokens of the other side that are held beside them; None for all.

    Yields:
        One `KernelBlock` a tile of E; one in all where U is held.
    """
    x, y = (E, U) if U is None or held == "E" else (U, E)
    yield from arranged(E.side, None if U is None else U.side, spec, held, lambda own: _walk(x, y, own, tile, block))


def arranged(
    E: SortedBatch,
    U: SortedBatch | None,
    spec: ProductSpec,
    held: str,
    walk: Callable[[ProductSpec], Iterator[tuple[slice, Products]]],
) -> Iterator[KernelBlock]:
    """Make blocks of a walk that holds a tile of one side while the other's gradients pass.

    Args:
        E: the rows.
        U: the columns; None where there are none.
        spec: what is asked; x is E, y is U.
        held: which side is held, "E" or "U".
        walk: what is asked, x being the side that is held ↦ (rows of a tile of it, their sums), in its order.

    Yields:
        One `KernelBlock` a tile of E; one in all where U is held.
    """
    if U is None or held == "E":
        for rows, found in walk(spec):
            yield placed(E.order[rows], None if U is None else U.order, found)
        return
    tiles = [found for _, found in walk(ProductSpec(spec.kernels, spec.y, spec.x, spec.key))]
    columns = U.order.argsort()
    kernels = _joined([found.kernels for found in tiles])
    kernels = {what: {group: K[columns].T.contiguous() for group, K in of.items()} for what, of in kernels.items()}
    own = _joined([found.x for found in tiles])
    yield KernelBlock(E.order, _on_cpu(kernels), _on_cpu(tiles[0].y), _placed(own, columns))


def placed(rows: Tensor, columns: Tensor | None, found: Products) -> KernelBlock:
    """Make a block of sums whose rows and columns stand in two sides' own orders.

    Args:
        rows: [r] which rows of the caller's E they are.
        columns: [n_U] which rows of the caller's U the columns are; None where there are none.
        found: the sums, x of E and y of U.
    """
    at = torch.arange(0) if columns is None else columns.argsort()
    kernels = {what: {group: K[:, at] for group, K in of.items()} for what, of in found.kernels.items()}
    return KernelBlock(rows, _on_cpu(kernels), _on_cpu(found.x), _placed(found.y, at))


def _walk(
    x: Gradients, y: Gradients | None, spec: ProductSpec, tile: int | None, block: int | None
) -> Iterator[tuple[slice, Products]]:
    """Hold a tile of x, let y pass; both in their own orders."""
    if y is None:
        for own in x.blocks(tile):
            rows, held = x.rows(own), x.gathered(own)
            products = Products(spec, rows.stop - rows.start, 0, device_of(held))
            products.add(held, held, own_y=False)
            del held
            yield rows, products
        return
    shares: list[Sequence[str] | None] = [None] if x.shares is None or y.shares is None else [*x.shares]
    for k, own in enumerate(x.blocks(tile)):
        rows, products = x.rows(own), None
        held = x.gathered(own) if shares == [None] else None
        for j, others in enumerate(y.blocks(block)):
            same = x is y and y.rows(others) == rows
            for names in shares:
                left = x.gathered(own, names) if held is None else held
                right = left if same else y.gathered(others, names)
                if products is None:
                    products = Products(spec, rows.stop - rows.start, len(y), device_of(left))
                products.add(left, right, y.rows(others), own_x=j == 0, own_y=k == 0)
                del left, right  # or they would be alive while the next are made
        assert products is not None
        del held
        yield rows, products


def _whole(groups: dict[str, Tensor]) -> Tensor:
    return sum(groups.values(), torch.zeros((), dtype=torch.float64))


def _on_cpu(sums: Sums) -> Sums:
    return {what: {group: each.cpu() for group, each in of.items()} for what, of in sums.items()}


def _placed(sums: Sums, columns: Tensor) -> Sums:
    return {what: {group: each.cpu()[columns] for group, each in of.items()} for what, of in sums.items()}


def _joined(tiles: list[Sums]) -> Sums:
    return {
        what: {group: torch.cat([found[what][group] for found in tiles]) for group in of}
        for what, of in tiles[0].items()
    }


def self_kernel(U: Gradients, D: Tree | None, tile: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute K_UU and ‖g‖², each pair of tiles contracted once: ([n n] symmetric to the last bit, [n]), float64.

    Args:
        U: the gradients.
        D: the diagonal of P; None for ones.
        tile: tokens whose gradients are held on one side at a time; None for all.
    """
    n, order = len(U), U.side.order
    K, norms = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    tiles = [*U.blocks(tile)]
    for k, own in enumerate(tiles):
        left, rows = U.gathered(own), order[U.rows(own)]
        for others in tiles[k:]:
            right, columns = (left if others == own else U.gathered(others)), order[U.rows(others)]
            spec = ProductSpec({"": D}, x=RowSpec(squares={"norm": None}))
            products = Products(spec, len(rows), len(columns), device_of(left))
            products.add(left, right, own_x=others == own)
            K[rows[:, None], columns] = products.kernel().cpu()
            K[columns[:, None], rows] = products.kernel().T.cpu()
            if others == own:
                norms[rows] = products.whole("x", "norm").cpu()
            del right
        del left
    return (K + K.T) / 2, norms  # a tile against itself is a product of two matrices, symmetric up to rounding
