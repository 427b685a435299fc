"""The conformance matrix: every optimizer, in everything that trains models with it.

One test is one cell, run for each optimizer of the registry. Comparisons are exact where the arithmetic is the same,
and in float64 where only its order differs, so that no tolerance can hide a fault.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optim import list_optimizers, optimizer_info, param_groups
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS

pytestmark = [
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

each = pytest.mark.parametrize("name", list_optimizers())

USUAL: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}
# float64 in another order of operations
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}

Make = Callable[..., RuleOptimizer]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_OPTIM_ENGINE", raising=False)
    monkeypatch.setattr(sys, "argv", ["fit"])  # a LightningCLI that is given arguments looks at pytest's too
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def maker(name: str, **options: Any) -> Make:
    info = optimizer_info(name)
    usual = {key: value for key, value in USUAL.items() if key in info.options}
    return partial(info.create, **usual | options)


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
    run = trainer(folder, **options)
    run.fit(model, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return run


def by_hand(
    make: Make, steps: int = 4, dtype: torch.dtype = torch.float64, batch: int = 4, clip: float | None = None
) -> tuple[Net, RuleOptimizer]:
    """The reference: the same training in four lines of torch."""
    net = Net(dtype)
    optimizer = make(net.parameters())
    base_lr = optimizer.param_groups[0]["lr"]
    x, y = dataset(dtype=dtype).tensors
    for step in range(steps):
        part = slice(step * batch % len(x), step * batch % len(x) + batch)
        optimizer.param_groups[0]["lr"] = base_lr / (1 + step)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[part]), y[part]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
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


# ---------------------------------------------------------------- command lines


def _flags(folder: Path, *flags: str) -> list[str]:
    quiet = ("logger=false", "enable_checkpointing=false", "enable_progress_bar=false", "enable_model_summary=false")
    run = ("accelerator=cpu", "devices=1", "max_epochs=1", f"default_root_dir={folder}")
    return ["fit", *flags, *(f"--trainer.{flag}" for flag in (*quiet, *run))]


def _public_name(name: str) -> str:
    return optimizer_info(name).cls.public_name()


@each
@pytest.mark.parametrize("how", ["path", "class name"])
def test_lightning_cli(name: str, how: str, tmp_path: Path) -> None:
    """Plain LightningCLI: ``--optimizer lightning_optim.Lion``, and ``--optimizer Lion`` once it is imported."""
    cls = optimizer_info(name).cls
    spelled = f"lightning_optim.{_public_name(name)}" if how == "path" else cls.__name__
    flags = ("--optimizer", spelled, "--optimizer.lr=0.02", "--optimizer.max_grad_norm=1.0", "--optimizer.engine=eager")
    cli = LightningCLI(Flagged, args=_flags(tmp_path, *flags), save_config_callback=None)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is cls
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.options.max_grad_norm == 1.0
    assert optimizer.options.engine == "eager"
    assert changed(cli.model.net)


@pytest.mark.parametrize("name", [name for name, info in OPTIMIZERS.items() if info.torch_equivalent])
def test_lightning_cli_leaves_torchs_names_alone(name: str, tmp_path: Path) -> None:
    """``--optimizer AdamW`` is torch's, also with ours imported: no "Multiple subclasses with name"."""
    twin = optimizer_info(name).torch_equivalent
    assert twin is not None
    flags = ("--optimizer", twin.__name__, "--optimizer.lr=0.02")
    cli = LightningCLI(Flagged, args=_flags(tmp_path, *flags), save_config_callback=None)
    assert type(cli.trainer.optimizers[0]) is twin


@each
def test_lightning_cli_refuses_misspelled_flags(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--optimizer", f"lightning_optim.{_public_name(name)}", "--optimizer.weight_deacy=0.1")
    with pytest.raises(SystemExit):
        LightningCLI(Flagged, args=_flags(tmp_path, *flags), save_config_callback=None)
    assert "weight_deacy" in capsys.readouterr().err


@each
def test_optim_cli(name: str, tmp_path: Path) -> None:
    """``lightning-optim fit``: the familiar name is ours, and a full path means what it says."""
    from lightning_optim.cli.optim_cli import OptimCLI

    flags = ("--optimizer", _public_name(name), "--optimizer.lr=0.02")
    cli = OptimCLI(Flagged, args=_flags(tmp_path, *flags), save_config_callback=None)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is optimizer_info(name).cls
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert changed(cli.model.net)


# ---------------------------------------------------------------- Trainer


@each
def test_trainer(name: str, tmp_path: Path) -> None:
    """Automatic optimization is the four lines of torch, to the bit."""
    model = Model(maker(name), torch.float64)
    fit(tmp_path, model)
    net, optimizer = by_hand(maker(name))
    assert_close(model.net.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert_same_state(
        {**model.trainer.optimizers[0].state_dict(), "param_groups": 0}, {**optimizer.state_dict(), "param_groups": 0}
    )


@each
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "rounding": "stochastic", "state_dtype": "bfloat16"}])
def test_exact_resume(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Train eight steps; or four, save, load with ``weights_only=True``, four more: the same bits."""
    make = maker(name, **options)
    straight, first, second = Model(make), Model(make), Model(make)
    whole = fit(tmp_path, straight, max_epochs=2)
    fit(tmp_path, first).save_checkpoint(tmp_path / "half.ckpt")
    rest = fit(tmp_path, second, tmp_path / "half.ckpt", max_epochs=2)
    assert whole.global_step == rest.global_step == 8
    assert_close(second.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert_same_state(rest.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


@each
def test_clipping(name: str, tmp_path: Path) -> None:
    """The Trainer's ``gradient_clip_val`` is honoured, and is what ``max_grad_norm`` does inside the step."""
    outside, inside = Model(maker(name), torch.float64), Model(maker(name, max_grad_norm=0.3), torch.float64)
    fit(tmp_path, outside, gradient_clip_val=0.3)
    fit(tmp_path, inside)
    clipped, _ = by_hand(maker(name), clip=0.3)
    assert_close(outside.net.state_dict(), clipped.state_dict(), rtol=0, atol=0)
    assert_close(inside.net.state_dict(), clipped.state_dict())


@each
def test_clipping_changes_what_a_norm_can_change(name: str, tmp_path: Path) -> None:
    """The cell above would be empty if the gradients' norm never exceeded the limit."""
    norms = AfterEachStep(lambda trainer, _: float(trainer.optimizers[0].grad_norm))  # type: ignore[attr-defined] # ours
    fit(tmp_path, Model(maker(name, max_grad_norm=0.3)), callbacks=[norms])
    assert len(norms.seen) == 4
    assert max(norms.seen) > 0.6


@each
def test_accumulation(name: str, tmp_path: Path) -> None:
    """Two micro-batches of two are one batch of four."""
    model = Model(maker(name), torch.float64, batch=2)
    fit(tmp_path, model, accumulate_grad_batches=2)
    net, optimizer = by_hand(maker(name))
    assert_close(model.net.state_dict(), net.state_dict())
    assert {int(s["step"]) for s in optimizer.state.values() if "step" in s} <= {4}


class Overflowing(Model):
    """The gradient of the third batch does not fit into float16."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e30 if batch_idx == 2 else loss


@each
def test_fp16_scaler(name: str, tmp_path: Path) -> None:
    """With a GradScaler: unscaled before the step, and a step that overflows is left out altogether."""
    overflowing, plain = (AfterEachStep(lambda _, module: contents(module)) for _ in range(2))
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    run = fit(tmp_path, Overflowing(maker(name)), plugins=[precision], callbacks=[overflowing])
    moved = [any(not torch.equal(b[k], a[k]) for k in a) for a, b in itertools.pairwise(overflowing.seen)]
    assert moved == [True, False, True]
    for state in run.optimizers[0].state.values():
        assert int(state.get("step", 3)) == 3
        assert {v.dtype for v in state.values()} == {torch.float32}
    fit(tmp_path, Model(maker(name)), callbacks=[plain])
    # Gradients of float16 math are off by about 1e-3 of themselves, and themselves at most 3; lr is 0.05.
    assert_close(overflowing.seen[0], plain.seen[0], rtol=0, atol=1e-3)


@each
def test_bf16_true(name: str, tmp_path: Path) -> None:
    """Weights in bfloat16, state in float32, also across a checkpoint."""
    first, second = Model(maker(name)), Model(maker(name))
    half = fit(tmp_path, first, precision="bf16-true")
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = fit(tmp_path, second, tmp_path / "half.ckpt", precision="bf16-true", max_epochs=2)
    for run in (half, rest):
        for p, state in run.optimizers[0].state.items():
            assert p.dtype == torch.bfloat16
            assert {v.dtype for v in state.values()} == {torch.float32}
    assert changed(second.net)
    straight = Model(maker(name))
    fit(tmp_path, straight, precision="bf16-true", max_epochs=2)
    assert_close(second.net.state_dict(), straight.net.state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------- schedulers, compilation


@each
@pytest.mark.parametrize("kind", ["LambdaLR", "OneCycleLR"])
def test_torch_schedulers(name: str, kind: str) -> None:
    """They warn of nothing, and what they set is what the step uses: lr, and one-cycle's momentum or betas."""
    nets = [Net(torch.float64) for _ in range(2)]
    scheduled, manual = (maker(name)(net.parameters()) for net in nets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule: torch.optim.lr_scheduler.LRScheduler
        if kind == "LambdaLR":
            schedule = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 0.9**step)
        else:
            schedule = torch.optim.lr_scheduler.OneCycleLR(scheduled, max_lr=0.1, total_steps=8)
        used = []
        for step in range(6):
            options = {k: v for k, v in scheduled.param_groups[0].items() if k in ("lr", "betas", "momentum")}
            used.append(options)
            manual.param_groups[0].update(options)
            for net, optimizer in zip(nets, (scheduled, manual), strict=True):
                optimizer.zero_grad()
                net(torch.full((2, 6), 0.1 * step, dtype=torch.float64)).sum().backward()
                optimizer.step()
            schedule.step()
    assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)
    assert len({options["lr"] for options in used}) == 6
    moving = [key for key in ("betas", "momentum") if key in used[0]]
    assert moving
    assert (len({options[moving[0]] for options in used}) > 3) == (kind == "OneCycleLR")


@each
def test_no_recompilation(name: str) -> None:
    """``torch.compile`` of the model beside the optimizer: one graph, whatever the schedule does."""
    torch._dynamo.reset()
    counter = CompileCounter()
    net, expected = Net(), Net()
    models: list[Callable[..., Tensor]] = [torch.compile(net, backend=counter), expected]
    optimizers = [maker(name)(one.parameters()) for one in (net, expected)]
    for step in range(5):
        for one, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.05 * 0.5**step
            optimizer.zero_grad()
            one(torch.ones(2, 6)).sum().backward()
            optimizer.step()
    assert counter.frame_count == 1
    assert_close(net.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)  # float32


@each
def test_no_recompilation_of_a_whole_training_step(name: str) -> None:
    """The optimizer's step inside of a compiled function: a break in the graph, no recompilation."""
    torch._dynamo.reset()
    counter = CompileCounter()
    net = Net()
    optimizer = maker(name)(net.parameters())

    @torch.compile(backend=counter)
    def training_step(x: Tensor) -> Tensor:
        loss = net(x).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    frames = []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5**step
        training_step(torch.ones(2, 6))
        frames.append(counter.frame_count)
    assert frames[2] == frames[-1], frames
    assert changed(net)
    torch._dynamo.reset()


# ---------------------------------------------------------------- distributed checkpoints


def _several_groups(make: Make, net: nn.Module) -> RuleOptimizer:
    return make(param_groups(net, lr=0.05, weight_decay=0.1, layer_decay=0.5))


@each
@pytest.mark.parametrize("groups", ["one group", "several groups"])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_distributed_checkpoint(name: str, groups: str, flatten: bool, tmp_path: Path) -> None:
    """Save, load into an optimizer that has made no step: weights, state and options as they were, and go on."""
    make = maker(name)
    build: Callable[[nn.Module], RuleOptimizer] = (
        partial(_several_groups, make) if groups == "several groups" else lambda net: make(net.parameters())
    )
    nets = [Net(), Net()]
    optimizers = [build(net) for net in nets]
    _steps(nets[0], optimizers[0], range(3))
    for group in optimizers[0].param_groups:
        group["lr"] *= 0.5
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = {
        "model": get_model_state_dict(nets[0]),
        "optimizer": get_optimizer_state_dict(nets[0], optimizers[0], options=options),
    }
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    target: dict[str, Any] = {
        "model": get_model_state_dict(nets[1]),
        "optimizer": get_optimizer_state_dict(nets[1], optimizers[1], options=options),
    }
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(nets[1], target["model"])
    set_optimizer_state_dict(nets[1], optimizers[1], target["optimizer"], options=options)
    assert_same_state(optimizers[1].state_dict(), optimizers[0].state_dict())
    for net, optimizer in zip(nets, optimizers, strict=True):
        _steps(net, optimizer, range(3, 6))
    assert_close(nets[1].state_dict(), nets[0].state_dict(), rtol=0, atol=0)


def _steps(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    x, y = dataset(dtype=next(net.parameters()).dtype).tensors
    for step in steps:
        part = slice(step * 4 % len(x), step * 4 % len(x) + 4)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[part]), y[part]).backward()
        optimizer.step()


# ---------------------------------------------------------------- Accelerate


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState  # type: ignore[import-untyped]

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@each
@pytest.mark.usefixtures("_fresh_accelerate")
def test_accelerate(name: str, tmp_path: Path) -> None:
    """``prepare``, ``accumulate``, clipping, a schedule, ``save_state`` and ``load_state`` into a fresh run."""
    from accelerate import Accelerator  # type: ignore[import-untyped]

    def prepared() -> tuple[Any, ...]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = Net(torch.float64)
        optimizer = maker(name)(net.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        loader = DataLoader(dataset(dtype=torch.float64), batch_size=2)
        return accelerator, *accelerator.prepare(net, optimizer, loader, schedule)

    def epoch(accelerator: Any, net: Any, optimizer: Any, loader: Any, schedule: Any) -> None:
        for x, y in loader:
            with accelerator.accumulate(net):
                accelerator.backward(nn.functional.mse_loss(net(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 0.3)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    run = prepared()
    epoch(*run)
    run[0].save_state(str(tmp_path / "state"))
    expected, _ = by_hand(maker(name), clip=0.3)
    assert_close(run[1].state_dict(), expected.state_dict())
    epoch(*run)
    resumed = prepared()
    resumed[0].load_state(str(tmp_path / "state"))
    epoch(*resumed)
    assert_close(resumed[1].state_dict(), run[1].state_dict(), rtol=0, atol=0)
    assert_same_state(resumed[2].state_dict(), run[2].state_dict())


# ---------------------------------------------------------------- two processes

RANKS = 2
TIMEOUT = 150  # seconds: importing torch and lightning twice on a busy machine takes 20
SHARDED: dict[str, dict[str, Any]] = {"plain": {}, "clipped": {"max_grad_norm": 0.3}, "cautious": {"cautious": True}}


def _launch(target: Callable[..., None], folder: Path) -> Path:
    """Run ``target(rank, folder)`` in two fresh processes."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, folder), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
    return folder


def _join(rank: int, folder: Path) -> None:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")
    os.environ.pop("LIGHTNING_OPTIM_ENGINE", None)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)


class Shared(Model):
    """Each rank sees every other sample, in order (Lightning's own sampler shuffles)."""

    def train_dataloader(self) -> DataLoader[Any]:
        data = dataset(dtype=self.data_dtype)
        return DataLoader(data, batch_size=self.batch, sampler=DistributedSampler(data, shuffle=False))


def ddp_rank(rank: int, folder: Path) -> None:
    """Trainer with DDP: each rank sees half of every batch."""
    _join(rank, folder)
    found = {}
    for name in list_optimizers():
        model = Shared(maker(name), torch.float64, batch=2)
        run = fit(folder, model, strategy="ddp", devices=RANKS, use_distributed_sampler=False)
        assert run.world_size == RANKS
        found[name] = model.net.state_dict(), run.optimizers[0].state_dict()
    torch.save(found, folder / f"ddp{rank}.pt")
    dist.destroy_process_group()


def fsdp2_rank(rank: int, folder: Path) -> None:
    """``fully_shard``: parameters, gradients and state are DTensors; the last layer's bias is on one rank only."""
    from torch.distributed.fsdp import fully_shard

    _join(rank, folder)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    found: dict[tuple[str, str], Any] = {}
    for name in list_optimizers():
        for case, options in SHARDED.items():
            net = Net(torch.float64)
            fully_shard(net, mesh=mesh)
            optimizer = maker(name, **options)(net.parameters())
            _steps(net, optimizer, range(4))
            full = StateDictOptions(full_state_dict=True)
            state = get_optimizer_state_dict(net, optimizer, options=full)
            found[name, case] = get_model_state_dict(net, options=full), state
            if case == "plain":
                assert optimizer_info(name).kind != "elementwise" or "eager" not in optimizer.engine_report()
                sharded = get_optimizer_state_dict(net, optimizer)
                dcp.save({"model": get_model_state_dict(net), "optimizer": sharded}, checkpoint_id=folder / name)
    if rank == 0:
        torch.save(found, folder / "fsdp2.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = _launch(ddp_rank, tmp_path_factory.mktemp("ddp"))
    return [torch.load(folder / f"ddp{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], Any]]:
    folder = _launch(fsdp2_rank, tmp_path_factory.mktemp("fsdp2"))
    return folder, torch.load(folder / "fsdp2.pt", weights_only=True)


@each
def test_ddp(name: str, ddp: list[dict[str, Any]]) -> None:
    """Both ranks have the same bits, and those of one process with the whole batch to rounding."""
    (weights, state), (other_weights, other_state) = (rank[name] for rank in ddp)
    assert_close(weights, other_weights, rtol=0, atol=0)
    assert_same_state(state, other_state)
    net, _ = by_hand(maker(name))
    assert_close(weights, net.state_dict())


@each
@pytest.mark.parametrize("case", SHARDED)
def test_fsdp2(name: str, case: str, fsdp2: tuple[Path, dict[tuple[str, str], Any]]) -> None:
    """Norms are those of the whole tensors and of the whole model, not of a shard."""
    weights, state = fsdp2[1][name, case]
    net = Net(torch.float64)
    optimizer = maker(name, **SHARDED[case])(net.parameters())
    _steps(net, optimizer, range(4))
    assert_close(weights, net.state_dict())
    names = dict(enumerate(n for n, _ in net.named_parameters()))
    for index, values in optimizer.state_dict()["state"].items():
        assert_close(state["state"][names[index]], values)


@each
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_fsdp2_checkpoint_in_one_process(name: str, fsdp2: tuple[Path, dict[tuple[str, str], Any]]) -> None:
    """What two ranks saved in shards goes on whole in a single process."""
    expected = Net(torch.float64)
    reference = maker(name)(expected.parameters())
    _steps(expected, reference, range(4))
    net = Net(torch.float64)
    optimizer = maker(name)(net.parameters())
    target: dict[str, Any] = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.load(target, checkpoint_id=fsdp2[0] / name, no_dist=True)
    set_model_state_dict(net, target["model"])
    set_optimizer_state_dict(net, optimizer, target["optimizer"])
    for one, other in ((net, optimizer), (expected, reference)):
        _steps(one, other, range(4, 6))
    assert_close(net.state_dict(), expected.state_dict())
