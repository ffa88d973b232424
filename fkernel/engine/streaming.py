"""The contraction of E's and U's gradients: all products of a `ProductSpec`, a block of E's rows at a time.

    for tile in E:  for block in U:  for share in shares:   sums += products(J_E[tile, share], J_U[block, share])

Each batch's gradients are computed, held or on disk (`fkernel.engine.gradients`); all products share one pass over the
tiles of parameter space (`fkernel.func.handles.products`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fkernel.boundary import public
from fkernel.engine.batching import SortedBatch
from fkernel.engine.gradients import Gradients
from fkernel.engine.progress import part_done
from fkernel.func.handles import Products, ProductSpec, RowSpec, device_of
from fkernel.shapes import Tensor, Tree

Sums = dict[str, dict[str, Tensor]]
"""{product: {group of parameters: sums}}."""


class KernelBlock:
    """Some rows of all products.

    Attributes:
        at: [r] their rows in the caller's E.
    """

    def __init__(self, at: Tensor, kernels: Sums, rows: Sums, columns: Sums) -> None:
        """Take sums by group: kernels [r n_U], products of rows alone [r], of U alone [n_U]."""
        self.at, self._kernels, self._rows, self._columns = at, kernels, rows, columns

    @property
    def sums(self) -> tuple[Sums, Sums, Sums]:
        """All of them by product and group: kernels, products of rows alone, of U alone."""
        return self._kernels, self._rows, self._columns

    def kernel(self, what: str = "") -> Tensor:
        """Return one of the kernels, [r n_U] float64, rows as in `at`, columns in the caller's order."""
        return _whole(self._kernels[what])

    def parts(self, what: str = "") -> dict[str, Tensor]:
        """Return the same by groups of parameters, {group: [r n_U]}."""
        return self._kernels[what]

    def rows(self, what: str) -> Tensor:
        """Return a product of rows alone, [r] float64."""
        return _whole(self._rows[what])

    def row_parts(self, what: str) -> dict[str, Tensor]:
        """Return the same by groups of parameters, {group: [r]}."""
        return self._rows[what]

    def columns(self, what: str) -> Tensor:
        """Return a product of U alone, [n_U] float64; only the first block has it."""
        return _whole(self._columns[what])


@public
def contraction(
    E: Gradients,
    U: Gradients | None,
    spec: ProductSpec,
    *,
    held: str = "E",
    tile: int | None = None,
    block: int | None = None,
) -> Iterator[KernelBlock]:
    """Compute all products of `spec` between two batches, a block of E's rows at a time.

    Args:
        E: the rows.
        U: the columns; E itself for a kernel with itself; None for products of rows alone.
        spec: the products to compute; x is E, y is U.
        held: the batch whose gradients are held while the other's stream past, "E" or "U".
        tile: tokens of the held batch that are held at a time; None for all.
        block: tokens of the other batch that are held beside them; None for all.

    Yields:
        One `KernelBlock` a tile of E; one in all where U is held.

    Example:
        >>> from fkernel.engine import SortedBatch, computed
        >>> params, side = {"w": torch.ones(2)}, SortedBatch("U", torch.eye(2), lambda params, x: x @ params["w"])
        >>> J = computed(side, ((1.0, params),), [slice(0, 2)])
        >>> [block.kernel().tolist() for block in contraction(J, J, ProductSpec({"": None}))]
        [[[1.0, 0.0], [0.0, 1.0]]]
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
    """Make blocks of E's rows from products that are computed a tile of the held batch at a time.

    Args:
        E: the rows.
        U: the columns; None where there are none.
        spec: the products to compute; x is E, y is U.
        held: which batch is held, "E" or "U".
        walk: spec with the held batch as x ↦ (rows of a tile of it, their products), in sorted order.

    Yields:
        One `KernelBlock` a tile of E; one in all where U is held.
    """
    if U is None or held == "E":
        for rows, products in walk(spec):
            yield placed(E.order[rows].cpu(), None if U is None else U.order.cpu(), products)
        return
    tiles = [products for _, products in walk(ProductSpec(spec.kernels, spec.y, spec.x, spec.key))]
    columns = U.order.cpu().argsort()
    kernels = _joined([products.kernels for products in tiles])
    kernels = {what: {group: K[columns].T.contiguous() for group, K in of.items()} for what, of in kernels.items()}
    own = _joined([products.x for products in tiles])
    yield KernelBlock(E.order.cpu(), _on_cpu(kernels), _on_cpu(tiles[0].y), _placed(own, columns))


def placed(rows: Tensor, columns: Tensor | None, products: Products) -> KernelBlock:
    """Make a block from products whose rows and columns are in sorted order.

    Args:
        rows: [r] the rows' positions in the caller's E.
        columns: [n_U] the columns' positions in the caller's U; None where there are none.
        products: the sums, x of E and y of U.
    """
    at = torch.arange(0) if columns is None else columns.argsort()
    kernels = {what: {group: K[:, at] for group, K in of.items()} for what, of in products.kernels.items()}
    return KernelBlock(rows, _on_cpu(kernels), _on_cpu(products.x), _placed(products.y, at))


def _walk(
    x: Gradients, y: Gradients | None, spec: ProductSpec, tile: int | None, block: int | None
) -> Iterator[tuple[slice, Products]]:
    """Hold a tile of x and contract it with the blocks of y, both in sorted order."""
    if y is None:
        tiles = [*x.blocks(tile)]
        for own in tiles:
            rows, held = x.rows(own), x.gathered(own)
            products = Products(spec, rows.stop - rows.start, 0, device_of(held))
            products.add(held, held, own_y=False)
            del held
            part_done(len(tiles))
            yield rows, products
        return
    shares: list[Sequence[str] | None] = [None] if x.shares is None or y.shares is None else [*x.shares]
    tiles, passing = [*x.blocks(tile)], [*y.blocks(block)]
    for k, own in enumerate(tiles):
        rows, products = x.rows(own), None
        held = x.gathered(own) if shares == [None] else None
        for j, others in enumerate(passing):
            same = x is y and y.rows(others) == rows
            for names in shares:
                left = x.gathered(own, names) if held is None else held
                right = left if same else y.gathered(others, names)
                if products is None:
                    products = Products(spec, rows.stop - rows.start, len(y), device_of(left))
                products.add(left, right, y.rows(others), own_x=j == 0, own_y=k == 0)
                del left, right  # frees them before the next are computed
                part_done(len(tiles) * len(passing) * len(shares))
        assert products is not None
        del held
        yield rows, products


def _whole(groups: dict[str, Tensor]) -> Tensor:
    return sum(groups.values(), torch.zeros((), dtype=torch.float64, device="cpu"))


def _on_cpu(sums: Sums) -> Sums:
    return {what: {group: each.cpu() for group, each in of.items()} for what, of in sums.items()}


def _placed(sums: Sums, columns: Tensor) -> Sums:
    return {what: {group: each.cpu()[columns] for group, each in of.items()} for what, of in sums.items()}


def _joined(tiles: list[Sums]) -> Sums:
    return {
        what: {group: torch.cat([sums[what][group] for sums in tiles]) for group in of} for what, of in tiles[0].items()
    }


@public
def self_kernel(U: Gradients, D: Tree | None, tile: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute K_UU and ‖g‖², each pair of tiles contracted once: ([n n] symmetric to the last bit, [n]), float64.

    Args:
        U: the gradients.
        D: the diagonal of P; None for ones.
        tile: tokens whose gradients are held on one side at a time; None for all.

    Example:
        >>> from fkernel.engine import SortedBatch, computed
        >>> params, side = {"w": torch.ones(2)}, SortedBatch("U", torch.eye(2), lambda params, x: x @ params["w"])
        >>> self_kernel(computed(side, ((1.0, params),), [slice(0, 2)]), {"w": torch.tensor([1.0, 3.0])})[0]
        tensor([[1., 0.],
                [0., 3.]], dtype=torch.float64)
    """
    n, order = len(U), U.side.order.cpu()
    K, norms = (torch.zeros(*shape, dtype=torch.float64, device="cpu") for shape in ((n, n), (n,)))
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
            part_done(len(tiles) * (len(tiles) + 1) // 2)
        del left
    return (K + K.T) / 2, norms  # a tile with itself is symmetric only up to rounding
