"""Warnings point at the line of the user who can do something about them."""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_optim
from lightning_optim.warnings import LightningOptimWarning, warn_once

HERE = Path(__file__)


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.warnings._seen", set())


def line_of(mark: str) -> int:
    return next(n for n, line in enumerate(HERE.read_text().splitlines(), 1) if line.endswith(f"# {mark}"))


def points_at(mark: str, act: Callable[[], Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LightningOptimWarning)
        act()
    ours = [one for one in caught if one.category is LightningOptimWarning]
    assert [(one.filename, one.lineno) for one in ours] == [(str(HERE), line_of(mark))]


def between(package: str, call: Callable[[], None]) -> Callable[[], None]:
    """A function of another package that calls what it is given."""
    module = types.ModuleType(package)
    exec("def through(call):\n    return call()\n", vars(module))  # noqa: S102
    return partial(module.through, call)


def schedule() -> Any:
    return lightning_optim.Linear(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), warmup_steps=9)


def test_a_call_of_ours() -> None:
    def act() -> None:
        schedule().set_total_steps(3, filled=True)  # direct

    points_at("direct", act)


@pytest.mark.parametrize(
    "package", ["torch.optim.x", "lightning.pytorch.x", "accelerate.x", "jsonargparse", "contextlib"]
)
def test_through_frameworks(package: str) -> None:
    def act() -> None:
        deep = between(package, partial(schedule().set_total_steps, 3, filled=True))
        deep()  # through

    points_at("through", act)


@pytest.mark.parametrize("package", ["lightning_optimal", "torchvision.x", "lightnings"])
def test_packages_with_names_like_theirs_are_the_users(package: str) -> None:
    with pytest.warns(LightningOptimWarning) as caught:
        between(package, partial(schedule().set_total_steps, 3, filled=True))()
    assert caught[0].filename == "<string>"


def test_a_fit_whose_hooks_are_called_by_lightning() -> None:
    class Model(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            self.layer = torch.nn.Linear(1, 1)
            optimizer = torch.optim.SGD(self.layer.parameters(), lr=1.0)
            return [optimizer], [lightning_optim.Linear(optimizer, warmup_steps=9)]

    ones: Any = torch.ones(2, 1)
    data = torch.utils.data.DataLoader(ones)

    def act() -> None:
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.fit(Model(), data)  # fit

    points_at("fit", act)


def test_a_context_manager_of_the_users() -> None:
    @contextlib.contextmanager
    def managed() -> Iterator[None]:
        yield
        warn_once("at the end")  # yielded

    def act() -> None:
        with managed():
            pass

    points_at("yielded", act)


def test_a_thread_that_has_nothing_of_the_users() -> None:
    def in_a_thread() -> None:
        thread = threading.Thread(target=partial(schedule().set_total_steps, 3, filled=True))
        thread.start()
        thread.join()

    with pytest.warns(LightningOptimWarning) as caught:
        in_a_thread()
    assert Path(caught[0].filename).name == "schedule.py"


def test_filters_by_module_are_those_of_the_users_module() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=LightningOptimWarning, module=__name__.replace(".", r"\."))
        warn_once("not for this module")
    assert caught == []


def test_once_is_once_whatever_the_filters() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for message in ("first", "second"):
            warn_once(message, key="the same")
    assert [str(one.message) for one in caught] == ["first"]
