"""The thread of the host side uses as many threads as the one that steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_optim.engines.host.threads import thread_count
from lightning_optim.offload import Detached

from .common import PAIRS, detached, known_warnings, loss_of, weights

pytestmark = known_warnings


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def threads_of(pipeline: Detached) -> int:
    found: list[int] = []
    pipeline._host.submit(lambda: found.append(thread_count())).result()
    return found[0]


def test_the_worker_has_as_many_threads_as_who_steps() -> None:
    """OpenMP keeps the number for each thread: one that has started never hears of a change."""
    params = weights()
    with detached(PAIRS["torch AdamW"][0](params)) as pipeline:
        for number, threads in enumerate((3, 1, 2)):
            torch.set_num_threads(threads)
            loss_of(params, number).backward()
            pipeline.step()
            pipeline.zero_grad()
            assert threads_of(pipeline) == threads == torch.get_num_threads()


def test_omp_num_threads_1_under_a_launcher_does_not_starve_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_OPTIM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    torch.set_num_threads(1)
    with detached(PAIRS["torch AdamW"][0](weights())) as pipeline:
        assert threads_of(pipeline) == 6
