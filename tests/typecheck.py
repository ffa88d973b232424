"""Annotations are executed: by beartype, and by jaxtyping where they tell shapes. What is slow of it is left out.

jaxtyping checks a function by two others, which are compiled when it is defined, and binds every call's arguments once
more. Here a check is compiled at the first call, most functions of a run being never called; one without shapes is
beartype's alone; and of a function inside of a function, which is defined anew at every call of that, the first few are
checked. An int is a float, as everywhere in Python's typing.

Checks take turns, as slow tests do (`tests/turns.py`): a run of the whole suite executes the annotations of a quarter
of the modules, of another with every commit. All of them take a third of the suite's time.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any
from zlib import crc32

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
SHAPED = ("Float", "Int[", "Shaped")
FEW = 3
TURNS = 4
turn: int | None = None
"""Of the checks; None where every module has its."""
_defined = Counter[CodeType]()
_jaxtyped = jaxtyping.jaxtyped


def checked(fn: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """What stands for `jaxtyping.jaxtyped` above every function and class of the package."""
    if fn is None:
        return functools.partial(checked, typechecker=typechecker)
    if not inspect.isfunction(fn):
        return _jaxtyped(fn, typechecker=typechecker)
    if "<locals>" in fn.__qualname__:
        _defined[fn.__code__] += 1
        if _defined[fn.__code__] > FEW:
            return fn
    shaped = any(mark in str(annotation) for annotation in fn.__annotations__.values() for mark in SHAPED)
    made: Any = None

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        if made is None and waits(fn.__module__):
            made = fn
        elif made is None:
            made = _jaxtyped(fn, typechecker=typechecker) if shaped else typechecker(_resolved(fn))
        return made(*args, **kwargs)

    generated: Any = call  # whose file is one of beartype's: fkernel would take this one for a user's
    generated.__code__ = generated.__code__.replace(co_filename="<@beartype>")
    return generated


def waits(module: str) -> bool:
    """Whether it is not this module's turn."""
    return turn is not None and (crc32(module.encode()) - turn) % TURNS != 0


def _resolved(fn: FunctionType) -> Callable[..., Any]:
    """A copy whose annotations are objects; Any where they are imported for type checkers alone."""
    copy = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    copy.__annotations__ = {name: _object(text, fn.__globals__) for name, text in fn.__annotations__.items()}
    return copy


def _object(annotation: Any, names: dict[str, Any]) -> Any:
    try:
        return eval(annotation, names) if isinstance(annotation, str) else annotation
    except NameError:
        return Any


jaxtyping.jaxtyped = checked  # where jaxtyping's import hook finds it
