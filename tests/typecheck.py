"""Annotations are executed: by beartype, and by jaxtyping where they tell shapes. What is slow of it is left out.

jaxtyping checks a function by two others, which are compiled when it is defined, and binds every call's arguments once
more. Here a check is compiled at the first call, most functions of a run being never called; one without shapes is
beartype's alone; and of a function inside of a function, which is defined anew at every call of that, the first few are
checked. An int is a float, as everywhere in Python's typing.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
SHAPED = ("Float", "Int[", "Shaped")
FEW = 3
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
        if made is None:
            made = _jaxtyped(fn, typechecker=typechecker) if shaped else typechecker(_resolved(fn))
        return made(*args, **kwargs)

    return call


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
