"""An optimizer's own code is no part of anyone's graph, while the closure that it calls is as compiled as it was."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch


def stay_outside(*modules: str) -> None:
    """Have ``torch.compile`` leave the functions of some modules as they are; not what they call.

    To be called by a function of theirs, which costs next to nothing where nobody compiles. A decorator would have
    every step import dynamo, and would have closures run uncompiled.

    Args:
        modules: Names of imported modules.
    """
    if torch.compiler.is_compiling():
        _mark(modules)


@torch._disable_dynamo
def _mark(modules: tuple[str, ...]) -> None:
    try:  # it takes a second; where someone compiles, it is there
        from torch._dynamo.decorators import skip, skip_code
    except ImportError:  # of a torch that has them elsewhere: it compiles what it can of our code, which is as right
        return
    for name in modules:
        for function in _functions(sys.modules[name]):
            skip(function)
            for inner in _inner(function.__code__):
                skip_code(inner)


def _inner(code: CodeType) -> Iterator[CodeType]:
    """Of comprehensions and functions in a function."""
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield part
            yield from _inner(part)


def _functions(module: Any) -> Iterator[Callable[..., Any]]:
    """The functions and methods that are written in a module."""
    for value in vars(module).values():
        members = vars(value).values() if inspect.isclass(value) and value.__module__ == module.__name__ else [value]
        for member in members:
            found = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            while inspect.isfunction(found):
                if found.__module__ == module.__name__:
                    yield found
                found = getattr(found, "__wrapped__", None)
