"""Range tests without a Trainer: the numbers, the suggestions, a plain loop that is put back bit for bit."""

from __future__ import annotations

import json
import math
import random
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.control.lr_finder import RangeTest, find_lr, plot
from lightning_optim.control.lr_finder.rates import GroupRates
from lightning_optim.control.lr_finder.suggestions import METHODS, _rising, fit_valley, suggest
from lightning_optim.control.lr_finder.sweep import LRRange, Sweep
from lightning_optim.control.lr_finder.training_state import TrainingState
from lightning_optim.warnings import LightningOptimWarning


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


# ---------------------------------------------------------------- the range, and the sweep


def test_ranges_have_equal_ratios_or_differences() -> None:
    lrs = list(LRRange(1e-6, 1.0, 13))
    assert (lrs[0], lrs[-1], len(lrs)) == (pytest.approx(1e-6), 1.0, 13)
    assert [b / a for a, b in pairwise(lrs)] == pytest.approx([10**0.5] * 12)
    assert list(LRRange(1.0, 3.0, 11, "linear")) == pytest.approx([1 + 0.2 * k for k in range(11)])


def test_the_average_is_unbiased() -> None:
    sweep = Sweep(smoothing=0.9)
    for _ in range(5):
        sweep.add(0.1, 3.0)
    assert sweep.smoothed == pytest.approx([3.0] * 5)
    sweep = Sweep(smoothing=0.5)
    for loss in (1.0, 2.0):
        sweep.add(0.1, loss)
    assert sweep.smoothed == pytest.approx([1.0, (0.25 * 1 + 0.5 * 2) / 0.75])


@pytest.mark.parametrize(
    ("losses", "last"),
    [
        ([4.0, 2.0, 1.0, 9.9, 10.1], 4),  # 3 times what it had fallen by, above the best
        ([4.0, 4.0, 15.9, 16.1], 3),
        ([-1.0, -2.0, -3.0, 5.9, 6.1], 4),  # below zero, where "4 times the best" would be below the best
        ([1.0, math.nan], 0),
        ([1.0, math.inf], 0),
    ],
)
def test_it_stops_where_the_loss_diverges(losses: list[float], last: int) -> None:
    sweep = Sweep(smoothing=0.0, divergence=4.0)
    assert [sweep.add(0.1 * k, loss) for k, loss in enumerate(losses)] == [True] * (len(losses) - 1) + [False]
    assert len(sweep.losses) == last + 1
    assert sweep.stopped is not None
    unlimited = Sweep(smoothing=0.0, divergence=None)
    assert [unlimited.add(0.1, loss) for loss in losses] == [math.isfinite(loss) for loss in losses]


# ---------------------------------------------------------------- suggestions

LRS = list(LRRange(1e-7, 10.0, 100))


def curve(best: float = 0.1, noise: float = 0.02, seed: int = 0) -> list[float]:
    """A plateau, a descent around a tenth of ``best``, a rise beyond ``best``."""
    generator = random.Random(seed)  # noqa: S311 # noise
    return [
        2 - 1.5 / (1 + (best / 10 / lr)) + 0.4 * (lr / best) ** 2 / 4 + generator.gauss(0, noise)
        for lr in LRS
        if lr < 1
    ]


def suggested(losses: list[float], *, stopped: bool = True) -> dict[Any, Any]:
    sweep = Sweep(0.8, None)
    for lr, loss in zip(LRS, losses, strict=False):
        sweep.add(lr, loss)
    return suggest(sweep.lrs, sweep.losses, sweep.smoothed, stopped=stopped)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("best", [1e-3, 1e-2, 0.1])
def test_suggestions_lie_in_the_descent(best: float, seed: int) -> None:
    for name, found in suggested(curve(best, seed=seed)).items():
        assert found.lr is not None, name
        assert best / 50 < found.lr < best, (name, found)


def test_a_valley_is_the_closest_of_all() -> None:
    generator = random.Random(0)  # noqa: S311 # data
    for _ in range(300):
        values = [generator.gauss(0, 1) for _ in range(generator.randint(1, 10))]
        fit = fit_valley(values)
        low = fit.index(min(fit))
        assert all(a >= b for a, b in pairwise(fit[: low + 1]))
        assert all(a <= b for a, b in pairwise(fit[low:]))
        others = ([-v for v in _rising([-v for v in values[:k]])] + _rising(values[k:]) for k in range(len(values) + 1))
        error = sum((a - b) ** 2 for a, b in zip(fit, values, strict=True))
        best = min(sum((a - b) ** 2 for a, b in zip(other, values, strict=True)) for other in others)
        assert error == pytest.approx(best, abs=1e-12)


def test_noise_alone_suggests_next_to_nothing() -> None:
    generator = random.Random(0)  # noqa: S311 # noise
    found = [suggested([generator.gauss(5, 1) for _ in LRS], stopped=False) for _ in range(300)]
    assert sum(one["steepest"].lr is not None for one in found) <= 9


@pytest.mark.parametrize(
    ("losses", "stopped", "reason"),
    [
        ([1.0] * 5, False, "there are 5 points, and no curve can be seen in fewer than 10"),
        ([1.0] * 100, False, "the loss does not fall: its lowest mean"),
        ([2.0 + k for k in range(30)], True, "does not fall anywhere before it diverges: lower min_lr"),
        ([2.0 - 0.01 * k for k in range(100)], False, "still falls at the end of the range: raise max_lr"),
    ],
)
def test_why_there_is_none(losses: list[float], stopped: bool, reason: str) -> None:
    found = suggested(losses, stopped=stopped)
    assert list(found) == list(METHODS)
    assert all(one.lr is None and reason in one.reason for one in found.values())


def test_edges_of_the_range() -> None:
    falls_at_once = [2.0 * 0.8**k for k in range(12)] + [0.2 + 0.1 * k for k in range(20)]
    found = suggested(falls_at_once)
    assert "is below the range: lower min_lr" in found["minimum"].reason or found["minimum"].lr is not None
    assert "beginning of the range" in found["steepest"].reason


# ---------------------------------------------------------------- results


def result(**options: Any) -> RangeTest:
    sweep = Sweep(0.8, 4.0)
    for lr, loss in zip(LRS, curve(), strict=False):
        sweep.add(lr, loss)
    return RangeTest.of(sweep, reference=0.1, **options)


def test_results_are_saved_and_drawn(tmp_path: Path) -> None:
    test = result(method="minimum")
    files = test.save(tmp_path / "a" / "b")
    assert [file.name for file in files] == ["lr_finder.json", "lr_finder.png"]
    assert RangeTest.from_dict(json.loads(files[0].read_text())) == test
    assert files[1].read_bytes()[:4] == b"\x89PNG"
    assert test.table().count("\n") == 3
    assert "> minimum" in test.table()
    empty = RangeTest.of(Sweep(), reference=0.1)
    assert empty.suggestion is None
    assert empty.table().startswith("range test: 0 steps\nno suggestion: there are 0 points")
    with pytest.raises(ValueError, match="there is no point to draw"):
        empty.plot(tmp_path / "empty.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "can_plot", lambda: False)
    assert [file.name for file in result().save(tmp_path)] == ["lr_finder.json"]
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        result().plot(tmp_path / "a.png")


def test_the_picture_says_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    test = result()
    test.plot(tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "learning rate (log scale)"
    assert axes.get_ylabel() == "training loss before the step"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert f"steepest: lr = {test.suggestion:g} (suggested)" in labels
    marked = next(line for line in axes.lines if line.get_label() == f"steepest: lr = {test.suggestion:g} (suggested)")
    assert marked.get_xdata()[0] == test.suggestion


# ---------------------------------------------------------------- a plain loop


class Restless(nn.Module):
    """Changes all that a step may change."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))
        self.steps, self.last = 0, torch.zeros(())
        self.losses: dict[str, Any] = {"all": [], "few": deque([0.0], maxlen=2), "pair": (torch.ones(2), 1)}

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.frozen.data.add_(1)
        self.steps += 1
        self.last = x.mean().detach()
        self.losses["all"].append(self.steps)
        self.losses["few"].append(random.random())  # noqa: S311 # noise
        self.losses["pair"][0].mul_(2)
        self.cache = [self.steps]
        self.train(self.steps % 3 > 0)
        return self.net(x)


Make = Callable[[Any], torch.optim.Optimizer]


class Counting(torch.optim.SGD):
    """Keeps something outside of its state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        self.extra = self.calls
        return super().step(closure)


class Elsewhere(Counting):
    """And writes it into a `state_dict` of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls = state_dict.pop("calls")
        super().load_state_dict(state_dict)


MAKES: dict[str, Make] = {
    "ours": lambda params: lightning_optim.AdamW(params, lr=0.01),
    "torch": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01)),
    "Schedule-Free": lambda params: lightning_optim.ScheduleFreeAdamW(params, lr=0.01),
    "counting": Counting,
    "elsewhere": Elsewhere,
}


def contents(model: Restless, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "optimizer": json.dumps(optimizer.state_dict(), default=lambda t: t.tolist()),
        "attributes": (model.steps, float(model.last), repr(model.losses), hasattr(model, "cache"), model.training),
        "counts": [getattr(optimizer, name, None) for name in ("calls", "extra")],
        "noise": (random.random(), torch.rand(2).tolist()),  # noqa: S311 # noise
    }


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", MAKES)
def test_everything_is_put_back(name: str, warm: bool) -> None:
    def build() -> tuple[Restless, torch.optim.Optimizer, Callable[[], Tensor]]:
        torch.manual_seed(0)
        random.seed(0)
        model = Restless()
        optimizer = MAKES[name](model.net.parameters())

        def step() -> Tensor:
            model.train()
            loss = model(torch.randn(8, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        if warm:
            step()
        return model, optimizer, step

    model, optimizer, step = build()
    buffer, gradient, lr = model.count, model.net[0].weight.grad, optimizer.param_groups[0]["lr"]
    test = find_lr(optimizer, step, modules=[model], min_lr=1e-5, max_lr=1.0, steps=15)
    assert len(test.lrs) >= 5
    assert model.count is buffer, "others may hold it"
    assert model.net[0].weight.grad is gradient
    assert optimizer.param_groups[0]["lr"] is lr
    found = contents(model, optimizer)
    expected = contents(*build()[:2])
    assert found["model"].keys() == expected["model"].keys()
    assert all(torch.equal(found["model"][key], expected["model"][key]) for key in found["model"])
    for one, other in zip(found["grads"], expected["grads"], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    for key in ("optimizer", "attributes", "counts", "noise"):
        assert found[key] == expected[key], key


def test_a_failure_puts_everything_back() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()

    def step() -> Tensor:
        model.weight.data.add_(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_lr(optimizer, step, modules=[model])
    assert torch.equal(model.weight, before)
    assert optimizer.param_groups[0]["lr"] == 0.1
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)

    def scaled() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 2)).square().mean()
        scaler.scale(loss * 1e3).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    state = scaler.state_dict()
    find_lr(optimizer, scaled, modules=[model], stateful=[scaler])
    assert scaler.state_dict() == state
    assert torch.equal(model.weight, before)
    with pytest.raises(TypeError, match="returned no loss"):
        find_lr(optimizer, lambda: None, modules=[model])


def test_the_learning_rates_of_groups_keep_their_ratios_whatever_a_schedule_does() -> None:
    params = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (1.0, 4.0, 2.0), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 0.0, lambda _: 0.5, lambda _: 1.0])
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 2.0, 2.0]
    rates = GroupRates(optimizer)
    assert rates.reference == 4.0
    rates.set(0.8)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.8, 0.4])
    rates.put_back()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 2.0, 2.0]


def test_none_is_applied_where_none_is_sound() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(LightningOptimWarning, match=r"find_lr: no learning rate is suggested, and it stays at 0\.1"):
        test = find_lr(optimizer, lambda: 1.0, modules=[model], apply=True)
    assert test.suggestion is None
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_state_that_cannot_be_copied_leaves_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    gradient = model.weight.grad
    monkeypatch.setattr(TrainingState, "_copy", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        TrainingState([model], [torch.optim.SGD(model.parameters(), lr=0.1)])
    assert model.weight.grad is gradient
