"""How many threads a step uses."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable
from functools import lru_cache

import torch

from lightning_optim.engines.host.toolchain import torch_openmp

THREADS_VARIABLE = "LIGHTNING_OPTIM_THREADS"
#: No machine has use for more threads than this, and a step keeps some memory for each thread.
MOST_THREADS = 1024

# Set by torchrun, and so by `accelerate launch`, for each process that it starts.
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")


class _Forks:
    """The handling of OpenMP's threads at a fork.

    A fork copies the calling thread alone. If OpenMP had given this thread helpers, it would wait for them in the child
    for ever. So the helpers are ended before the fork, where the runtime can do that (parent and child get new ones
    when they need them); otherwise the child does without helpers.

    Attributes:
        child: Whether this process is a fork of another Python process.
        bereft: Identifier of the thread that may not ask for helpers; None: all may.
    """

    child = False
    bereft: int | None = None
    _released = False

    def before(self) -> None:
        """End the helpers; called in the parent before the fork."""
        pause = _pause()
        self._released = pause is not None and pause(_PAUSE_SOFT) == 0  # not within a parallel region

    def after_in_child(self) -> None:
        """Note whether there may be helpers; called in the child after the fork."""
        self.child = True
        self.bereft = None if self._released else threading.get_ident()


#: ``omp_pause_soft`` of OpenMP 5.0: threads end, settings stay.
_PAUSE_SOFT = 1


@lru_cache(maxsize=1)
def _pause() -> Callable[[int], int] | None:
    """``omp_pause_resource_all`` of the runtime that torch has loaded, which kernels use too; None: it has none."""
    for name in (*torch_openmp(), "libgomp.so.1"):
        with contextlib.suppress(OSError, AttributeError):
            function: Callable[[int], int] = ctypes.CDLL(name, os.RTLD_NOLOAD).omp_pause_resource_all
            return function
    return None


_forks = _Forks()
os.register_at_fork(before=_forks.before, after_in_child=_forks.after_in_child)


def thread_count() -> int:
    """Threads for one step: this process's share of the processors that it may run on.

    ``$LIGHTNING_OPTIM_THREADS`` if set; else torch's own number, except where a launcher has set
    ``OMP_NUM_THREADS=1`` for every process (torchrun does, as a precaution): one thread would starve the step, so
    the processors are divided by the number of processes on this machine instead.

    In a forked process it is 1, whatever the variables say, if torch has one thread there (as in a DataLoader's
    workers), or if OpenMP's helpers cannot be had: see :class:`_Forks`.

    Raises:
        ValueError: A variable is not a positive integer.
    """
    wanted = requested_threads()
    if _forks.child and (threading.get_ident() == _forks.bereft or torch.get_num_threads() == 1):
        return 1
    if wanted is not None:
        return wanted
    launched = any(name in os.environ for name in _LAUNCHER_VARIABLES)
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and torch.get_num_threads() == 1:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(MOST_THREADS, max(1, available // (_positive("LOCAL_WORLD_SIZE", 1 << 20) or 1)))
    return torch.get_num_threads()


def requested_threads() -> int | None:
    """The number in ``$LIGHTNING_OPTIM_THREADS``; None if it is not set, or empty.

    Raises:
        ValueError: The variable is not a positive integer, or too large.
    """
    return _positive(THREADS_VARIABLE, MOST_THREADS)


def _positive(variable: str, most: int) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    # Not `isdecimal`, which takes the digits of all scripts.
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        raise ValueError(f"{variable}={text!r}; valid: a positive integer up to {most}")
    return int(text)
