"""Settings for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Keep the kernels that tests compile out of the user's own cache, and from one run to the next."""
    if config.cache is not None:
        os.environ.setdefault("LIGHTNING_OPTIM_CACHE", str(config.cache.mkdir("kernels")))
        os.environ.setdefault("TRITON_CACHE_DIR", str(config.cache.mkdir("triton")))
    # Under pytest-xdist processes share the cores: more threads than that only wait for each other.
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True)
def _answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no loss, what steps ask for is made up."""
    from answering import EVALUATE, make_up_answers

    if not set(EVALUATE) & set(Path(str(request.path)).parts):
        make_up_answers(monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Where tensors are too small for more: threads that wait for each other would only slow the tests down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
