"""Optimizers that train at other weights than those with which a model is evaluated: by hand, and under Lightning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import references
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import RANKS, enter, launch, leave
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import ScheduleFreeAdamW

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)) for shape in ((4, 3), (5,))
    ]


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=random, dtype=torch.float64).to(p.dtype)
        optimizer.step()


def copies(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back(dtype: torch.dtype) -> None:
    """The averages are the reference's, twice is once, and the weights of training come back to the bit."""
    params = parameters(dtype)
    optimizer = ScheduleFreeAdamW(params, lr=0.05, warmup_steps=2)
    optimizer.eval()  # before the first step both are the same
    optimizer.train()
    train(optimizer, range(5))
    before, evaluate = copies(params), references.REFERENCES["schedulefreeadamw"].evaluate
    assert evaluate is not None
    for _ in range(2):
        optimizer.eval()
        for p, y in zip(params, before, strict=True):
            assert not torch.equal(p, y)
            wide = torch.complex128 if dtype.is_complex else torch.float64
            z = optimizer.state[p]["z"].to(wide)
            expected = evaluate(y.to(wide), {"z": z}, optimizer.param_groups[0])
            tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(p.detach(), expected.to(dtype), rtol=tolerance, atol=tolerance)
    for _ in range(2):
        optimizer.train()
        assert all(map(torch.equal, params, before))
    train(optimizer, range(5, 6))


def test_no_step_is_made_with_the_weights_of_evaluation() -> None:
    optimizer = ScheduleFreeAdamW(parameters())
    train(optimizer, range(2))
    optimizer.eval()
    before = copies(optimizer.param_groups[0]["params"])
    with pytest.raises(RuntimeError, match=r"ScheduleFreeAdamW: step\(\) with the weights of evaluation; valid: train"):
        train(optimizer, range(1))
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checkpoint_of_the_weights_of_evaluation(dtype: torch.dtype) -> None:
    """It says what its weights are; those of training are found again, to rounding."""
    params, others = parameters(dtype), parameters(dtype)
    optimizer = ScheduleFreeAdamW(params, lr=0.05)
    train(optimizer, range(5))
    before = copies(params)
    optimizer.eval()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    loaded = ScheduleFreeAdamW(others)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="weights of evaluation"):
        train(loaded, range(1))
    loaded.train()
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(copies(others), before, rtol=tolerance, atol=tolerance)
    train(loaded, range(5, 7))


def test_weights_that_were_changed_meanwhile_are_moved() -> None:
    params = parameters()
    optimizer = ScheduleFreeAdamW(params, lr=0.05)
    train(optimizer, range(4))
    before = copies(params)
    optimizer.eval()
    with torch.no_grad():
        params[0].add_(1.0)  # 0.9 of the weight is the average
    optimizer.train()
    torch.testing.assert_close(params[0].detach(), before[0] + 0.9)
    assert torch.equal(params[1], before[1])


def test_groups_that_come_later_are_of_training() -> None:
    params = parameters()
    optimizer = ScheduleFreeAdamW(params[:1])
    train(optimizer, range(2))
    optimizer.eval()
    optimizer.add_param_group({"params": params[1:]})
    optimizer.eval()
    optimizer.train()
    train(optimizer, range(2, 4))
    assert [group["train_mode"] for group in optimizer.param_groups] == [True, True]


# -- in two processes -----------------------------------------------------------------------------------------------


def _rank(rank: int, folder: Path) -> None:
    """``fully_shard``: each process moves its shards."""
    enter(rank, folder)
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, found = dist.init_device_mesh("cpu", (RANKS,)), {}
    whole = parameters()
    params = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
    sharded, straight = ScheduleFreeAdamW(params, lr=0.05), ScheduleFreeAdamW(whole, lr=0.05)
    for step in range(4):
        train(straight, range(step, step + 1))
        for p, q in zip(params, whole, strict=True):
            assert q.grad is not None
            p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
        sharded.step()
    for kind in ("eval", "train"):
        getattr(sharded, kind)()
        getattr(straight, kind)()
        full = [p.full_tensor().detach() for p in params]  # type: ignore[attr-defined]
        found[kind] = [torch.equal(a, b) for a, b in zip(full, whole, strict=True)]
    torch.save(found, folder / f"{rank}.pt")
    leave()


def test_sharded_weights(tmp_path: Path) -> None:
    launch(_rank, tmp_path)
    for rank in range(RANKS):
        assert torch.load(tmp_path / f"{rank}.pt") == {"eval": [True, True], "train": [True, True]}


# -- under Lightning ------------------------------------------------------------------------------------------------


class Model(LightningModule):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1).to(dtype)
        self.seen: list[tuple[str, Tensor, Tensor]] = []  # where, the weight, and what it should be

    def configure_optimizers(self) -> Any:
        return ScheduleFreeAdamW(self.parameters(), lr=0.05)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        loss: Tensor = (self.layer(x.to(self.layer.weight.dtype)).float() - x.sum(1, keepdim=True)).square().mean()
        return loss

    def _see(self, where: str) -> None:
        optimizer = self.trainer.optimizers[0]
        p = self.layer.weight
        state = optimizer.state.get(p)
        assert optimizer.param_groups[0]["train_mode"] is False
        if state:
            self.seen.append((where, p.detach().clone(), state["z"].clone()))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._see("validate")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._see("test")

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._see("predict")

    def loader(self) -> DataLoader[Any]:
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x), batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Weights(Callback):
    """The weights of training, after each batch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.weights.append(pl_module.layer.weight.detach().clone())


quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec.*is deprecated",
    "ignore:.*The number of training batches",
    "ignore:in_graph. the triton engine cannot be used",
    "ignore:.*the host engine cannot be used .no C compiler:lightning_optim.warnings.LightningOptimWarning",
    "ignore:.*dirpath has changed",
    "ignore:predict returned None",
    "ignore:You passed in a `val_dataloader`",
)


def trainer(folder: Path, **options: Any) -> Trainer:
    defaults = {"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    callbacks = [*options.pop("callbacks", []), ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")]
    return Trainer(default_root_dir=folder, accelerator="cpu", **{**defaults, **options}, callbacks=callbacks)


@quiet
@pytest.mark.parametrize("strategy", ["auto", "in_graph", "detached"])
def test_lightning_evaluates_with_the_averages(strategy: str, tmp_path: Path) -> None:
    """Validation, test and prediction see them; training and checkpoints do not, and resumed runs are the same bits."""
    model, weights = Model(), Weights()
    run = trainer(tmp_path, strategy=strategy, callbacks=[weights], val_check_interval=2)
    run.fit(model)
    assert next(type(callback).__name__ for callback in run.callbacks) == "EvaluationWeights"  # type: ignore[attr-defined]
    assert len(model.seen) == 16
    plain = Weights()
    trainer(tmp_path / "plain", strategy=strategy, callbacks=[plain], limit_val_batches=0).fit(Model())
    assert all(map(torch.equal, weights.weights, plain.weights))
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["layer.weight"], weights.weights[3])
    assert saved["optimizer_states"][0]["param_groups"][0]["train_mode"] is True
    rest = Weights()
    trainer(tmp_path / "rest", strategy=strategy, callbacks=[rest]).fit(Model(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert all(map(torch.equal, weights.weights[4:], rest.weights))
    expected = model.seen[-1][1]
    again: dict[str, Callable[[], Any]] = {
        "test": lambda: run.test(model, verbose=False),
        "predict": lambda: run.predict(model),
        "validate": lambda: run.validate(model, verbose=False),
    }
    for where, evaluate in again.items():
        model.seen.clear()
        evaluate()
        assert {(name, torch.equal(weight, expected)) for name, weight, _ in model.seen} == {(where, True)}
        assert torch.equal(model.layer.weight, weights.weights[-1])


@quiet
def test_a_test_of_a_checkpoint_finds_its_averages(tmp_path: Path) -> None:
    model = Model()
    run = trainer(tmp_path)
    run.fit(model)
    middle, last = model.seen[3][1], model.seen[-1][1]
    model.seen.clear()
    run.test(model, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert all(torch.equal(weight, middle) for _, weight, _ in model.seen)
    model.seen.clear()
    run.test(model, ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert all(torch.equal(weight, last) for _, weight, _ in model.seen)


@quiet
def test_a_checkpoint_without_state_is_tested_as_it_is(tmp_path: Path) -> None:
    model = Model()
    run = trainer(tmp_path)
    run.fit(model)
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    model._see = lambda where: None  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"no state of ScheduleFreeAdamW.*evaluated as it was saved"):
        run.test(model, ckpt_path=tmp_path / "weights.ckpt", verbose=False)


@quiet
def test_the_recipe_for_export(tmp_path: Path) -> None:
    model = Model()
    trainer(tmp_path).fit(model)
    fresh = Model()
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    fresh.load_state_dict(checkpoint["state_dict"])
    optimizer = fresh.configure_optimizers()
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    optimizer.eval()
    assert torch.equal(fresh.layer.weight, model.seen[-1][1])


@quiet
def test_a_validation_that_breaks_off(tmp_path: Path) -> None:
    class Broken(Model):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if self.seen:
                raise KeyError("broken")

    model, weights = Broken(), Weights()
    with pytest.raises(KeyError):
        trainer(tmp_path, callbacks=[weights]).fit(model)
    assert torch.equal(model.layer.weight, weights.weights[-1])


@quiet
def test_low_precision_weights(tmp_path: Path) -> None:
    model = Model(torch.bfloat16)
    trainer(tmp_path, precision="bf16-true").fit(model)
    assert model.seen[-1][1].dtype == torch.bfloat16
    assert model.seen[-1][2].dtype == torch.float32


@quiet
def test_trainings_without_such_an_optimizer_are_left_alone(tmp_path: Path) -> None:
    class Plain(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        validation_step = None  # type: ignore[assignment]

    run = trainer(tmp_path)
    run.fit(Plain())
    assert "EvaluationWeights" not in {type(callback).__name__ for callback in run.callbacks}  # type: ignore[attr-defined]
