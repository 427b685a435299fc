"""Checkpoints of detached trainings: to and from all other strategies, bit by bit, and after a sudden death."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import Tensor

from lightning_optim.strategies import DetachedStrategy

from .common import EXACT, OPTIMIZERS, Model, assert_same_state, assert_same_steps, fit, known_warnings
from .masters import Straight

pytestmark = known_warnings

ORDERS = [("auto", "detached"), ("detached", "auto"), ("in_graph", "detached"), ("detached", "in_graph")]
MAKERS: dict[str, Any] = {
    "torch AdamW": partial(torch.optim.AdamW, lr=0.05),
    "foreign": partial(Foreign, lr=0.01),
    "ours": OPTIMIZERS["ours"],
}


@pytest.mark.matrix(unless=lambda name, options: bool(options) and name in ("ours", "foreign"))
@pytest.mark.parametrize(("first", "second"), [*ORDERS, ("detached", "detached")])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}])
def test_resuming(name: str, options: dict[str, Any], first: str, second: str, tmp_path: Path) -> None:
    """Eight steps by one, eight by the other, and sixteen by one alone."""
    half, _ = fit(Model(OPTIMIZERS[name]), first, **options)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest, found = fit(Model(OPTIMIZERS[name]), second, ckpt_path=tmp_path / "half.ckpt", max_epochs=2, **options)
    straight, expected = fit(Model(OPTIMIZERS[name]), second, max_epochs=2, **options)
    expected.weights, expected.lrs = expected.weights[8:], expected.lrs[8:]
    assert_same_steps(found, expected, **EXACT if first == second else {})
    assert_same_state(rest.optimizers[0].state_dict(), straight.optimizers[0].state_dict())


@pytest.mark.parametrize("clip", ["exact", "speculative"])
@pytest.mark.parametrize("name", MAKERS)
def test_masters_are_resumed_bit_by_bit(name: str, clip: Any, tmp_path: Path) -> None:
    if name == "foreign" and clip != "exact":
        pytest.skip("an optimizer that runs its own step does so for all masters at once")
    make = MAKERS[name]

    def strategy() -> DetachedStrategy:
        return DetachedStrategy(clip=clip)

    options: dict[str, Any] = {"precision": "bf16-true", "gradient_clip_val": 0.5}
    half, _ = fit(Straight(make), strategy(), **options)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest, found = fit(Straight(make), strategy(), ckpt_path=tmp_path / "half.ckpt", max_epochs=2, **options)
    straight, expected = fit(Straight(make), strategy(), max_epochs=2, **options)
    expected.weights, expected.lrs = expected.weights[8:], expected.lrs[8:]
    assert_same_steps(found, expected, **EXACT)
    ours, theirs = (
        run.strategy._ended[run.optimizers[0]].masters().values()  # the masters too
        for run in (rest, straight)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    state = rest.optimizers[0].state_dict()["state"].values()
    assert all(t.dtype == torch.float32 for slots in state for t in slots.values() if isinstance(t, Tensor))


def test_stale_masters_are_left_alone(tmp_path: Path) -> None:
    """A checkpoint whose weights were changed after it was written: the weights are meant."""
    options: dict[str, Any] = {"precision": "bf16-true"}
    run, _ = fit(Straight(MAKERS["torch AdamW"]), "detached", **options)
    run.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    for weight in saved["state_dict"].values():
        weight.add_(1)
    torch.save(saved, tmp_path / "one.ckpt")

    class Start(Straight):
        def on_train_start(self) -> None:
            self.start = [p.detach().clone() for p in self.parameters()]
            (detached,) = (drive.detached for drive in self.trainer.strategy._drives.values())
            self.masters = [detached.masters()[p].detach().clone() for p in self.parameters()]

    model = Start(MAKERS["torch AdamW"])
    with pytest.warns(UserWarning, match="have changed since: the weights are taken"):
        fit(model, "detached", ckpt_path=tmp_path / "one.ckpt", max_epochs=2, **options)
    assert all(torch.equal(a, b.float()) for a, b in zip(model.masters, model.start, strict=True))


def test_float32_weights_need_no_masters_in_checkpoints(tmp_path: Path) -> None:
    run, _ = fit(Model(OPTIMIZERS["ours"]), "detached")
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["detached_masters"] == [{}]


_TRAINING = """
import sys, warnings
from functools import partial
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import lightning_optim, lightning_optim.strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from strategies.common import make_trainer
from strategies.masters import Straight

folder, resume, slow = sys.argv[1], sys.argv[2], float(sys.argv[3])


class Slow(Straight):
    def training_step(self, batch, batch_idx):
        # Lightning resumes an epoch without its place in a plain DataLoader: the batch is made from the step.
        return super().training_step([torch.full_like(batch[0], self.global_step), batch[1]], batch_idx)

    def on_train_batch_end(self, *args):
        import time

        print(self.global_step, flush=True)
        time.sleep(slow)


saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=1, monitor=None)
strategy = lightning_optim.strategies.DetachedStrategy(clip="speculative", bucket_mb=1e-5)
trainer = make_trainer(
    strategy=strategy, precision="bf16-true", gradient_clip_val=0.5, max_epochs=3, callbacks=[saver],
    enable_checkpointing=True,
)
model = Slow(partial(lightning_optim.AdamW, lr=0.05))
trainer.fit(model, ckpt_path=resume or None, weights_only=True if resume else None)
torch.save([p.detach() for p in model.parameters()], folder + "/end.pt")
"""


def _start(folder: Path, resume: str, slow: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-c", _TRAINING, str(folder), resume, str(slow)],
        env=environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_at_a_random_moment_and_resumed(tmp_path: Path) -> None:
    """The end is bit by bit that of a training that nothing disturbed."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    whole = _start(straight, "", 0.0)
    process = _start(killed, "", 0.02)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdecimal() and int(line) >= 3:
            break
    time.sleep(random.uniform(0, 0.25))  # noqa: S311 # not for secrets
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    last = killed / "last.ckpt"
    assert 3 <= torch.load(last, weights_only=True)["global_step"] < 24
    resumed = _start(killed, str(last), 0.0)
    for one in (whole, resumed):
        _, errors = one.communicate(timeout=120)
        assert one.returncode == 0, errors
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (straight, killed)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
