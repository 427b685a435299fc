"""How many threads a step uses."""

from __future__ import annotations

import os

import torch

THREADS_VARIABLE = "LIGHTNING_OPTIM_THREADS"

# Set by torchrun, and so by `accelerate launch`, for each process that it starts.
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")


def thread_count() -> int:
    """Threads for one step: this process's share of the processors that it may run on.

    ``$LIGHTNING_OPTIM_THREADS`` if set; else torch's own number, except where a launcher has set
    ``OMP_NUM_THREADS=1`` for every process (torchrun does, as a precaution): one thread would starve the step, so
    the processors are divided by the number of processes on this machine instead.

    Raises:
        ValueError: The variable is not a positive integer.
    """
    wanted = os.environ.get(THREADS_VARIABLE)
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise ValueError(f"{THREADS_VARIABLE}={wanted!r}; valid: a positive integer")
        return int(wanted)
    launched = any(name in os.environ for name in _LAUNCHER_VARIABLES)
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and torch.get_num_threads() == 1:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return torch.get_num_threads()
