"""A recorded step is the step itself: what changes from step to step is read from tables, not frozen.

There is no CUDA graph without a GPU. Here a recording notes each launch with its very arguments, runs none of them, and
a replay runs them all: what a graph would freeze is frozen too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim.engines.scaling import LossScale
from lightning_optim.engines.triton import TritonEngine, graph
from lightning_optim.warnings import LightningOptimWarning

from .common import give_gradients, make, weights


class Recorder:
    """Stands in for CUDA graphs.

    Attributes:
        graphs: Number of recordings.
        replays: Number of replays.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tape: list[Callable[[], Any]] | None = None
        self.graphs = self.replays = 0
        built = TritonEngine._built

        def taped(owner: TritonEngine, *args: Any) -> Any:
            kernels = built(owner, *args)
            wrapped = {n: tuple(_Taped(kernel, self) for kernel in getattr(kernels, n)) for n in ("scalars", "sweeps")}
            return type(kernels)(**{**vars(kernels), **wrapped})

        monkeypatch.setattr(TritonEngine, "_built", taped)
        monkeypatch.setattr(graph, "record", self.record)
        monkeypatch.setattr(graph, "DEVICES", ("cpu",))

    def record(self, launches: Callable[[], Any], device: torch.device) -> Callable[[], None]:
        tape: list[Callable[[], Any]] = []
        self.tape = tape
        launches()
        self.tape = None
        self.graphs += 1

        def replay() -> None:
            self.replays += 1
            for launch in tape:
                launch()

        return replay


class _Taped:
    def __init__(self, kernel: Any, recorder: Recorder) -> None:
        self.kernel, self.recorder = kernel, recorder

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            if self.recorder.tape is None:
                self.kernel[grid](*args, **options)
            else:
                self.recorder.tape.append(lambda: self.kernel[grid](*args, **options))

        return launch


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.mark.matrix(unless=lambda name: name == "lamb")
@pytest.mark.parametrize("name", ["adamw", "lamb", "lion", "sgd"])
def test_captured_steps_are_bit_equal(name: str, recorder: Recorder) -> None:
    """Through new gradient tensors, a schedule, a change of weight decay and a reloaded state."""
    runs = []
    for captured in (True, False):
        params = weights()
        optimizer: Any = make(name, params, max_grad_norm=1.0)
        optimizer.capture_steps(captured)
        norms = []
        for step in range(8):
            optimizer.zero_grad(set_to_none=True)
            give_gradients(params, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (step + 1)
                group["weight_decay"] = 0.1 * (step % 2)
            optimizer.step()
            norms.append(float(optimizer.grad_norm))
            if step == 4:
                optimizer.load_state_dict(optimizer.state_dict())
        runs.append(([p.detach().clone() for p in params], norms))
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(p, q)
    assert runs[0][1] == runs[1][1]
    # Options that switch weight decay on and off are another program for some rules: those record anew.
    assert recorder.graphs >= 2
    assert recorder.replays >= 4


def test_one_graph_serves_many_steps(recorder: Recorder) -> None:
    params = weights()
    optimizer = make("adamw", params)
    optimizer.capture_steps()
    for step in range(6):
        give_gradients(params, 2 * step)
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
        optimizer.step()
    assert (recorder.graphs, recorder.replays) == (1, 5)
    assert {float(optimizer.state[p]["step"]) for p in params} == {6.0}


def test_a_new_group_is_recorded_anew(recorder: Recorder) -> None:
    params = weights()
    late = nn.Parameter(torch.ones(3))
    optimizer = make("adamw", params)
    optimizer.capture_steps()
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": [late], "lr": 0.5})
        give_gradients([*params, late], 2 * step)
        optimizer.step()
    assert recorder.graphs == 2
    assert float(optimizer.state[late]["step"]) == 3
    assert (late - 1).abs().max() > 0.5


def test_a_loss_scale_is_read_at_each_replay(recorder: Recorder) -> None:
    params = [nn.Parameter(torch.zeros(3))]
    optimizer = make("sgd", params, lr=1.0)
    optimizer.capture_steps()
    scale, found = torch.tensor(1.0), torch.zeros(())
    for step in range(5):
        params[0].grad = torch.full((3,), torch.inf if step == 3 else 8.0)
        scale.fill_(2.0**step)
        found.zero_()
        with torch.no_grad():
            optimizer._stepper.step(loss=LossScale(scale, found))
        assert bool(found) == (step == 3)
    assert recorder.graphs == 1
    assert params[0].tolist() == [-(8 + 4 + 2 + 0.5)] * 3


def test_a_missing_gradient_is_an_error(recorder: Recorder) -> None:
    model = nn.Linear(2, 2)
    optimizer = make("sgd", list(model.named_parameters()))
    optimizer.capture_steps()
    model.weight.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"'bias'.*requires_grad=False"):
        optimizer.step()
    model.bias.requires_grad_(False)
    optimizer.step()


@pytest.mark.parametrize(("engine", "reason"), [("eager", "eager engine"), ("triton", "the weights are on cpu")])
def test_what_cannot_be_captured_is_stepped_all_the_same(engine: str, reason: str) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = make("sgd", [weight], engine=engine, lr=1.0)
    optimizer.capture_steps()
    weight.grad = torch.ones(2)
    with pytest.warns(LightningOptimWarning, match=f"not captured.*{reason}"):
        optimizer.step()
    assert weight.tolist() == [-1.0, -1.0]
