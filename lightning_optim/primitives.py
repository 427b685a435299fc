"""Options as Python's own numbers, so that every checkpoint can hold them."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))


def primitive(value: Any) -> Any:
    """A NumPy scalar, or another number that is not Python's own, as one that is; anything else as it is.

    ``torch.load`` with ``weights_only=True`` refuses whatever is neither a tensor nor a primitive.

    Args:
        value: Of an option. In tuples and lists, each item counts.

    >>> import numpy
    >>> primitive(numpy.float64(0.5)), primitive((numpy.float32(0.5), 1)), primitive("auto")
    (0.5, (0.5, 1), 'auto')
    """
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return value
    if type(value) in (tuple, list):
        items = [primitive(item) for item in value]
        # The same object where nothing is to do: its owner may hold on to it.
        return value if all(map(_is, items, value)) else type(value)(items)
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # NumPy's scalars and arrays without a dimension, without importing NumPy
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return str(value) if isinstance(value, str) and type(value).__module__.startswith("numpy") else value


def primitives(options: dict[str, Any]) -> None:
    """Make the options of a param group such, in place; its parameters are left alone."""
    for name, value in options.items():
        if name not in ("params", "param_names"):
            options[name] = primitive(value)


def _is(a: Any, b: Any) -> bool:
    return a is b
