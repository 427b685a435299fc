"""Schedules that join a run under way, in real Trainers: from their first learning rate to their last."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, MultiplicativeLR, SequentialLR
from torch.utils.data import DataLoader

import lightning_optim
from lightning_optim.schedulers import WSD, Cosine, Linear

BATCHES = 8
known_warnings = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in (
        "num_workers",
        "log_every_n_steps",
        "ended before the epoch ended",
        "engine cannot be used",
        "smaller than",
    )
]
pytestmark = [*known_warnings, pytest.mark.usefixtures("one_thread")]


def curve(total: int, make: Any = Cosine, **options: Any) -> list[float]:
    """A run of ``total`` steps with a base learning rate of 1."""
    schedule = make(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), total_steps=total, **options)
    return [schedule.factor(step) for step in range(total)]


def make_model(root: str, schedule: Any, optimizer: Any = None, **config: Any) -> Any:
    """A model that notes the learning rate of each of its optimizer's steps."""

    class Model(import_module(root).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.lrs: list[float] = []
            self.made: Any = None

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).sum()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.lrs.append(float(optimizer.param_groups[0]["lr"]))
            for one in self.trainer.lr_scheduler_configs:
                assert one.scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]

        def train_dataloader(self) -> Any:
            data: Any = torch.ones(BATCHES, 1)
            return DataLoader(data)

        def configure_optimizers(self) -> Any:
            made = (optimizer or (lambda params: torch.optim.SGD(params, lr=1.0)))(self.parameters())
            if schedule is None:
                return made
            return [made], [{"scheduler": schedule(made), "interval": "step", **config}]

    return Model()


def trainer_of(root: str = "lightning.pytorch", **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return import_module(root).Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)


def warmed(optimizer: Any) -> Any:
    return Cosine(optimizer, warmup_steps=3)


@pytest.mark.parametrize("root", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("strategy", ["auto", "in_graph", "detached", "optim_auto"])
def test_second_fit_and_added_on_resume_under_every_strategy(root: str, strategy: str, tmp_path: Path) -> None:
    def ours(params: Any) -> Any:
        return lightning_optim.AdamW(params, lr=1.0)

    model, trainer = make_model(root, warmed, ours), trainer_of(root, strategy=strategy, max_epochs=1)
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    want = curve(BATCHES, warmup_steps=3)
    assert model.lrs == want * 2
    without = trainer_of(root, strategy=strategy, max_epochs=1)
    without.fit(make_model(root, None, ours))
    without.save_checkpoint(tmp_path / "x.ckpt")
    for schedule in (warmed, lambda optimizer: Cosine(optimizer, 3, BATCHES)):
        model = make_model(root, schedule, ours)
        trainer_of(root, strategy=strategy, max_epochs=2).fit(model, ckpt_path=tmp_path / "x.ckpt", weights_only=False)
        assert model.lrs == want


class SaveAt:
    """Saves a checkpoint after a number of optimizer steps; as a callback of Lightning."""

    def __new__(cls, path: Path, step: int) -> Any:
        class Save(import_module("lightning.pytorch").Callback):  # type: ignore[misc]
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if trainer.global_step == step:
                    trainer.save_checkpoint(path)

        return Save()


def sequence(optimizer: Any) -> Any:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.25, total_iters=3), Cosine(optimizer)], milestones=[3])


def sequence_of_ours(optimizer: Any) -> Any:
    return SequentialLR(optimizer, [Linear(optimizer, 1), WSD(optimizer)], milestones=[3])


def chain(optimizer: Any) -> Any:
    return ChainedScheduler([Cosine(optimizer), MultiplicativeLR(optimizer, lambda step: 0.9)])


@pytest.mark.parametrize("schedule", [warmed, sequence, sequence_of_ours, chain])
@pytest.mark.parametrize("saved_at", [3, BATCHES - 1])
def test_added_in_the_middle_of_a_run_and_then_resumed_itself(schedule: Any, saved_at: int, tmp_path: Path) -> None:
    """It goes as in a run of its own that has the steps that remain; a resumed one goes on with the very bits."""
    first, second = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    trainer_of(max_epochs=1, callbacks=[SaveAt(first, saved_at)]).fit(make_model("lightning.pytorch", None))
    joined, alone = make_model("lightning.pytorch", schedule), make_model("lightning.pytorch", schedule)
    left = 2 * BATCHES - saved_at
    trainer_of(max_epochs=2, callbacks=[SaveAt(second, saved_at + 4)]).fit(joined, ckpt_path=first, weights_only=False)
    trainer_of(max_steps=left).fit(alone)
    assert joined.lrs == alone.lrs
    assert len(joined.lrs) == left
    resumed = make_model("lightning.pytorch", schedule)
    trainer_of(max_epochs=2).fit(resumed, ckpt_path=second, weights_only=True)
    assert resumed.lrs == joined.lrs[4:]
    states = [model.trainer.lr_scheduler_configs[0].scheduler.state_dict() for model in (resumed, joined)]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"accumulate_grad_batches": 2}, {"accumulate_grad_batches": 1}),
        ({"accumulate_grad_batches": 1}, {"accumulate_grad_batches": 3}),
        ({"limit_train_batches": 3}, {}),
        ({}, {"limit_train_batches": 2}),
        ({}, {"max_epochs": 5}),
    ],
)
def test_a_run_that_goes_on_otherwise_still_reaches_the_end(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "x.ckpt"
    first = trainer_of(**{"max_epochs": 1, **before})
    first.fit(make_model("lightning.pytorch", warmed))
    first.save_checkpoint(path)
    model = make_model("lightning.pytorch", warmed)
    second = trainer_of(**{"max_epochs": 3, **after})
    second.fit(model, ckpt_path=path, weights_only=False)
    schedule = second.lr_scheduler_configs[0].scheduler
    assert schedule.last_epoch == schedule.total_steps
    assert model.lrs == [schedule.factor(schedule.total_steps - back) for back in range(len(model.lrs), 0, -1)]


def test_a_shorter_run_ends_earlier(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    trainer_of(max_steps=20, callbacks=[SaveAt(path, 4)]).fit(make_model("lightning.pytorch", warmed))
    model = make_model("lightning.pytorch", warmed)
    trainer_of(max_steps=10).fit(model, ckpt_path=path, weights_only=False)
    assert model.lrs == curve(10, warmup_steps=3)[4:]


def test_steps_that_were_left_out_do_not_change_the_total_of_a_resumed_run(tmp_path: Path) -> None:
    """A loss scaler holds the schedule back: it is behind the run then, resumed or not."""
    path = tmp_path / "x.ckpt"

    def held(model: Any) -> Any:
        stock = model.lr_scheduler_step

        def lr_scheduler_step(scheduler: Any, metric: Any) -> None:
            if model.trainer.global_step != 2:
                stock(scheduler, metric)

        model.lr_scheduler_step = lr_scheduler_step
        return model

    whole = held(make_model("lightning.pytorch", warmed))
    trainer_of(max_epochs=2, callbacks=[SaveAt(path, 5)]).fit(whole)
    resumed = held(make_model("lightning.pytorch", warmed))
    trainer_of(max_epochs=2).fit(resumed, ckpt_path=path, weights_only=False)
    assert resumed.lrs == whole.lrs[5:]


def test_by_epochs_and_by_frequency(tmp_path: Path) -> None:
    for config, rates in (({"interval": "epoch"}, 2), ({"frequency": 2}, BATCHES)):
        trainer = trainer_of(max_epochs=1)
        model = make_model("lightning.pytorch", Linear, **config)
        trainer.fit(model)
        trainer.fit_loop.max_epochs, model.lrs = 3, []
        trainer.fit(model)
        repeat = 2 * BATCHES // rates
        assert model.lrs == [lr for lr in curve(rates, Linear) for _ in range(repeat)]


@pytest.mark.parametrize("schedule", [warmed, sequence_of_ours])
@pytest.mark.parametrize("begins", [warmed, lambda optimizer: Cosine(optimizer, total_steps=99)])
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_end"])
def test_optimizers_that_a_callback_replaces_in_the_middle(schedule: Any, begins: Any, hook: str) -> None:
    made = iter([begins, schedule])
    model = make_model("lightning.pytorch", lambda optimizer: next(made)(optimizer))
    at = BATCHES if hook == "on_train_epoch_start" else 5

    class Replace(import_module("lightning.pytorch").Callback):  # type: ignore[misc]
        pass

    def replace(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.global_step == at:
            trainer.strategy.setup_optimizers(trainer)

    setattr(Replace, hook, replace)
    trainer_of(max_epochs=2, callbacks=[Replace()]).fit(model)
    alone = make_model("lightning.pytorch", schedule)
    trainer_of(max_steps=2 * BATCHES - at).fit(alone)
    assert model.lrs[at:] == alone.lrs


def test_the_same_schedule_in_another_trainer_goes_on_to_the_new_end() -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = Linear(optimizer)

    def again(params: Any) -> Any:
        optimizer.param_groups[0]["params"] = list(params)
        return optimizer

    model = make_model("lightning.pytorch", lambda _: schedule, again)
    for _ in range(2):
        trainer_of(max_epochs=1).fit(model)
    assert model.lrs == curve(BATCHES, Linear) + curve(2 * BATCHES, Linear)[BATCHES:]


def test_groups_that_a_callback_unfreezes_join_the_schedule(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import BaseFinetuning

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.layer)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.layer, optimizer, lr=0.5)

    def make() -> Any:
        model: Any = make_model(
            "lightning.pytorch",
            lambda optimizer: Linear(optimizer),
            lambda params: torch.optim.SGD(model.head.parameters(), lr=1.0),
        )
        model.rates, model.head = [], torch.nn.Linear(1, 1)
        model.training_step = lambda batch, batch_idx: model.head(model.layer(batch)).sum()
        model.on_train_batch_start = lambda *_: model.rates.append(
            [group["lr"] for group in model.trainer.optimizers[0].param_groups]
        )
        return model

    whole, resumed, path = make(), make(), tmp_path / "x.ckpt"
    trainer_of(max_epochs=3, callbacks=[Unfreeze(), SaveAt(path, 2 * BATCHES)]).fit(whole)
    factors = curve(3 * BATCHES, Linear)
    assert [rates[0] for rates in whole.rates] == factors
    assert whole.rates[BATCHES][1] == 0.5  # as it was given, and by the schedule from the next step on
    assert [rates[1] for rates in whole.rates[BATCHES + 1 :]] == [0.5 * factor for factor in factors[BATCHES + 1 :]]
    trainer_of(max_epochs=3, callbacks=[Unfreeze()]).fit(resumed, ckpt_path=path, weights_only=False)
    assert resumed.rates == whole.rates[2 * BATCHES :]
