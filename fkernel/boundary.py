"""Where users enter: what fails beneath a public function names the arguments that it was given, as they were given."""

from __future__ import annotations

import inspect
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

import torch

from fkernel.errors import ArgumentError, FKernelError

P = ParamSpec("P")
T = TypeVar("T")

FAILURES = (
    *(TypeError, AttributeError, LookupError, ValueError, ArithmeticError),
    *(AssertionError, StopIteration, RuntimeError, SystemError),
)
"""What Python and torch raise about arguments that do not fit."""
PLACES = (str(Path(__file__).parent), *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
LIBRARIES = tuple(f"{place}{os.sep}" for place in PLACES)  # a user's fkernel-runs/ beside fkernel/ is none
GENERATED = ("<frozen", "<string>", "<@beartype", "<eval_with_key>")
_WITHIN: ContextVar[bool] = ContextVar("within", default=False)


def public(function: Callable[P, T]) -> Callable[P, T]:
    """Make what fails beneath a function an `ArgumentError` that says what the function was given and what it takes.

    Errors of fkernel, of a full memory, and of functions that the user gave pass as they are. Where public functions
    call each other, the outermost speaks: its arguments are the user's.

    Args:
        function: a public function; also one that yields, or one that another returned.

    Example:
        >>> @public
        ... def half(x: torch.Tensor) -> torch.Tensor:
        ...     return x / 2
        >>> half(torch.ones(1))
        tensor([0.5000])
    """
    if inspect.isgeneratorfunction(function):

        @wraps(function)
        def walk(*args: P.args, **kwargs: P.kwargs) -> Any:
            with closing(cast(Any, function(*args, **kwargs))) as iterator:
                while True:
                    with _translated(function, args, kwargs):
                        try:
                            item = next(iterator)
                        except StopIteration:
                            return
                    yield item

        return cast(Callable[P, T], walk)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _WITHIN.get():
            return function(*args, **kwargs)
        with _translated(function, args, kwargs):
            return function(*args, **kwargs)

    return call


@contextmanager
def _translated(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    outermost = _WITHIN.set(True)
    try:
        yield
    except (FKernelError, torch.OutOfMemoryError):
        raise
    except FAILURES as error:
        if _is_users(error.__traceback__):
            raise
        raise ArgumentError(_message(function, args, kwargs, error)) from error
    finally:
        _WITHIN.reset(outermost)


def _is_users(traceback: TracebackType | None) -> bool:
    """Whether an error passed through code that is neither ours, nor Python's, nor of an installed package."""
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith((*LIBRARIES, *GENERATED)):
            return True
        traceback = traceback.tb_next
    return False


def _message(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], error: BaseException
) -> str:
    home, name = function.__module__, function.__qualname__.replace(".<locals>.", "() -> ")
    text = str(error).strip().partition("\n")[0]
    failure = f"{type(error).__name__}{': ' if text else ''}{text[:300].rstrip('.')}"
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # there are too many, or too few: the failure says so
        given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    shown = "; ".join(f"{key}: {described(value)}" for key, value in given.items() if key != "self")
    return f"{home}.{name} cannot use what it was given ({failure}). Given: {shown}. It takes {name}{signature}."


def described(value: Any, depth: int = 2) -> str:
    """Describe an argument: dtype and shape of a tensor, the first entries of a container.

    Example:
        >>> described({"w": torch.ones(2, 3), "b": None})
        "{'w': torch.float32 [2, 3], 'b': None}"
    """
    if isinstance(value, torch.Tensor):
        kind = "" if value.layout == torch.strided and not value.is_meta else f" {value.layout}, on {value.device}"
        return f"{value.dtype} {list(value.shape)}{kind}"
    if isinstance(value, Mapping | list | tuple) and depth:
        inner = [(f"{key!r}: " if isinstance(value, Mapping) else "", key) for key in [*value][:3]]
        own = value if isinstance(value, Mapping) else None
        parts = [f"{start}{described(key if own is None else own[key], depth - 1)}" for start, key in inner]
        parts += [f"… {len(value)} in all"] if len(value) > 3 else []
        opening, closing = "{}" if own is not None else "[]" if isinstance(value, list) else "()"
        return f"{opening}{', '.join(parts)}{closing}"
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a number beyond 64 bits"
        return text if len(text) <= 60 else f"{text[:57]}…"
    return f"a {type(value).__name__}"
