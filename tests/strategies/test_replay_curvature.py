"""Second derivatives under our strategies: of the whole window, with its noise, and nothing left behind."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations.common import Curious, directions
from torch import Tensor, nn

import lightning_optim
from lightning_optim.stepping.curvature import hessian_vector
from lightning_optim.stepping.evaluations import LossEvaluator
from lightning_optim.strategies import DetachedStrategy, InGraphStrategy

from .common import ROOTS, dataset, fit, known_warnings, scaled
from .replayed import noisy_class, noisy_network, seed
from .undoing import POLICY, poisoned_class

pytestmark = [*known_warnings, pytest.mark.usefixtures("one_thread")]

#: float32, in another order of operations, of products up to 10.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

sophia = partial(lightning_optim.Sophia, lr=0.03, gamma=1.0, update_interval=2)


class ByHand:
    """The training of :class:`Curious` or Sophia as a plain loop.

    Args:
        make: Makes the optimizer.
        accumulate: Batches in a window.
    """

    def __init__(self, make: Any, accumulate: int = 1) -> None:
        self.net = noisy_network()
        self.optimizer = make(self.net.parameters())
        self.accumulate = accumulate

    def fit(self, epochs: int = 1) -> ByHand:
        x, y = dataset(32).tensors
        batches = [(i, x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]) for i in range(8)]
        for _ in range(epochs):
            for at in range(0, 8, self.accumulate):
                self.step(batches[at : at + self.accumulate])
        return self

    def step(self, window: list[tuple[int, Tensor, Tensor]]) -> None:
        def loss() -> Tensor:
            total = torch.zeros(())
            for index, x, y in window:
                seed(index)
                total = total + nn.functional.mse_loss(self.net(x), y) / self.accumulate
            return total

        self.optimizer.zero_grad()
        loss().backward()
        buffers = [buffer.clone() for buffer in self.net.buffers()]
        if isinstance(self.optimizer, Curious):
            if self.optimizer.asks:
                self.optimizer.ask(LossEvaluator(self.optimizer, loss))
            self.optimizer.step()
        else:
            self.optimizer.step(evaluate=loss)
        for buffer, value in zip(self.net.buffers(), buffers, strict=True):
            buffer.copy_(value)


def assert_same(net: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, value), expected in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, **tolerance or CLOSE, msg=f"{name}: {value}, not {expected}")


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_products(accumulate: int, root: str) -> None:
    model = noisy_class(root)(Curious)
    run, _ = fit(model, accumulate_grad_batches=accumulate)
    expected = ByHand(Curious, accumulate).fit()
    assert_same(model.net, expected.net)
    found = run.optimizers[0].found
    assert len(found) == len(expected.optimizer.found) == -(-8 // accumulate // 2)
    for step, other in zip(found, expected.optimizer.found, strict=True):
        for product, value in zip(step, other, strict=True):
            torch.testing.assert_close(product, value, **CLOSE)
    # Each window that was asked about once more, and no hook with it.
    assert model.evaluated == 8 + accumulate * len(found)
    assert model.called.count("after_backward") == 8


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sophia(accumulate: int) -> None:
    model = noisy_class()(sophia)
    run, _ = fit(model, accumulate_grad_batches=accumulate)
    assert_same(model.net, ByHand(sophia, accumulate).fit().net)
    assert "Sophia is stepped by" in run.strategy.report()
    assert run.optimizers[0].param_groups[0]["updates"] == 8 // accumulate


def test_a_window_gives_the_estimate_of_one_large_batch() -> None:
    """In float64, without noise."""
    estimates = []
    for batch, accumulate in ((8, 1), (2, 4)):

        class Exact(noisy_class()):  # type: ignore[misc]
            def __init__(self, make: Any, batch: int) -> None:
                super().__init__(make, batch)
                self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()
                for number, p in enumerate(self.net.parameters()):
                    p.data = torch.sin(torch.arange(p.numel(), dtype=torch.float64) + number).view(p.shape)

            def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
                x, y = batch
                return nn.functional.mse_loss(self.net(x.double()), y.double())

        run, _ = fit(Exact(partial(sophia, betas=(0.9, 0.0)), batch), accumulate_grad_batches=accumulate, max_steps=1)
        estimates.append([state["hessian"] for state in run.optimizers[0].state.values()])
    for one, other in zip(*estimates, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert one.abs().max() > 0.1


def test_16_mixed() -> None:
    """Losses are scaled before they are differentiated, and products unscaled."""
    found = []
    for scale in (1.0, 64.0):
        model = noisy_class()(Curious)
        scaler = scaled()
        scaler.scaler._init_scale = scale
        run, _ = fit(model, plugins=[scaler], accumulate_grad_batches=4, max_steps=1)
        found.append(run.optimizers[0].found[0])
    model = noisy_class()(Curious)
    run, _ = fit(model, accumulate_grad_batches=4, max_steps=1)
    for one, other, exact in zip(*found, run.optimizers[0].found[0], strict=True):
        # Forward and backward in float16, of products up to 10.
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-2)
        torch.testing.assert_close(one, exact, rtol=5e-2, atol=5e-2)


def test_an_overflow_leaves_the_estimate_out() -> None:
    """Or, where the gradient overflows too, the whole step."""

    class Overflowing(noisy_class()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            return {"loss": output["loss"] * (1e30 if self.evaluated == 2 else 1)}  # the second time

    for plugins in ([], [scaled()]):
        model = Overflowing(sophia)
        run, _ = fit(model, plugins=plugins, max_steps=1)
        for p, state in run.optimizers[0].state.items():
            assert p.isfinite().all()
            if plugins:
                assert not state["hessian"].any()
                assert state["exp_avg"].any()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_in_the_middle_of_an_interval(accumulate: int, tmp_path: Path) -> None:
    make = partial(sophia, update_interval=3)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    straight, half, rest = (noisy_class()(make) for _ in range(3))
    fit(straight, max_epochs=2, **options)
    run, _ = fit(half, **options)
    assert run.optimizers[0].param_groups[0]["updates"] % 3 != 0
    run.save_checkpoint(tmp_path / "half.ckpt")
    fit(rest, max_epochs=2, ckpt_path=tmp_path / "half.ckpt", **options)
    assert_same(rest.net, straight.net, rtol=0, atol=0)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradients were written to between a backward pass and the step")
def test_dropped_gradients(set_to_none: bool) -> None:
    """Those of a batch that is dropped are not in the products either."""

    class Dropping(noisy_class()):  # type: ignore[misc]
        def on_before_backward(self, loss: Tensor) -> None:
            super().on_before_backward(loss)
            if len(self.called) == 4:  # before the second batch: zero_grad, and two hooks of the first
                self.zero_grad(set_to_none)

    dropping = Dropping(Curious)
    run, _ = fit(dropping, accumulate_grad_batches=2, max_steps=1)
    plain = noisy_class()(Curious)
    other, _ = fit(plain, accumulate_grad_batches=2, max_steps=1)
    x, y = dataset(32).tensors
    net = noisy_network()
    seed(1)
    params = list(net.parameters())
    second = hessian_vector(nn.functional.mse_loss(net(x[4:8]), y[4:8]) / 2, directions(params, 0))
    differs = False
    for p, found, both in zip(params, run.optimizers[0].found[0], other.optimizers[0].found[0], strict=True):
        torch.testing.assert_close(found, second[p], **CLOSE)
        differs |= not torch.allclose(found, both)
    assert differs


def test_steps_that_are_undone_do_not_count() -> None:
    runs = [fit(poisoned_class()(sophia, poisoned), InGraphStrategy(undo=POLICY))[0] for poisoned in ({}, {5: 1e6})]
    # The step before the spike, and the one that is left out.
    assert [run.optimizers[0].param_groups[0]["updates"] for run in runs] == [8, 6]


@pytest.mark.parametrize("name", ["step_in_backward", "capture"])
def test_what_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: True}
    with pytest.raises(ValueError, match=rf"Sophia with {name}=True"):
        fit(noisy_class()(sophia), InGraphStrategy(**options))


@pytest.mark.parametrize("strategy", ["detached", DetachedStrategy(clip="speculative")])
def test_detached_strategies_refuse_it(strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"detached: Sophia, whose step needs second derivatives.*'in_graph'"):
        fit(noisy_class()(sophia), strategy)


@pytest.mark.parametrize("root", ROOTS)
def test_strategies_that_do_not_answer(root: str) -> None:
    message = r"Sophia under .*no second derivative .* Valid: .*'in_graph', 'in_graph_ddp'.*step\(evaluate=...\)"
    with pytest.raises(ValueError, match=message) as error:
        fit(noisy_class(root)(sophia), "auto")
    assert "fsdp2" not in str(error.value)


def test_a_backward_of_the_modules_own() -> None:
    class Own(noisy_class()):  # type: ignore[misc]
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            super().backward(2 * loss, *args, **kwargs)

    with pytest.warns(match=r"a backward\(\) of its own, of which Sophia's second derivatives know nothing"):
        fit(Own(sophia), max_steps=1)


class Manual(noisy_class()):  # type: ignore[misc]
    """Manual optimization: the module answers."""

    answers = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def loss() -> Tensor:
            seed(batch_idx)
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        optimizer.zero_grad()
        self.manual_backward(loss())
        state = [buffer.clone() for buffer in self.net.buffers()]
        optimizer.step(**{"evaluate": loss} if self.answers else {})
        for buffer, value in zip(self.net.buffers(), state, strict=True):
            buffer.copy_(value)


@pytest.mark.parametrize("strategy", ["in_graph", "auto"])
def test_manual_optimization(strategy: str) -> None:
    model = Manual(sophia)
    fit(model, strategy)
    assert_same(model.net, ByHand(sophia).fit().net)
    model = Manual(sophia)
    model.answers = False
    with pytest.raises(RuntimeError, match=r"Sophia: step\(\) without evaluate=.*valid: step\(evaluate=lambda"):
        fit(model, strategy)
