"""Classes that show under another name than the one by which programs find them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Class = TypeVar("Class", bound=type)


def known_as(name: str) -> Callable[[Class], Class]:
    """Show a class under a familiar name: in ``repr``, dashboards (``lr-AdamW``), profiles and messages.

    Its ``__qualname__`` stays, and with it whatever looks the class up: pickle, and jsonargparse, for which a second
    subclass of Optimizer called AdamW would make ``--optimizer AdamW`` ambiguous in every LightningCLI.

    >>> @known_as("Familiar")
    ... class FamiliarOptim:
    ...     pass
    >>> FamiliarOptim.__name__, FamiliarOptim.__qualname__
    ('Familiar', 'FamiliarOptim')
    """

    def show(cls: Class) -> Class:
        cls.__name__ = name
        return cls

    return show
