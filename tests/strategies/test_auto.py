"""``optim_auto``: what it chooses, and that running out of memory changes where the step runs, and nothing else."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import Tensor, nn

from lightning_optim.placement.choice import PlacementError
from lightning_optim.placement.machine import Machine
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.strategies import OptimAutoStrategy

from .common import EXACT, OPTIMIZERS, Model, assert_same_steps, fit, known_warnings, make_trainer, model_class, scaled

pytestmark = [*known_warnings, pytest.mark.filterwarnings("ignore:optim_auto. in_graph ran out of device memory")]

CLIP = {"gradient_clip_val": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and accumulate": CLIP | {"accumulate_grad_batches": 2},
    "accumulate": {"accumulate_grad_batches": 4},
}


class Dropping(Model):
    """With noise, and with batch norms, which an evaluation that is made twice must not count twice."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.net.insert(1, nn.BatchNorm1d(7)).insert(2, nn.Dropout(0.2))
        self.net[0].register_parameter("bias", None)  # its gradient would be zero and some noise, which Adam enlarges
        self.fails: Callable[[str, int], bool] = lambda place, batch_idx: False
        self.batch_idx = -1

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.batch_idx = batch_idx
        loss = super().training_step(batch, batch_idx)
        self._maybe("forward")
        loss.register_hook(lambda grad: self._maybe("backward"))
        self.log("loss", loss.detach())
        return loss

    def on_train_start(self) -> None:
        torch.manual_seed(7)

    def _maybe(self, place: str) -> None:
        if self.fails(place, self.batch_idx):
            raise torch.OutOfMemoryError("no more memory (this is a test)")


def once(place: str, batch_idx: int) -> Callable[[str, int], bool]:
    """Whether it fails: at one place of one batch, the first time."""
    left = [1]

    def fails(where: str, at: int) -> bool:
        hit = (where, at) == (place, batch_idx) and bool(left)
        if hit:
            left.pop()
        return hit

    return fails


@pytest.fixture
def failing_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Engines find no memory for their plan at the third step."""
    steps = [0]
    plan = Stepper.plan

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 3:
            raise torch.OutOfMemoryError("no more memory (this is a test)")
        return plan(self, *args, **kwargs)

    monkeypatch.setattr(Stepper, "plan", failing)
    return steps


def test_it_is_in_graph_where_there_is_room() -> None:
    run, found = fit(Model(OPTIMIZERS["ours"]), "optim_auto", **CLIP)
    _, expected = fit(Model(OPTIMIZERS["ours"]), "in_graph", **CLIP)
    assert_same_steps(found, expected, **EXACT)
    assert run.strategy.plan.placement == "in_graph"
    assert "optim_auto: in_graph: the step needs" in run.strategy.report()


def with_room(monkeypatch: pytest.MonkeyPatch, device: int, host: int) -> None:
    card = Machine("cuda", "a card", 1, device, host, 2e10, 2e10, 4e10, 9e11)
    monkeypatch.setattr(Machine, "measure", classmethod(lambda cls, device=None: card))


def test_it_is_detached_where_the_state_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(p.nbytes for p in Model().parameters())
    with_room(monkeypatch, int(2 * weights), 1 << 30)
    run, found = fit(Model(OPTIMIZERS["ours"]), OptimAutoStrategy(activation_gb=0), **CLIP)
    _, expected = fit(Model(OPTIMIZERS["ours"]), "auto", **CLIP)
    assert_same_steps(found, expected)
    assert run.strategy.plan.placement == "detached"
    assert "in_graph does not fit" in run.strategy.report()
    assert "in host memory" in run.strategy.report()


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, 100, 100)
    with pytest.raises(PlacementError, match="no placement fits"):
        fit(Model(OPTIMIZERS["ours"]), OptimAutoStrategy(activation_gb=0))


@pytest.mark.matrix(
    unless=lambda name, case, place: name == "ours" or (case == "clip and accumulate" and place == ("backward", 2))
)
@pytest.mark.parametrize("place", [("forward", 3), ("backward", 2), ("backward", 5)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["ours", "torch AdamW", "foreign"])
def test_out_of_memory(name: str, case: str, place: tuple[str, int]) -> None:
    model = Dropping(OPTIMIZERS[name])
    model.fails = once(*place)
    run, found = fit(model, "optim_auto", **CASES[case])
    assert run.strategy.plan.placement == "detached"
    assert "ran out of device memory (no more memory (this is a test))" in run.strategy.report()
    # In place, and on masters in other buckets: the same engines, but the sums of a norm are in another order.
    undisturbed = Dropping(OPTIMIZERS[name])
    _, expected = fit(undisturbed, "in_graph", **CASES[case])
    assert_same_steps(found, expected)
    for (key, ours), (_, theirs) in zip(model.named_buffers(), undisturbed.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)


@pytest.mark.parametrize("place", [("forward", 1), ("backward", 4)])
@pytest.mark.parametrize("name", ["ours", "torch AdamW", "foreign"])
def test_out_of_memory_with_a_loss_scale(name: str, place: tuple[str, int]) -> None:
    models = [Dropping(OPTIMIZERS[name]), Dropping(OPTIMIZERS[name])]
    models[0].fails = once(*place)
    for model in models:
        model.overflows = {2}
    run, found = fit(models[0], "optim_auto", plugins=[scaled()], **CLIP)
    stock, expected = fit(models[1], "in_graph", plugins=[scaled()], **CLIP)
    assert_same_steps(found, expected)
    assert run.precision_plugin.state_dict() == stock.precision_plugin.state_dict()
    assert run.strategy.plan.placement == "detached"


@pytest.mark.parametrize("case", CASES)
def test_out_of_memory_in_the_step(case: str, failing_step: list[int]) -> None:
    run, found = fit(Dropping(OPTIMIZERS["torch AdamW"]), "optim_auto", **CASES[case], max_epochs=2)
    assert run.strategy.plan.placement == ("detached" if failing_step[0] >= 3 else "in_graph")
    assert failing_step[0] >= 3
    _, expected = fit(Dropping(OPTIMIZERS["torch AdamW"]), "in_graph", **CASES[case], max_epochs=2)
    assert_same_steps(found, expected)


def test_a_foreign_step_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]
    stock = Foreign._init_group

    def failing(self: Any, *args: Any) -> Any:
        calls[0] += self.param_groups[0]["params"][0].device.type != "meta"  # where the plan looks at a step
        if calls[0] == 3:
            raise torch.OutOfMemoryError("no more memory (this is a test)")
        return stock(self, *args)

    monkeypatch.setattr(Foreign, "_init_group", failing)
    run, found = fit(Dropping(OPTIMIZERS["foreign"]), "optim_auto")
    monkeypatch.undo()
    assert run.strategy.plan.placement == "detached"
    _, expected = fit(Dropping(OPTIMIZERS["foreign"]), "auto")
    assert_same_steps(found, expected)


class StatesFirst(torch.optim.Optimizer):
    """Changes all its states before the first weight."""

    def __init__(self, params: Any, fails_at: int) -> None:
        super().__init__(params, {"lr": 0.01})
        self.fails_at = fails_at

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in weights:
            state = self.state[p] or {"momentum": torch.zeros_like(p), "count": 0}
            state["momentum"].mul_(0.9).add_(p.grad)
            state["count"] += 1
            self.state[p] = state
        if state["count"] == self.fails_at:
            self.fails_at = 0
            raise torch.OutOfMemoryError("no more memory (this is a test)")
        for p in weights:
            p.sub_(self.state[p]["momentum"] * self.param_groups[0]["lr"])
        return loss


def test_a_first_step_that_had_begun_with_its_states() -> None:
    """They are made anew."""
    run, found = fit(Model(partial(StatesFirst, fails_at=1)), "optim_auto")
    assert run.strategy.plan.placement == "detached"
    _, expected = fit(Model(partial(StatesFirst, fails_at=0)), "auto")
    assert_same_steps(found, expected)


def test_a_later_step_that_had_begun_with_its_states() -> None:
    """What they were is gone: done again, it would count twice."""
    with pytest.raises(torch.OutOfMemoryError):
        fit(Model(partial(StatesFirst, fails_at=2)), "optim_auto")


def test_hooks_after_a_backward_pass_that_is_done_again() -> None:
    class Hooked(Dropping):
        def on_after_backward(self) -> None:
            self.after.append(self.batch_idx)

    model = Hooked(OPTIMIZERS["ours"])
    model.after, model.fails = [], once("backward", 3)
    run, _ = fit(model, "optim_auto")
    assert run.strategy.plan.placement == "detached"
    assert model.after == list(range(8))


def test_what_failed_is_freed_before_it_is_done_again() -> None:
    """The graph of the loss, which keeps activations; and afterwards the batches of the window."""

    class Watching(Dropping):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            self.alive.append((batch_idx, any(ref() is not None for ref in self.graphs)))
            loss = super().training_step(batch, batch_idx)
            part_of_graph = threading.Event()  # any object that can be referred to weakly
            self.graphs.append(weakref.ref(part_of_graph))
            loss.grad_fn.metadata["part"] = part_of_graph
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            self.windows.append(self.trainer.strategy._window)

    model = Watching(OPTIMIZERS["ours"])
    model.alive, model.graphs, model.windows, model.fails = [], [], [], once("backward", 3)
    fit(model, "optim_auto")
    assert [alive for batch_idx, alive in model.alive if batch_idx == 3][1:] == [False]
    assert model.windows[2] is not None
    assert model.windows[3:] == [None] * 5


def test_the_plan_is_said_once() -> None:
    run, _ = fit(Model(OPTIMIZERS["ours"]), "optim_auto")
    assert run.strategy.report().count("optim_auto: in_graph: the step needs") == 1


def test_the_next_fit_begins_with_the_options_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model, strategy = Model(OPTIMIZERS["ours"]), OptimAutoStrategy()
    trainer = make_trainer(strategy=strategy, accelerator="auto")
    given = strategy.options
    strategy.options = replace(given, clip="speculative")  # as a fit may leave them
    trainer.fit(model)
    assert strategy.options == given


@pytest.mark.parametrize(
    ("clip", "name", "options", "message"),
    [
        ("none", "ours", CLIP, "clip='none' with gradient_clip_val=0.5"),
        ("speculative", "foreign", {}, "clip='speculative' with Foreign"),
    ],
)
def test_what_a_fall_back_could_not_serve(clip: Any, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Model(OPTIMIZERS[name]), OptimAutoStrategy(clip=clip), **options)


def test_masters_of_a_checkpoint_after_a_fall_back(tmp_path: Path) -> None:
    """They are saved; and a run that steps where the weights are says that it does not use them."""

    class InBfloat16(Dropping):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return super().training_step([batch[0].to(self.net[0].weight.dtype), batch[1]], batch_idx)

    model = InBfloat16(OPTIMIZERS["torch AdamW"])
    model.fails = once("backward", 3)
    options = {"precision": "bf16-true"}
    run, _ = fit(model, "optim_auto", **options)
    run.save_checkpoint(tmp_path / "auto.ckpt")
    saved = torch.load(tmp_path / "auto.ckpt", weights_only=True)
    (masters,) = saved["detached_masters"]
    for key, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), saved["state_dict"][key])
    assert saved["optimizer_states"][0]["state"][0]["exp_avg"].dtype == torch.float32
    with pytest.warns(UserWarning, match="masters, which have more bits than its weights, are not used"):
        fit(
            InBfloat16(OPTIMIZERS["torch AdamW"]),
            "optim_auto",
            ckpt_path=tmp_path / "auto.ckpt",
            **options,
            max_epochs=2,
        )


def test_twice_is_too_much() -> None:
    model = Dropping(OPTIMIZERS["ours"])
    model.fails = lambda place, batch_idx: place == "forward"
    with pytest.raises(torch.OutOfMemoryError):
        fit(model, "optim_auto")


def test_no_room_on_the_host_either(monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, 1 << 30, 1 << 30)
    measure = Machine.measure
    monkeypatch.setattr(Machine, "measure", classmethod(lambda cls, device=None: replace(measure(), host_free=10)))
    model = Dropping(OPTIMIZERS["ours"])
    model.fails = once("forward", 1)
    with pytest.raises(PlacementError, match="the host has no room"):
        fit(model, "optim_auto")


def test_logged_values_are_there_after_a_fall_back() -> None:
    model = Dropping(OPTIMIZERS["ours"])
    model.fails = once("backward", 7)
    run, _ = fit(model, "optim_auto")
    plain, _ = fit(Dropping(OPTIMIZERS["ours"]), "auto")
    torch.testing.assert_close(run.callback_metrics["loss"], plain.callback_metrics["loss"])


@pytest.mark.parametrize("batch_idx", [0, 6])
def test_means_of_what_is_logged_have_every_batch_once(batch_idx: int) -> None:
    class Logging(Dropping):
        def _maybe(self, place: str) -> None:
            if place == "forward":
                self.log("mean", float(self.batch_idx), on_step=False, on_epoch=True, batch_size=2)
            super()._maybe(place)

    model = Logging(OPTIMIZERS["ours"])
    model.fails = once("forward", batch_idx)
    run, _ = fit(model, "optim_auto")
    assert run.strategy.plan.placement == "detached"
    assert run.callback_metrics["mean"] == 3.5


def test_the_other_lightning() -> None:
    model = model_class("pytorch_lightning")
    run, found = fit(model(OPTIMIZERS["ours"]), "optim_auto", **CLIP)
    assert type(run.strategy).__module__ == "lightning_optim.strategies.pytorch_lightning"
    _, expected = fit(model(OPTIMIZERS["ours"]), "auto", **CLIP)
    assert_same_steps(found, expected)


@pytest.mark.parametrize("options", [{"activation_gb": -1}, {"clip": "sometimes"}, {"engine": "fast"}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        OptimAutoStrategy(**options)
