"""The Lightning strategy; its runs on CPUs, from which Lightning's own strategy keeps away."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim

from .common import (
    NAMES,
    OPTIMIZERS,
    assert_same_steps,
    environment,
    groups,
    loss_of,
    needs,
    network,
    samples,
    schedule_of,
    snapshot,
    unsharded,
)

ROOTS = ["lightning.pytorch", "pytorch_lightning"]

root_of_lightning = pytest.mark.parametrize("root", ROOTS)
peers = [pytest.mark.peers, needs()]


def strategy_class(root: str) -> Any:
    return import_module(f"lightning_optim.strategies.{root.partition('.')[0]}").DetachedDeepSpeedStrategy


@root_of_lightning
def test_without_deepspeed(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "deepspeed" else find_spec(name, *args)
    )
    registry = import_module(f"{root}.strategies").StrategyRegistry
    for make in (strategy_class(root), partial(registry.get, "detached_deepspeed")):
        with pytest.raises(ModuleNotFoundError, match=r"'detached_deepspeed' needs DeepSpeed.*'lightning-optim\[deep"):
            make()


@root_of_lightning
def test_it_is_lightnings_strategy(root: str) -> None:
    assert issubclass(strategy_class(root), import_module(f"{root}.strategies").DeepSpeedStrategy)


# ---------------------------------------------------------------- with DeepSpeed


def _on_cpu(root: str, **options: Any) -> Any:
    """The strategy without Lightning's question whether there is a GPU."""
    stock = import_module(f"{root}.strategies").DeepSpeedStrategy

    class OnCPU(strategy_class(root)):  # type: ignore[misc]
        def setup_environment(self) -> None:
            super(stock, self).setup_environment()

    # With an index, which DeepSpeed wants of a device.
    return OnCPU(parallel_devices=[torch.device("cpu", 0)], **options)


def _model(root: str, make: Callable[[Any], torch.optim.Optimizer]) -> Any:
    class Model(import_module(root).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.found: list[dict[str, Tensor]] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return loss_of(self.net, *batch)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
                self.found.append(self.weights())

        def weights(self) -> dict[str, Tensor]:
            import deepspeed

            with deepspeed.zero.GatheredParameters(
                list(self.net.parameters()), enabled=self.trainer.strategy.zero_stage_3
            ):
                return snapshot(self.net)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(*samples()), batch_size=2)

        def configure_optimizers(self) -> Any:
            optimizer = make(self.net)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule_of(optimizer), "interval": "step"}}

    return Model()


def _fit(root: str, make: Callable[[Any], Any], strategy: Any, folder: Path, **options: Any) -> tuple[Any, Any]:
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"]
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder}
    ckpt_path = options.pop("ckpt_path", None)
    trainer = import_module(root).Trainer(strategy=strategy, **dict.fromkeys(quiet, False), **settings | options)
    model = _model(root, make)
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer, model.found


CLIP = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
RUNS = [(root, name, 2, True) for root in ROOTS for name in NAMES]
RUNS += [("lightning.pytorch", "AdamW", stage, offload) for stage in (1, 3) for offload in (False, True)]

REFUSED: dict[str, tuple[Callable[[Any], Any], dict[str, Any], dict[str, Any]]] = {
    "LAMB": (lambda net: lightning_optim.LAMB(net.parameters()), {}, {}),
    "max_grad_norm": (lambda net: lightning_optim.AdamW(net.parameters(), max_grad_norm=1.0), {}, {}),
    "forced": (lambda net: lightning_optim.AdamW(net.parameters()), {"zero_force_ds_cpu_optimizer": True}, {}),
    "two limits": (lambda net: lightning_optim.AdamW(net.parameters()), {"gradient_clipping": 0.5}, CLIP),
    "its own optimizer": (lambda net: lightning_optim.AdamW(net.parameters()), {"optimizer": {"type": "Adam"}}, {}),
}


def _named(name: str, net: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](groups(net))


def _alone(rank: int, folder: Path) -> None:
    import warnings

    os.environ.update(environment(rank, 1))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):  # of a launcher; Lightning finds a port itself
        del os.environ[name]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    found: dict[Any, Any] = {"runs": {}, "refused": {}}
    for root in ROOTS:
        logging.getLogger(root).setLevel(logging.ERROR)
    for root, name, stage, offload in RUNS:
        make = partial(_named, name)
        strategy = partial(_on_cpu, root, stage=stage, offload_optimizer=offload)
        trainer, steps = _fit(root, make, strategy(), folder, **CLIP)
        inner = trainer.optimizers[0].optimizer
        lr = inner.param_groups[0]["lr"]
        found["runs"][root, name, stage, offload] = steps, type(inner).__name__, trainer.strategy.report(), lr
        if stage == 2 and offload:
            trainer.save_checkpoint(folder / f"{root}{name}")
            _, resumed = _fit(root, make, strategy(), folder, ckpt_path=folder / f"{root}{name}", max_epochs=2, **CLIP)
            _, straight = _fit(root, make, strategy(), folder, max_epochs=2, **CLIP)
            found["resumed", root, name] = resumed, straight[len(straight) - len(resumed) :]
    for case, (refused, change, options) in REFUSED.items():
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}} | change
        try:
            _fit(ROOTS[0], refused, _on_cpu(ROOTS[0], config=config), folder, **options)
        except ValueError as error:
            found["refused"][case] = str(error)
    torch.save(found, folder / "found.pt")
    os._exit(0)


@pytest.fixture(scope="module")
def found(operators: None, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = launch(_alone, tmp_path_factory.mktemp("alone"), ranks=1)
    return torch.load(folder / "found.pt", weights_only=True)


class TestWithDeepSpeed:
    pytestmark = peers

    @pytest.mark.parametrize(("root", "name", "stage", "offload"), RUNS)
    def test_the_steps_of_a_run_without(
        self, root: str, name: str, stage: int, offload: bool, found: dict[Any, Any]
    ) -> None:
        steps, cls, report, lr = found["runs"][root, name, stage, offload]
        assert_same_steps(steps, unsharded(name, batch=2, clip=0.3, accumulate=2))
        assert cls == type(OPTIMIZERS[name](network().parameters())).__name__
        assert report.startswith(f"detached_deepspeed: {name}, 1 tensors on cpu (p float32, g float32")
        assert lr == OPTIMIZERS[name](network().parameters()).defaults["lr"] / 9  # after 8 steps of the schedule

    @pytest.mark.parametrize("name", NAMES)
    @root_of_lightning
    def test_resuming(self, root: str, name: str, found: dict[Any, Any]) -> None:
        resumed, straight = found["resumed", root, name]
        assert len(resumed) == 8
        assert_same_steps(resumed, straight, rtol=0, atol=0)

    @pytest.mark.parametrize("case", REFUSED)
    def test_refused(self, case: str, found: dict[Any, Any]) -> None:
        assert {
            "LAMB": "LAMB under ZeRO stage 2",
            "max_grad_norm": "gradient_clip_val of a Lightning Trainer",
            "forced": "zero_force_ds_cpu_optimizer=True",
            "two limits": "gradient_clip_val=0.3 of the Trainer, but gradient_clipping=0.5",
            "its own optimizer": "has an optimizer of its own",
        }[case] in found["refused"][case]

    @root_of_lightning
    def test_options(self, root: str) -> None:
        offloaded, on_device = strategy_class(root)(stage=3), strategy_class(root)(offload_optimizer=False)
        assert offloaded.config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
        assert offloaded.config["zero_optimization"]["stage"] == 3
        assert on_device.report() == "detached_deepspeed: no training has begun"
        assert "offload_optimizer" not in on_device.config["zero_optimization"]
