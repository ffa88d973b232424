"""The speed of this machine: six rates, measured once in a few seconds and cached.

Predicted time is counted work (`fkernel.engine.planning.work`) divided by these rates. They are measured with the
operations that dominate the engine's time, at typical sizes.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from fkernel.engine.planning.work import Work, count_cost
from fkernel.engine.recycling import reuse_memory
from fkernel.engine.store import open_store
from fkernel.func.handles import Factored, contract
from fkernel.func.taps import handles_of, plan_of
from fkernel.io import atomic_write, default_cache_root, make_directory, parse_json, scratch_directory
from fkernel.shapes import Tree

MB = 1 << 20


class Rates(NamedTuple):
    """Speed of one machine, per second, for one dtype.

    Attributes:
        flops: floating-point operations of matrix products.
        moved: bytes read and written by all other operations of a pass over a small transformer.
        call: seconds of overhead of an operation.
        forming: floating-point operations of multiplying factors out and contracting them.
        write: bytes of gradients written to a store.
        read: bytes of gradients read from a store.
    """

    flops: float
    moved: float
    call: float
    forming: float
    write: float
    read: float

    def seconds(self, work: Work) -> float:
        """Predict the time of some work, without overlap of its parts."""
        return work.flops / self.flops + (work.weights + work.moved) / self.moved + work.calls * self.call


def rates(dtype: torch.dtype = torch.float32, directory: Path | None = None) -> Rates:
    """Return this machine's rates; the first call on a machine measures them (a few seconds) and keeps them in a file.

    Args:
        dtype: of the parameters.
        directory: of the file; ``$FKERNEL_CACHE`` or ``~/.cache/fkernel`` by default.
    """
    path = (directory or default_cache_root()) / "rates.json"
    key = (
        f"{platform.node()} · {_processor()} · {torch.get_num_threads()} threads · torch {torch.__version__} · {dtype}"
    )
    known: Any = None
    with suppress(OSError, ValueError):
        known = parse_json(path.read_text())
    with suppress(KeyError, TypeError):
        return Rates(*known[key])
    measured = measure_rates(dtype)
    with suppress(OSError):  # a machine without a writable cache measures again next time
        rates_of = {**(known if isinstance(known, dict) else {}), key: measured}
        atomic_write(make_directory(path.parent) / path.name, [json.dumps(rates_of, indent=1).encode()])
    return measured


def measure_rates(dtype: torch.dtype = torch.float32) -> Rates:
    """Measure the rates."""
    with reuse_memory():
        flops, call, forming = _products(dtype), _calls(dtype), _forms(dtype)
        moved = _moves(dtype, flops, call)
        write, read = _disk()
    return Rates(flops, moved, call, forming, write, read)


def _products(dtype: torch.dtype) -> float:
    """Time the product of a microbatch's activations and a layer's weights, as wide as small models' layers are."""
    x, W = torch.randn(1024, 512, dtype=dtype), torch.randn(512, 1024, dtype=dtype)
    return 2 * 1024 * 512 * 1024 / _median(lambda: torch.mm(x, W))


def _moves(dtype: torch.dtype, flops: float, call: float) -> float:
    """Time a pass over a transformer's layer and head, less the time of its matrix products and calls."""
    d, v, n, t = 256, 4096, 8, 128
    shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "up": (4 * d, d), "down": (d, 4 * d), "head": (v, d)}
    params: Tree = {name: torch.randn(shape, dtype=dtype) / d**0.5 for name, shape in shapes.items()}
    params["norm"] = torch.ones(d, dtype=dtype)
    x = torch.randn(n, t, d, dtype=dtype)

    def f(p: Tree, x: Any) -> torch.Tensor:
        h = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * p["norm"]
        q, k, v = (F.linear(h, p[name]).unflatten(-1, (4, -1)).transpose(1, 2) for name in "qkv")
        h = x + F.linear(((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2), p["o"])
        h = h + F.linear(F.silu(F.linear(h, p["up"])), p["down"])
        z = F.linear(h * p["norm"], p["head"]) / 1.0
        return (z[..., 0] - z.logsumexp(-1)).sum(1)

    plan = plan_of(f, params, x)
    work = count_cost(lambda p, x: handles_of(f, p, x, plan), params, x)
    left = _median(lambda: handles_of(f, params, x, plan)) - work.flops / flops - work.calls * call
    return (work.moved + work.weights) / max(left, 1e-4)


def _forms(dtype: torch.dtype) -> float:
    """Time the contraction of two batches' factors of one layer."""
    n, t, d = 16, 128, 768
    x, y = ({"w": Factored(torch.randn(n, t, d, dtype=dtype), torch.randn(n, t, d, dtype=dtype))} for _ in range(2))
    D = {"w": torch.ones(d, d, dtype=dtype)}
    return 2 * (2.0 * n * t * d * d) / _median(lambda: contract(x, y, diagonal=D))


def _calls(dtype: torch.dtype) -> float:
    """Time a reverse pass whose arithmetic is negligible."""
    params: Tree = {str(layer): torch.eye(8, dtype=dtype) for layer in range(40)}
    x = torch.ones(1, 2, 8, dtype=dtype)

    def f(p: Tree, x: Any) -> torch.Tensor:
        for W in p.values():
            x = torch.nn.functional.linear(x, W).tanh() + x.mean(-1, keepdim=True)
        return x.sum((1, 2))

    plan = plan_of(f, params, x)
    work = count_cost(lambda p, x: handles_of(f, p, x, plan), params, x)
    return _median(lambda: handles_of(f, params, x, plan)) / work.calls


def _disk() -> tuple[float, float]:
    """Time a store: gradients written, hashed, flushed to disk and read back; the first of three warms up."""
    size, writes, reads = 64 * MB, list[float](), list[float]()
    handles = {"w": torch.ones(1, size // 4)}
    with (
        scratch_directory("fkernel-rates") as directory,
        open_store(directory / "rates", {}, [slice(i, i + 1) for i in range(3)]) as store,
    ):
        for i in range(3):
            start = time.perf_counter()
            store.write(i, handles)
            middle = time.perf_counter()
            store.read(i)
            writes.append(middle - start)
            reads.append(time.perf_counter() - middle)
    return size / median(writes[1:]), size / median(reads[1:])


def _median(fn: Callable[[], Any], seconds: float = 0.4) -> float:
    """Time a call: the median of repetitions for `seconds`, after two warm-up calls."""
    times: list[float] = []
    for _ in range(2):
        fn()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return median(times)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
