"""Tests in two processes that talk to each other."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

RANKS = 2
TIMEOUT = 150  # seconds: importing torch and lightning twice on a busy machine takes 20


def launch(target: Callable[[int, Path], None], folder: Path, ranks: int = RANKS) -> Path:
    """Run ``target(rank, folder)`` in two processes, or in so many; all must end well.

    The processes are fresh, but for the frameworks, which they find imported: forked from one that has done nothing
    else, they start in a tenth of the time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
    arguments = [(target, dict(os.environ), rank, folder) for rank in range(ranks)]
    processes = [context.Process(target=_run, args=these, daemon=True) for these in arguments]
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


def _run(target: Callable[[int, Path], None], environment: dict[str, str], rank: int, folder: Path) -> None:
    os.environ.clear()  # it is that of the first test that launched anything
    os.environ.update(environment)
    target(rank, folder)


def enter(rank: int, folder: Path) -> None:
    """Begin a process of a Lightning training in several: quietly, with one thread, in one group with the others."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")
    os.environ.pop("LIGHTNING_OPTIM_ENGINE", None)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)


def leave() -> None:
    """End a process whose work is done, together with the others.

    Without the destructors of gloo's threads: now and then one aborts ("terminate called without an active exception").
    """
    dist.barrier()
    os._exit(0)
