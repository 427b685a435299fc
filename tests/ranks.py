"""Tests in two processes that talk to each other."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

RANKS = 2
TIMEOUT = 150  # seconds: importing torch and lightning twice on a busy machine takes 20


def launch(target: Callable[[int, Path], None], folder: Path, ranks: int = RANKS) -> Path:
    """Run ``target(rank, folder)`` in two fresh processes, or in so many; all must end well."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, folder), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return folder


def leave() -> None:
    """End a process whose work is done, together with the others.

    Without the destructors of gloo's threads: now and then one aborts ("terminate called without an active exception").
    """
    dist.barrier()
    os._exit(0)
