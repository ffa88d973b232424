"""Valid arguments of every public function: those of its docstring's example, as they were given."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import fkernel
from fkernel import analysis, engine, func, precond

ROOMS = {"func": func, "precond": precond, "engine": engine, "analysis": analysis}
FILE = "example.py"
"""Where the code of examples stands in a traceback: what is raised there is the user's own."""


class Call(NamedTuple):
    """One call of a public function.

    Attributes:
        function: itself.
        args: its positional arguments.
        kwargs: its others.
        then: (positional, others) of a call of what it returned; None where there is none.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    then: tuple[tuple[Any, ...], dict[str, Any]] | None

    def made(self) -> Any:
        """Make the call; enter what is entered, walk through what is walked."""
        result = self.function(*self.args, **self.kwargs)
        if self.then is not None:
            result = result(*self.then[0], **self.then[1])
        if hasattr(result, "__enter__"):
            with result as entered:
                return entered
        return [*result] if inspect.isgenerator(result) else result


def public_functions() -> dict[str, Callable[..., Any]]:
    """{room.name: function} of all that stands in the rooms' `__all__`."""
    every = {f"{room}.{name}": getattr(module, name) for room, module in ROOMS.items() for name in module.__all__}
    return {name: value for name, value in every.items() if inspect.isfunction(value)}


def example_calls(name: str) -> list[Call]:
    """Run a public function's example, and return its calls of the function."""
    room, short = name.split(".")
    function = getattr(ROOMS[room], short)
    calls = list[dict[str, Any]]()

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        call = {"function": function, "args": args, "kwargs": kwargs, "then": None}
        calls.append(call)
        if not (inspect.isfunction(result) or isinstance(result, precond.Diagonal | func.Objective)):
            return result

        def again(*args: Any, **kwargs: Any) -> Any:
            call["then"] = call["then"] or (args, kwargs)
            return result(*args, **kwargs)

        return again

    home = sys.modules[function.__module__]
    holders = [module for module in {home, ROOMS[room], fkernel} if getattr(module, short, None) is function]
    try:
        for module in holders:
            setattr(module, short, recorded)
        names = dict(vars(home))
        with contextlib.redirect_stdout(io.StringIO()):
            for example in doctest.DocTestParser().get_examples(inspect.getdoc(function) or ""):
                if example.exc_msg is None:
                    exec(compile(example.source, FILE, "single"), names)
    finally:
        for module in holders:
            setattr(module, short, function)
    return [Call(**call) for call in calls]
