"""What the cells of the matrix share: a model, its data, its training by hand, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import references
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim.strategies  # noqa: F401 # makes the names known
from lightning_optim import optimizer_info
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS

known_warnings = [
    # On a CPU there is no Triton engine, which our strategies say once.
    pytest.mark.filterwarnings("ignore:in_graph\\w*. the triton engine cannot be used"),
    # Without a C compiler the host engine says so and another one takes its place, "with the same results".
    pytest.mark.filterwarnings(
        "ignore:.*the host engine cannot be used .no C compiler:lightning_optim.warnings.LightningOptimWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:(?s).*deprecated in v4.49.0:DeprecationWarning"),  # jsonargparse to Lightning
    pytest.mark.filterwarnings("ignore:(?s).*JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:No seed found"),
]

each = pytest.mark.parametrize("name", sorted(OPTIMIZERS))

#: What differs for those who train with an optimizer, beside what differs for engines: weights for evaluation,
#: questions about the loss, and numbers that all parameters share.
KINDS = {*references.REPRESENTATIVES, "prodigy", "schedulefreeadamw", "sophia"}

#: For cells that are the same for all optimizers of a kind.
each_kind = pytest.mark.matrix(unless=lambda name: name in KINDS)

USUAL: dict[str, Any] = {"lr": 0.05, "adamw_lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}
# float64 in another order of operations
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}

Make = Callable[..., RuleOptimizer]


def asks_for_evaluations(cls: Any) -> bool:
    """Whether steps of a class ask for more than gradients, which Lightning's own strategies do not answer."""
    return getattr(cls, "request", None) is not None


#: Those that step by the gradient alone, whoever calls their step.
by_gradient = pytest.mark.parametrize(
    "name", sorted(name for name, info in OPTIMIZERS.items() if not asks_for_evaluations(info.cls))
)
asking = pytest.mark.parametrize(
    "name", sorted(name for name, info in OPTIMIZERS.items() if asks_for_evaluations(info.cls))
)


def maker(name: str, **options: Any) -> Make:
    info = optimizer_info(name)
    usual = {key: value for key, value in USUAL.items() if key in info.options}
    return partial(info.create, **usual | options)


#: Options for runs whose sums are in another order. Gradients of few samples are of low rank: of the eigenvectors that
#: belong to none of it any will do, and rounding says which.
UNIQUE: dict[str, dict[str, Any]] = {"soap": {"max_precond_dim": 1}}


class Net(nn.Sequential):
    """Weights, biases and a norm, in sizes that do not divide by two."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1))
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5
        self.to(dtype)


def dataset(samples: int = 16, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    y = x.sin().sum(dim=1, keepdim=True)
    return TensorDataset(x.to(dtype), y.to(dtype))


class Flagged(LightningModule):
    """A model that leaves its optimizer to the command line."""

    def __init__(self, dtype: torch.dtype = torch.float32, batch: int = 4) -> None:
        super().__init__()
        self.net, self.batch, self.data_dtype = Net(dtype), batch, dtype

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x).to(y.dtype), y)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(dtype=self.data_dtype), batch_size=self.batch)


class Model(Flagged):
    """A model that makes its optimizer, and a schedule that moves at every step."""

    def __init__(self, make: Make, dtype: torch.dtype = torch.float32, batch: int = 4) -> None:
        super().__init__(dtype, batch)
        self.make = make

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AfterEachStep(Callback):
    """Notes something at the end of every step."""

    def __init__(self, look: Callable[[Trainer, LightningModule], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append(self.look(trainer, pl_module))


def contents(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(**defaults | options)


def fit(folder: Path, model: LightningModule, ckpt_path: Path | None = None, **options: Any) -> Trainer:
    make = getattr(model, "make", None)
    if isinstance(make, partial) and asks_for_evaluations(make.func):
        options = {"strategy": "in_graph"} | options
    run = trainer(folder, **options)
    run.fit(model, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return run


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(net(x), y)


def by_hand(
    make: Make, steps: int = 4, dtype: torch.dtype = torch.float64, batch: int = 4, clip: float | None = None
) -> tuple[Net, RuleOptimizer]:
    """The reference: the same training in four lines of torch."""
    net = Net(dtype)
    optimizer = make(net.parameters())
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    x, y = dataset(dtype=dtype).tensors
    for step in range(steps):
        part = slice(step * batch % len(x), step * batch % len(x) + batch)
        for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = base_lr / (1 + step)
        optimizer.zero_grad()
        loss = partial(loss_of, net, x[part], y[part])
        loss().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step(evaluate=loss)
    return net, optimizer


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in found.items():
        message = f"{key} differs: {value}, expected {expected[key]}"
        torch.testing.assert_close(value, expected[key], **tolerance or CLOSE, msg=message)


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal to the bit."""
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for key, values in found["state"].items():
        assert values.keys() == expected["state"][key].keys()
        for slot, value in values.items():
            other = expected["state"][key][slot]
            assert value.dtype == other.dtype
            assert torch.equal(value, other), f"{key} {slot}"


def changed(net: nn.Module) -> bool:
    return any(not torch.equal(p.to(q.dtype), q) for p, q in zip(net.parameters(), Net().parameters(), strict=True))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    x, y = dataset(dtype=next(net.parameters()).dtype).tensors
    for step in steps:
        part = slice(step * 4 % len(x), step * 4 % len(x) + 4)
        optimizer.zero_grad()
        loss = partial(loss_of, net, x[part], y[part])
        loss().backward()
        optimizer.step(evaluate=loss)  # type: ignore[call-overload] # ours has it
