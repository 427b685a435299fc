"""What differs between two checkpoints, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def differences(a: Any, b: Any, folders: tuple[Path, Path], where: str = "") -> Iterator[str]:
    """All places at which two checkpoints, of runs in two folders, differ.

    Args:
        a: The first one, or a part of it.
        b: The second one.
        folders: Of the runs, which their paths may begin with.
        where: The keys that lead to these parts.

    >>> here = Path("/a"), Path("/b")
    >>> list(differences({"x": [1, 2.0], "y": "/a/z"}, {"x": [1, 3.0], "y": "/b/z"}, here))
    ["['x'][1]: 2.0 and 3.0"]
    """
    if type(a) is not type(b):
        yield f"{where}: {type(a).__name__} {a!r} and {type(b).__name__} {b!r}"
    elif isinstance(a, dict):
        a, b = ({_relative(k, folder): v for k, v in x.items()} for x, folder in zip((a, b), folders, strict=True))
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                yield f"{where}[{key!r}]: only in {'the second' if key in b else 'the first'}"
            else:
                yield from differences(a[key], b[key], folders, f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{where}: {len(a)} and {len(b)} items"
        for index, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, folders, f"{where}[{index}]")
    elif isinstance(a, Tensor):
        if not _same_bits(a, b):
            yield f"{where}: tensors differ"
    elif repr(_relative(a, folders[0])) != repr(_relative(b, folders[1])):  # by which NaN is NaN, and -0.0 is not 0.0
        yield f"{where}: {a!r} and {b!r}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def _relative(value: Any, folder: Path) -> Any:
    return value.replace(str(folder.resolve()), "") if isinstance(value, str) else value
