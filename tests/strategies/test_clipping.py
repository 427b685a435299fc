"""Clipping inside of the step: when it happens there, when it cannot, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim

from .common import CLOSE, EXACT, OPTIMIZERS, Model, assert_same_steps, fit, known_warnings

pytestmark = known_warnings

CLIP = {"gradient_clip_val": 0.5}
EITHER = pytest.mark.parametrize("name", ["ours", "torch AdamW"])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The limits that torch's own clipping is called with."""
    called: list[float] = []
    stock = nn.utils.clip_grad_norm_

    def counted(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Tensor:
        called.append(max_norm)
        return stock(parameters, max_norm, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    return called


class Asking(Model):
    """Clips by a limit that moves, as a module may."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.5 / (1 + self.global_step), gradient_clip_algorithm="norm")


class AskingTwice(Model):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        optimizer = self.optimizers()  # as Lightning wraps it
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")


class ChangingBefore(Model):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.net[0].weight.grad *= 0.5
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")


class ChangingAfter(Model):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")


class OnItsOwn(Model):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        for p in self.parameters():
            nn.utils.clip_grad_norm_(p, 0.1)


@EITHER
def test_no_pass_of_its_own(name: str, passes: list[float]) -> None:
    fit(Model(OPTIMIZERS[name]), **CLIP)
    assert passes == []
    fit(Model(OPTIMIZERS["foreign"]), **CLIP)
    assert passes == [0.5] * 8


@EITHER
@pytest.mark.parametrize(
    ("model", "outside"),
    # The first step of a module with its own way of clipping is as ever, to see what it does afterwards.
    [(Asking, 1), (AskingTwice, 2), (ChangingBefore, 1), (ChangingAfter, 8), (OnItsOwn, 48)],
)
def test_a_module_with_its_own_way_of_clipping(name: str, model: Any, outside: int, passes: list[float]) -> None:
    _, found = fit(model(OPTIMIZERS[name]))
    assert len(passes) == outside
    _, expected = fit(model(OPTIMIZERS[name]), "auto")
    exact = name == "ours" and model in (ChangingAfter, OnItsOwn)
    assert_same_steps(found, expected, **EXACT if exact else CLOSE)


def test_a_module_that_changes_gradients_after_clipping_later_on() -> None:
    """What cannot be put right any more is an error."""

    class Late(Model):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            if self.global_step == 2:
                self.net[0].weight.grad *= 0.5

    with pytest.raises(RuntimeError, match="changed gradients after it had called clip_gradients"):
        fit(Late())


def _limited(params: Any) -> torch.optim.Optimizer:
    return lightning_optim.AdamW(params, lr=0.05, max_grad_norm=1.5)


def test_two_limits_are_refused() -> None:
    message = r"AdamW.* has max_grad_norm=1.5.*gradient_clip_val=0.5.*valid: one of them"
    with pytest.raises(ValueError, match=message):
        fit(Model(_limited), **CLIP)

    class Late(Asking):
        def on_train_batch_start(self, *_: Any) -> None:
            self.started = True

    model = Late(_limited)
    with pytest.raises(ValueError, match=r"has max_grad_norm=1.5.*gradient_clip_val=0.25"):
        fit(model)
    assert model.started


def test_the_optimizers_own_limit_is_kept() -> None:
    _, found = fit(Model(_limited))
    _, expected = fit(Model(_limited), "auto")
    assert_same_steps(found, expected, **EXACT)


def test_the_norm_is_known() -> None:
    norms: list[float] = []

    class Norms(Model):
        def on_train_batch_end(self, *_: Any) -> None:
            norms.append(float(self.trainer.optimizers[0].grad_norm))

    fit(Norms(OPTIMIZERS["ours"]), **CLIP)
    assert len(norms) == 8
    assert max(norms) > 0.5  # before clipping
