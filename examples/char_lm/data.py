"""Real text without a download: the Python standard library's own source files, as bytes.

Every choice (which files, which half they belong to, which windows a batch holds) follows from names and
seeds, so that two runs with one Python see the same bytes in the same order, also after a resume.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

# Not program text of the library itself: other packages, tests, and files that are tables (code pages, help texts).
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}

Batch = tuple[Tensor, Tensor]


class Split(NamedTuple):
    """The bytes to train on and the bytes to validate on: two one-dimensional uint8 tensors."""

    train: Tensor
    val: Tensor


def read_files(folder: Path, max_bytes: int) -> dict[str, bytes]:
    """The ``.py`` and ``.txt`` files under a folder, by relative path, in the order of their hashes.

    The hash of the relative path orders the files, so that a cap keeps a fixed, mixed choice of them whatever
    the file system's order is.

    Args:
        folder: Where to look, at any depth.
        max_bytes: Files are taken until the next one would pass this many bytes.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    found = {
        path.relative_to(folder).as_posix(): path
        for pattern in ("*.py", "*.txt")
        for path in folder.rglob(pattern)
        if not EXCLUDED & set(path.relative_to(folder).parts) and not path.name.startswith("_sysconfigdata")
    }
    files: dict[str, bytes] = {}
    total = 0
    for name in sorted(found, key=_hash):
        content = found[name].read_bytes()
        if total + len(content) > max_bytes:
            break
        files[name] = content
        total += len(content)
    if not files:
        raise FileNotFoundError(f"no .py or .txt file of at most {max_bytes} bytes under {folder}")
    return files


def split_text(path: Path, max_bytes: int, val_fraction: float) -> Split:
    """Read a text file or a folder of them and hold a part out.

    A folder is split by file (a hash of the relative path decides), so that no file has bytes in both parts.
    A single file is split at one point: its end is held out.
    """
    if path.is_dir():
        train, val = bytearray(), bytearray()
        for name, content in read_files(path, max_bytes).items():
            (val if _hash("split/" + name) < val_fraction else train).extend(content)
    else:
        text = bytearray(path.read_bytes()[:max_bytes])
        cut = round(len(text) * (1 - val_fraction))
        train, val = text[:cut], text[cut:]
    return Split(torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(val, dtype=torch.uint8))


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, evenly spread."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


class WindowLoader:
    """Batches of (bytes, next bytes), cut from one long text; its position can be saved and restored.

    An epoch visits each byte once: the text is cut into windows at an offset drawn per epoch, and the windows
    are shuffled. Seed and epoch determine the order, so that the state to save is two integers and a run that
    is resumed in the middle of an epoch goes on with the batch that would have come next. Lightning saves and
    restores any loader that has ``state_dict`` and ``load_state_dict``, and calls ``sampler.set_epoch``.

    Args:
        text: One-dimensional, uint8.
        context: Bytes of a window.
        batch_size: Windows of a batch.
        seed: Shuffles anew each epoch and drops the last, partial batch. ``None``: the windows in order, all.
        limit: At most so many windows, evenly spread over the text (only without a seed).
        rank: Of this process, which takes every ``world_size``-th window.
        world_size: How many processes share the text.
    """

    batch_sampler = None  # Lightning looks at this name too, next to `sampler`

    def __init__(
        self,
        text: Tensor,
        context: int,
        batch_size: int,
        *,
        seed: int | None = None,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        # The byte after a window is a target too; a shuffle's offset, below one window, needs room as well.
        self.windows = (len(text) - 1) // context if seed is None else len(text) // context - 1
        if self.windows < (1 if seed is None else batch_size * world_size):
            raise ValueError(
                f"{len(text)} bytes are too few for a batch of {batch_size} windows of {context} bytes"
                f" on {world_size} process(es)"
            )
        self.text = text
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        self.limit = self.windows if limit is None else min(limit, self.windows)
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.batch = 0  # handed out in this epoch
        self._skip = 0  # of the next pass: what a restored position has behind it

    @property
    def sampler(self) -> WindowLoader:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle; a new epoch starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.batch, self._skip = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The position: which epoch, and how many of its batches were handed out."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the loader that gave ``state`` was."""
        self.epoch, self.batch, self._skip = state["epoch"], state["batch"], state["batch"]

    def starts(self) -> Tensor:
        """Where this process's windows of the current epoch begin."""
        if self.seed is None:
            starts = torch.arange(self.limit) * self.windows // self.limit * self.context
            return starts[self.rank :: self.world_size]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        offset = torch.randint(self.context, (1,), generator=generator)
        starts = torch.randperm(self.windows, generator=generator) * self.context + offset
        return starts[self.rank :: self.world_size][: len(self) * self.batch_size]

    def __len__(self) -> int:
        """Batches per epoch."""
        if self.seed is None:
            return -(-len(range(self.rank, self.limit, self.world_size)) // self.batch_size)
        return self.windows // self.world_size // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        # A generator runs from its first `next` on: after `set_epoch` and `load_state_dict`, whenever it was made.
        first, self._skip = self._skip, 0
        reach = torch.arange(self.context + 1)
        for index, starts in enumerate(self.starts().split(self.batch_size)[first:], first):
            windows = self.text[starts[:, None] + reach].long()
            self.batch = index + 1
            yield windows[:, :-1], windows[:, 1:]


class SourceText(LightningDataModule):
    """Windows of source text: the standard library of the running Python, or any text of your own.

    Args:
        path: A text file, or a folder whose ``.py`` and ``.txt`` files are read. ``None``: the standard library.
        context: Bytes of a window; the model's context must be at least that.
        batch_size: Windows of a batch, on each process.
        val_fraction: Share of the text that is held out.
        val_windows: Validate on so many windows, evenly spread over the held-out text.
        max_bytes: Read at most this much text.
        seed: Of the order of the training windows.
    """

    def __init__(
        self,
        path: Path | None = None,
        context: int = 128,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        val_windows: int = 500,
        max_bytes: int = 64_000_000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.path = Path(sysconfig.get_paths()["stdlib"]) if path is None else Path(path)
        self.context = context
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.val_windows = val_windows
        self.max_bytes = max_bytes
        self.seed = seed
        self.split: Split | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the text, once."""
        if self.split is None:
            self.split = split_text(self.path, self.max_bytes, self.val_fraction)

    def train_dataloader(self) -> WindowLoader:
        """Shuffled windows of the training text."""
        return self._loader("train", seed=self.seed, limit=None)

    def val_dataloader(self) -> WindowLoader:
        """The same windows of the held-out text each time."""
        return self._loader("val", seed=None, limit=self.val_windows)

    def test_dataloader(self) -> WindowLoader:
        """All windows of the held-out text."""
        return self._loader("val", seed=None, limit=None)

    def _loader(self, part: str, *, seed: int | None, limit: int | None) -> WindowLoader:
        self.setup()
        assert self.split is not None
        return WindowLoader(
            getattr(self.split, part),
            self.context,
            self.batch_size,
            seed=seed,
            limit=limit,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )
