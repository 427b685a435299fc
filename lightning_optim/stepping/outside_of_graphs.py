"""Keeping an optimizer's own code out of ``torch.compile``'s graphs, while the closure that it calls stays compiled."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch


def stay_outside(*modules: str) -> None:
    """Make ``torch.compile`` skip the functions of some modules, but not the functions that these call.

    A function of these modules calls this, which costs next to nothing if nobody compiles. With a decorator, any step
    would import dynamo, and closures would run uncompiled.

    Args:
        modules: Names of imported modules.
    """
    if torch.compiler.is_compiling():
        _mark(modules)


@torch._disable_dynamo
def _mark(modules: tuple[str, ...]) -> None:
    try:  # this import takes a second, but it is done already if someone compiles
        from torch._dynamo.decorators import skip, skip_code
    except ImportError:  # another torch has them elsewhere: then it compiles what it can of our code, which is correct
        return
    for name in modules:
        for function in _functions(sys.modules[name]):
            skip(function)
            for inner in _inner(function.__code__):
                skip_code(inner)


def _inner(code: CodeType) -> Iterator[CodeType]:
    """The code objects of comprehensions and functions inside a function."""
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
