"""Settings for all tests."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="every optimizer through all, not its representatives alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes long, so that no worker is left with it at the end; leave out what ``--matrix`` runs.

    That is tests marked ``matrix``, but for cases in which its ``unless`` holds.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if config.getoption("--matrix"):
        return
    left_out = {item for item in items if not all(_runs(item, marker) for marker in item.iter_markers("matrix"))}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _runs(item: pytest.Item, marker: pytest.Mark) -> bool:
    if "unless" not in marker.kwargs:
        return False
    unless = marker.kwargs["unless"]
    assert isinstance(item, pytest.Function)
    return unless(**{name: item.callspec.params[name] for name in inspect.signature(unless).parameters})


def pytest_collection_finish() -> None:
    """Have the garbage collector leave alone what is there by now: ten thousand tests, and all that they import.

    It would look at each of these objects whenever it runs, which takes 0.3 s, and some tests have it run often.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter free them when it ends: extension modules complain of what they find left."""
    gc.unfreeze()


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
