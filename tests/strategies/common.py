"""What the tests of the strategies share: a model for either root of Lightning, and how two runs are compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim

ROOTS = ["lightning.pytorch", "pytorch_lightning"]

known_warnings = [
    # On a CPU there is no Triton engine, which the strategies say once.
    pytest.mark.filterwarnings("ignore:in_graph\\w*. the triton engine cannot be used"),
    pytest.mark.filterwarnings(
        "ignore:.*the host engine cannot be used .no C compiler:lightning_optim.warnings.LightningOptimWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec|number of training batches)"),
    pytest.mark.filterwarnings("ignore:(?s).*deprecated in v4.49.0:DeprecationWarning"),  # jsonargparse to Lightning
    pytest.mark.filterwarnings("ignore:(?s).*JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:No seed found"),
    # On purpose: `training_step` that returns None.
    pytest.mark.filterwarnings("ignore:.*training_step. returned .None"),
]

#: float32, in another order of operations, or with a factor of the gradient applied in another place: the updates
#: are up to 0.05 at a time, and rounded to 6e-8 of themselves a few times over.
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "ours": partial(lightning_optim.AdamW, lr=0.05, weight_decay=0.1),
    "torch AdamW": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "torch Adam": partial(torch.optim.Adam, lr=0.05, amsgrad=True),
    "torch SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "foreign": partial(Foreign, lr=0.01),
}


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1))
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.5
    return net


def dataset(samples: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 6, generator=generator)
    return TensorDataset(x, 3 * x.sin().sum(dim=1, keepdim=True))


@cache
def model_class(root: str = "lightning.pytorch") -> Any:
    """A model of either root, with a schedule that moves at every step."""

    class Model(import_module(root).LightningModule):  # type: ignore[misc]
        def __init__(self, make: Any = None, batch: int = 2) -> None:
            super().__init__()
            self.net, self.batch, self.make = network(), batch, make or OPTIMIZERS["torch AdamW"]
            self.overflows: set[int] = set()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            x, y = batch
            loss = nn.functional.mse_loss(self.net(x).to(y.dtype), y)
            return loss * 1e30 if batch_idx in self.overflows else loss

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(dataset(), batch_size=self.batch)

        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.parameters())
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Model


Model = model_class()


@cache
def _recorder(root: str) -> Any:
    class Recorder(import_module(root).Callback):  # type: ignore[misc]
        """Notes weights and learning rates after every batch."""

        def __init__(self) -> None:
            self.weights: list[dict[str, Tensor]] = []
            self.lrs: list[float] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
            self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])

    return Recorder


def make_trainer(root: str = "lightning.pytorch", **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tempfile.gettempdir(),
    }
    return import_module(root).Trainer(**defaults | options)


def fit(model: Any, strategy: Any = "in_graph", *, ckpt_path: Any = None, **options: Any) -> tuple[Any, Any]:
    """A training, and what was noted of it."""
    root = "pytorch_lightning" if isinstance(model, model_class("pytorch_lightning")) else "lightning.pytorch"
    recorder = _recorder(root)()
    callbacks = [*options.pop("callbacks", []), recorder]
    trainer = make_trainer(root, strategy=strategy, callbacks=callbacks, **options)
    trainer.fit(model, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, recorder


def scaled(**options: Any) -> Any:
    """``16-mixed`` on the CPU, where the Trainer's flag would give bf16-mixed."""
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **{"init_scale": 256.0} | options))


def assert_same_steps(found: Any, expected: Any, **tolerance: Any) -> None:
    """The weights after every batch."""
    assert len(found.weights) == len(expected.weights) > 0
    for batch, (ours, theirs) in enumerate(zip(found.weights, expected.weights, strict=True)):
        for name, value in ours.items():
            message = f"batch {batch}, {name}: {value} instead of {theirs[name]}"
            torch.testing.assert_close(value, theirs[name], **tolerance or CLOSE, msg=message)
    assert found.lrs == expected.lrs


def assert_same_state(found: Any, expected: Any) -> None:
    """Equal in format, and nearly in value."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_same_state(found[key], expected[key])
    elif isinstance(found, list):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_state(ours, theirs)
    elif isinstance(found, Tensor):
        # Of gradients up to 20 each, of weights that are 1e-7 apart.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert found == expected
