"""``lightning-optim plan``: by numbers, and from the flags and files of ``fit``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.optim import Optimizer

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from lightning.pytorch import LightningModule

from lightning_optim.cli.main import main
from lightning_optim.placement.machine import Machine

from .common import MODULE, known_warnings

pytestmark = known_warnings

HERE = __name__


class Huge(LightningModule):
    """A terabyte, if it were in memory."""

    def __init__(self, width: int = 500_000) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)


class Stubborn(LightningModule):
    """Looks at its weights when it is made, which cannot be done on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.size = float(self.layer.weight.detach().sum().item())


class Two(Huge):
    def configure_optimizers(self) -> list[Optimizer]:
        return [torch.optim.SGD(self.parameters()), torch.optim.SGD(self.parameters())]


class Own(Huge):
    def configure_optimizers(self) -> Any:
        return {"optimizer": torch.optim.AdamW(self.parameters())}


class NeedsTrainer(Huge):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1 / float(self.trainer.estimated_stepping_batches))


@pytest.fixture
def machine(tmp_path: Path) -> str:
    """A file of a machine with a card of 80 GiB."""
    file = tmp_path / "machine.json"
    card = Machine("cuda", "a card", 1, 80 * 2**30, 4096 * 2**30, 2e10, 2e10, 1e11, 2e12)
    file.write_text(card.to_json())
    return f"--machine={file}"


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    loaded: dict[str, Any] = json.loads(capsys.readouterr().out)
    return loaded


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_by_numbers(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--weights=7e9", "--dtype", "bfloat16", "--optimizer", "adamw", "--backward-ms=800", "--clip"]
    assert main(["plan", machine, *arguments]) == 0
    text = capsys.readouterr().out
    assert text.startswith("detached: in_graph does not fit (weights 13.0 + gradients 13.0 + ")
    assert "visible (speculative)" in text
    assert re.search(r"^in_graph +86.2 GiB +72.0 GiB .* no$", text, re.MULTILINE)
    assert re.search(r"^detached +34.1 GiB +72.0 GiB +104.3 GiB +3686.4 GiB .* yes$", text, re.MULTILINE)
    assert "detached: gradients to the host: 14 GB / 20 GB/s = 700 ms" in text
    assert "clip mode: exact" in text
    assert "detached, host: masters 26.1 GiB, state 52.2 GiB, pinned gradients 13.0 GiB, pinned weights 13.0" in text
    assert "activations are not counted" in text


@pytest.mark.parametrize(
    ("arguments", "state"),
    [
        (["--weights=1e9"], 8e9 + 4),
        (["--weights=1B", "--optimizer=Lion"], 4e9),
        (["--weights=1B", "--optimizer", "AdamW", "--optimizer.state_dtype", "bfloat16"], 4e9 + 4),
        (["--weights=1B", "--optimizer=adamw", "--optimizer.amsgrad=true"], 12e9 + 4),
        (["--weights=1B", "--optimizer=muon"], 4e9),
        (["--weights=1B", "--optimizer=torch.optim.RMSprop", "--optimizer.momentum", "0.9"], 8e9 + 4),
        (["--weights=1000000001", "--optimizer=adam"], 8e9 + 8 + 8),
        (["--weights=1B", "--optimizer=lightning_optim.optimizers.sam.SAM", "--optimizer.base=lion"], 4e9),
    ],
)
def test_optimizers_by_name(
    arguments: list[str], state: float, machine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, machine, *arguments)
    assert plan["placement"] == "in_graph"
    assert plan["footprint"]["state"]["bytes"] == int(state)


def test_conditions(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--weights=1e9", "--ranks=8", "--sharding=fsdp2", "--local-ranks=2", "--activation-gb=1.5"]
    plan = planned(capsys, machine, *arguments, "--bucket-mb=64", "--accumulate", "--master-dtype=float64")
    assert plan["conditions"] == {
        "ranks": 8,
        "local_ranks": 2,
        "sharding": "fsdp2",
        "clips": False,
        "accumulates": True,
        "activation_bytes": 1_500_000_000,
        "backward_seconds": None,
        "resident_bytes": 0,
        "bucket_bytes": 64 * 10**6,
    }
    assert plan["rows"][1]["host"]["masters"] == 10**9
    assert plan["rows"][0]["device"]["weights"] == 4 * 10**9 // 8


def test_nothing_fits(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", machine, "--weights=100B"]) == 1
    shown = capsys.readouterr()
    assert "no placement fits" in shown.err
    assert "ranks with sharding='fsdp2'" in shown.err
    assert shown.out == ""
    assert main(["plan", machine, "--weights=100B", "--json"]) == 1
    assert "no placement fits" in json.loads(capsys.readouterr().err)["error"]


def test_this_machine_is_saved_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "here.json"
    first = planned(capsys, "--weights=1000", f"--save-machine={file}")
    second = planned(capsys, "--weights=1000", f"--machine={file}")
    assert first == second
    assert Machine.from_json(file.read_text()).host_bandwidth == first["machine"]["host_bandwidth"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["what is to be trained?", "--weights N", "--config FILE"]),
        (["--weights=many"], ["'many' is no number of weights", "7e9"]),
        (["--weights=1e9", "--dtype=int8"], ["int8", "bfloat16"]),
        (["--weights=1e9", "--optimizer=adamww"], ["unknown optimizer 'adamww'", "'adamw'"]),
        (["--weights=1e9", "--optimizer=torch.optim.Nothing"], ["torch.optim.Nothing"]),
        (["--weights=1e9", "--optimizer=torch.nn.Linear"], ["torch.nn.Linear is no torch.optim.Optimizer"]),
        (["--weights=1e9", "--optimizer.lrr=1"], ["no option 'lrr'", "did you mean 'lr'"]),
        (["--weights=1e9", "--optimizer.lr=-1"], ["lr=-1", "finite number >= 0"]),
        (["--weights=1e9", "--optimizer"], ["--optimizer needs a value"]),
        (["--weights=1e9", "--model=X"], ["unknown argument '--model'"]),
        (["--weights=1e9", "--optimizer=lightning_optim.optimizers.sam.SAM"], ["argument: 'base'"]),
        (["--weights=1e9", "--ranks=0"], ["ranks=0; valid: a whole number >= 1"]),
        (["--weights=1e9", "--machine=/nowhere.json"], ["/nowhere.json"]),
        ([f"--model={HERE}.Huge", "--dtype=bfloat16"], ["--dtype goes with --weights"]),
        ([f"--model={HERE}.Huge"], ["Huge has no configure_optimizers of its own", "--optimizer"]),
        ([f"--model={HERE}.Two"], ["Two has 2 optimizers; a plan is for one"]),
        ([f"--model={HERE}.NeedsTrainer"], ["cannot be called without a Trainer", "--optimizer"]),
        ([f"--model={HERE}.Huge", "--optimizer=AdamW", "--optimizer.lrr=1"], ["lrr"]),
        ([f"--model={HERE}.Huge", "--optimizr=AdamW"], ["optimizr", "did you mean '--optimizer'"]),
        (["--weigths=1e9"], ["unknown argument '--weigths' (did you mean '--weights'?)"]),
        (["--weights=1e9", "--shardng=ddp"], ["unknown argument '--shardng' (did you mean '--sharding'?)"]),
    ],
)
def test_errors(arguments: list[str], named: list[str], machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = refused(capsys, *([] if any("--machine" in a for a in arguments) else [machine]), *arguments)
    for text in named:
        assert text in shown


def test_a_damaged_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.json").write_text('{"device": "cuda"}')
    shown = refused(capsys, f"--machine={tmp_path / 'm.json'}", "--weights=1")
    assert "m.json: Machine: name is missing" in shown


def test_a_model_that_no_memory_holds(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--model={HERE}.Huge", "--optimizer=AdamW", "--trainer.precision=bf16-true"]
    plan = planned(capsys, machine, *arguments, "--trainer.gradient_clip_val=1.0", "--ranks=64", "--sharding=fsdp2")
    assert plan["footprint"]["weights"] == 2 * 500_000**2
    assert plan["footprint"]["masters"] == 4 * 500_000**2
    assert plan["conditions"]["clips"]
    assert not plan["conditions"]["accumulates"]
    assert not any("made in memory" in note for note in plan["notes"])


@pytest.mark.parametrize(
    ("flags", "clips", "accumulates"),
    [
        ([], False, False),
        (["--trainer.precision=16-mixed"], True, False),
        (["--trainer.gradient_clip_val=0.0"], False, False),
        (["--trainer.accumulate_grad_batches=4"], False, True),
    ],
)
def test_what_the_trainer_is_asked_for(
    flags: list[str], clips: bool, accumulates: bool, machine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, machine, f"--model={MODULE}.Model", "--optimizer=AdamW", *flags)
    assert (plan["conditions"]["clips"], plan["conditions"]["accumulates"]) == (clips, accumulates)


def test_the_configuration_of_a_training(machine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a schedule, callbacks and a logger, none of which is made."""
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs")}}
    file = tmp_path / "config.yaml"
    config = {
        "seed_everything": 1,
        "model": {"class_path": f"{MODULE}.LateModel", "init_args": {"width": 6}},
        "optimizer": {"class_path": "Lion", "init_args": {"lr": 0.1}},
        "param_groups": {"weight_decay": 0.1},
        "lr_scheduler": {"class_path": "WSD", "init_args": {"warmup_steps": 2}},
        "trainer": {"accelerator": "gpu", "devices": 8, "logger": logger, "max_steps": 10},
    }
    file.write_text(yaml.safe_dump(config))
    plan = planned(capsys, machine, f"--config={file}")
    numbers = 6 * 4 + 4 + 4 + 4 + 4 + 1  # the layers of `configure_model`
    assert plan["footprint"]["optimizer"] == "Lion"
    assert plan["footprint"]["state"]["bytes"] == 4 * numbers
    assert not (tmp_path / "logs").exists()
    assert planned(capsys, machine, "-c", str(file), "--optimizer=SGD")["footprint"]["optimizer"] == "SGD"


def test_the_model_s_own_optimizer(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, machine, f"--model={HERE}.Own", "--model.width=1000")
    assert plan["footprint"]["optimizer"] == "torch.optim.AdamW"
    assert plan["footprint"]["state"]["bytes"] == 8 * 1000**2 + 4


def test_a_model_that_must_be_in_memory(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, machine, f"--model={HERE}.Stubborn", "--optimizer=SGD")
    assert plan["footprint"]["weights"] == 4 * 20
    assert any("made in memory" in note for note in plan["notes"])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--weights 7e9 --dtype bfloat16" in shown
    assert "--save-machine" in shown


def test_numbers_need_no_lightning() -> None:
    code = (
        "import sys; sys.modules['lightning'] = None; sys.modules['jsonargparse'] = None\n"
        "from lightning_optim.cli.main import main\n"
        "code = main(['plan', '--weights=1000', '--optimizer=lion'])\n"
        "assert code == 0, code\n"
        "main(['plan', '--model=X'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("in_graph: the step needs")
    assert "pip install 'lightning-optim[cli]'" in done.stderr
    assert "described by numbers" in done.stderr


def test_a_tensor_is_untouched_by_a_plan(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The default device is what it was."""
    planned(capsys, machine, f"--model={MODULE}.Model", "--optimizer=SGD")
    made: Tensor = torch.ones(1)
    assert made.device.type == "cpu"
