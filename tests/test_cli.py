"""The command line, in this process: names, files, groups, schedules, errors, and the commands without a Trainer."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

import lightning_optim
from lightning_optim import registry
from lightning_optim.cli import main as cli_main
from lightning_optim.cli.configure import ParamGroupOptions
from lightning_optim.cli.main import main
from lightning_optim.cli.optim_cli import OptimCLI

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
]


# Of LightningCLI itself, about its use of jsonargparse; of the Trainer, about a data loader of four batches.
pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec|number of training batches)"),
]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytests(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns about ``args=`` in a process that was started with arguments."""
    monkeypatch.setattr(sys, "argv", ["lightning-optim"])


class Model(LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.layers = self.build()
        self.lrs: list[float] = []

    def build(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(self.width, 4), nn.LayerNorm(4), nn.Linear(4, 1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        optimizer = self.trainer.optimizers[0]
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))
        loss = self.layers(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(8, self.width)), batch_size=2)


class LateModel(Model):
    """Has no parameters until the Trainer asks for its layers."""

    def build(self) -> nn.Sequential:
        return nn.Sequential()

    def configure_model(self) -> None:
        if not self.layers:
            self.layers = super().build()


class OwnOptimizer(Model):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class TwoSchedules(Model):
    """Takes an optimizer and a chain of schedules as factories, as a user's own script may."""

    def __init__(
        self,
        optimizer: Callable[[Any], Optimizer] = torch.optim.SGD,
        schedules: list[Callable[[Optimizer], LRScheduler]] | None = None,
    ) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.make_schedules = schedules or []

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [{"scheduler": make(optimizer), "interval": "step"} for make in self.make_schedules]


def fit(*arguments: str, model: str = "Model", steps: int = 1) -> OptimCLI:
    return OptimCLI(
        args=["fit", f"--model={__name__}.{model}", f"--trainer.max_steps={steps}", *QUIET, *arguments],
        save_config_callback=None,
    )


def build(*arguments: str) -> Any:
    """What the model's ``configure_optimizers`` gives, without a training."""
    cli = OptimCLI(args=[f"--model={__name__}.Model", *QUIET, *arguments], run=False, save_config_callback=None)
    return cli.model.configure_optimizers()


def optimizer_of(cli: LightningCLI) -> Optimizer:
    (optimizer,) = cli.trainer.optimizers
    return optimizer


def error_of(capsys: pytest.CaptureFixture[str], run: Callable[[], object]) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 2
    return capsys.readouterr().err


# --- bare names

NAMES = [
    ("AdamW", lightning_optim.AdamW),
    ("adamw", lightning_optim.AdamW),
    ("Adam", lightning_optim.Adam),
    ("SGD", lightning_optim.SGD),
    ("Lion", lightning_optim.Lion),
    ("LAMB", lightning_optim.LAMB),
    ("lightning_optim.AdamW", lightning_optim.AdamW),
    ("torch.optim.AdamW", torch.optim.AdamW),
    ("RMSprop", torch.optim.RMSprop),
]


@pytest.mark.parametrize(("name", "cls"), NAMES)
def test_a_name_means_the_same_as_a_flag_and_in_a_file(name: str, cls: type, tmp_path: Path) -> None:
    forms = {
        "path.yaml": {"optimizer": {"class_path": name}},
        "bare.yaml": {"optimizer": name},
        "sub.yaml": {"fit": {"optimizer": {"class_path": name}}},
    }
    for file, content in forms.items():
        (tmp_path / file).write_text(yaml.safe_dump(content))
    for arguments in (
        [f"--optimizer={name}"],
        ["--optimizer", name, "--optimizer.lr", "0.01"],
        [f"--optimizer.class_path={name}"],
        [f"--config={tmp_path / 'path.yaml'}"],
        [f"--config={tmp_path / 'bare.yaml'}"],
    ):
        assert type(build(*arguments)["optimizer"]) is cls, arguments
    whole = OptimCLI(
        args=[f"--config={tmp_path / 'sub.yaml'}", "fit", f"--model={__name__}.Model", "--trainer.max_steps=1", *QUIET],
        save_config_callback=None,
    )
    assert type(optimizer_of(whole)) is cls


def test_names_in_json_in_a_file_of_its_own_and_in_a_dictionary(tmp_path: Path) -> None:
    spec = {"class_path": "AdamW", "init_args": {"lr": 0.25}}
    file = tmp_path / "optimizer.yaml"
    file.write_text(yaml.safe_dump(spec))
    for argument in (json.dumps(spec), str(file)):
        optimizer = optimizer_of(fit(f"--optimizer={argument}"))
        assert type(optimizer) is lightning_optim.AdamW
        assert optimizer.param_groups[0]["lr"] == 0.25
    trainer = {"max_steps": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    config = {"subcommand": "fit", "fit": {"model": f"{__name__}.Model", "optimizer": "adamw", "trainer": trainer}}
    cli = OptimCLI(args=config, save_config_callback=None)
    assert type(optimizer_of(cli)) is lightning_optim.AdamW


def test_a_file_keeps_its_types(tmp_path: Path) -> None:
    parser = OptimCLI(args=[f"--model={__name__}.Model"], run=False).parser
    parser.add_argument("--quoted", type=str)
    parser.add_argument("--table", type=dict[int, float])
    file = tmp_path / "types.yaml"
    file.write_text(f"model: {__name__}.Model\nquoted: '1e-3'\ntable: {{0: 1e-3, 4: .inf}}\n")
    config = parser.parse_args([f"--config={file}"])
    assert (config.quoted, config.table) == ("1e-3", {0: 1e-3, 4: float("inf")})


def test_every_name_of_the_list_is_a_name_on_the_command_line() -> None:
    for name in registry.list_optimizers():
        assert type(build(f"--optimizer={name}")["optimizer"]) is registry.optimizer_info(name).cls
    for name in registry.list_schedulers():
        config = build("--optimizer=sgd", f"--lr_scheduler={name}")["lr_scheduler"]
        assert type(config["scheduler"]) is registry.scheduler_info(name).cls


def test_options_reach_the_optimizer_and_the_schedule() -> None:
    cli = fit(
        "--optimizer=AdamW",
        "--optimizer.lr=0.25",
        "--optimizer.betas=[0.5,0.75]",
        "--optimizer.engine=eager",
        "--lr_scheduler=Cosine",
        "--lr_scheduler.warmup_steps=3",
        "--lr_scheduler.min_lr_ratio=0.5",
        steps=4,
    )
    optimizer = optimizer_of(cli)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    assert isinstance(optimizer, lightning_optim.AdamW)
    assert optimizer.options.engine == "eager"
    scheduler = cli.trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(scheduler, lightning_optim.Cosine)
    assert (scheduler.warmup_steps, scheduler.min_lr_ratio, scheduler.base_lrs) == (3, 0.5, [0.25])


# --- configuration that is printed and saved


def test_the_printed_configuration_is_one_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--optimizer=AdamW", "--optimizer.betas=[0.5,0.75]", "--lr_scheduler=wsd", "--param_groups={}"]
    with pytest.raises(SystemExit) as exit_info:
        fit(*arguments, "--print_config")
    assert exit_info.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["optimizer"]["class_path"] == "lightning_optim.AdamW"
    cli = OptimCLI(args=["fit", f"--config={file}"], save_config_callback=None)
    assert type(optimizer_of(cli)) is lightning_optim.AdamW
    assert optimizer_of(cli).param_groups[0]["betas"] == (0.5, 0.75)
    assert len(optimizer_of(cli).param_groups) == 2


def test_the_saved_configuration_repeats_the_run(tmp_path: Path) -> None:
    arguments = [f"--trainer.default_root_dir={tmp_path}", "--optimizer=Lion", "--optimizer.lr=0.01"]
    arguments += ["--lr_scheduler=Linear", "--lr_scheduler.warmup_steps=0.5", "--param_groups.weight_decay=0.1"]
    first = OptimCLI(args=["fit", f"--model={__name__}.Model", "--trainer.max_steps=4", *QUIET, *arguments])
    second = OptimCLI(args=["fit", f"--config={tmp_path / 'config.yaml'}"], save_config_callback=None)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


# --- parameters


def test_without_flags_there_is_one_group() -> None:
    (group,) = optimizer_of(fit("--optimizer=AdamW", "--optimizer.weight_decay=0.3")).param_groups
    assert group["weight_decay"] == 0.3


def test_groups_take_the_optimizers_own_values_unless_told() -> None:
    arguments = ["--optimizer=AdamW", "--optimizer.lr=0.5", "--optimizer.weight_decay=0.3"]
    groups = optimizer_of(fit(*arguments, "--param_groups.no_decay=['layers.2.weight']")).param_groups
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [("decay", 0.5, 0.3), ("no_decay", 0.5, 0)]
    assert [len(g["params"]) for g in groups] == [1, 5]
    groups = optimizer_of(fit(*arguments, "--param_groups.weight_decay=0.1")).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0]
    override = '--param_groups.overrides={"layers.2.*": {"lr": 0.001}}'
    groups = optimizer_of(fit(*arguments, override, "--param_groups.layer_decay=0.5")).param_groups
    assert [g["lr"] for g in groups] == [0.125, 0.125, 0.25, 0.001, 0.001], "an override is not multiplied"


def test_groups_for_an_optimizer_without_weight_decay(capsys: pytest.CaptureFixture[str]) -> None:
    groups = optimizer_of(fit("--optimizer=Rprop", "--param_groups={}")).param_groups
    assert len(groups) == 2
    assert all("weight_decay" not in group for group in groups)
    with pytest.raises(ValueError, match=r"Rprop has no weight_decay"):
        fit("--optimizer=Rprop", "--param_groups.weight_decay=0.1")


def test_the_flags_are_the_arguments_of_the_function() -> None:
    function = set(inspect.signature(lightning_optim.param_groups).parameters) - {"model", "lr"}
    assert {field.name for field in dataclasses.fields(ParamGroupOptions)} == function


@pytest.mark.parametrize("groups", [[], ["--param_groups={}"]])
def test_layers_of_configure_model_are_trained(groups: list[str]) -> None:
    cli = fit("--optimizer=SGD", "--optimizer.lr=0.1", *groups, model="LateModel")
    optimized = {id(p) for group in optimizer_of(cli).param_groups for p in group["params"]}
    assert optimized == {id(p) for p in cli.model.parameters()}
    assert len(optimized) == 6


# --- schedules


def test_schedules_step_per_optimizer_step_and_know_the_runs_length() -> None:
    arguments = ["--optimizer=SGD", "--optimizer.lr=1.0", "--lr_scheduler=Linear", "--lr_scheduler.warmup_steps=0.5"]
    cli = fit(*arguments, steps=8)
    assert cli.model.lrs == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25])


def test_accumulated_batches_are_one_step() -> None:
    arguments = ["--optimizer=SGD", "--optimizer.lr=1.0", "--trainer.accumulate_grad_batches=2"]
    cli = fit(*arguments, "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5", steps=3)
    assert cli.model.lrs == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_the_interval_can_be_an_epoch() -> None:
    arguments = ["--optimizer=SGD", "--optimizer.lr=1.0", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"]
    cli = fit(*arguments, "--lr_interval=epoch", steps=6)
    assert cli.model.lrs == pytest.approx([1.0] * 4 + [0.1] * 2)


def test_plateau_waits_for_its_metric() -> None:
    cli = fit("--optimizer=SGD", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=loss", steps=4)
    (config,) = cli.trainer.lr_scheduler_configs
    assert (config.interval, config.monitor, config.reduce_on_plateau) == ("epoch", "loss", True)


# --- errors name the bad key


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--optimizer=AdamW", "--optimizer.lrr=1"], ["lrr", "lightning_optim.AdamW"]),
        (["--optimizer=AdamW", "--optimizer.fused=true"], ["fused", "lightning_optim.AdamW"]),
        (["--optimizer=Lionn"], ["There is no optimizer 'Lionn'", "'lion'"]),
        (["--optimizer=SGD", "--lr_scheduler=cosin"], ["There is no lr_scheduler 'cosin'", "'cosine'"]),
        (["--optimizer=SGD", "--param_groups.decay=1"], ["param_groups", "decay"]),
        (["--optimizer=SGD", "--lr_interval=batch"], ["lr_interval", "batch"]),
        (["--lr_scheduler=Cosine"], ["--lr_scheduler is of no use without --optimizer"]),
        (["--param_groups={}"], ["--param_groups is of no use without --optimizer"]),
        ([], ["Model has no configure_optimizers of its own", "--optimizer AdamW"]),
    ],
)
def test_errors(arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, lambda: fit(*arguments))
    for text in named:
        assert text in message


def test_errors_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text(yaml.safe_dump({"optimizer": {"class_path": "AdamW", "init_args": {"betaz": [0.9, 0.99]}}}))
    assert "betaz" in error_of(capsys, lambda: fit(f"--config={file}"))
    file.write_text("optimizer: [unclosed")
    assert "config" in error_of(capsys, lambda: fit(f"--config={file}"))


def test_a_models_own_optimizer_is_used_without_the_flag_and_replaced_with_it() -> None:
    assert optimizer_of(fit(model="OwnOptimizer")).param_groups[0]["lr"] == 0.5
    assert type(optimizer_of(fit("--optimizer=Lion", model="OwnOptimizer"))) is lightning_optim.Lion


def test_help_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--optimizer.help", "adamw"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "lightning_optim.AdamW" in printed
    assert "--optimizer.max_grad_norm" in printed


# --- a plain LightningCLI, as in a user's own script


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("AdamW", torch.optim.AdamW),
        ("SGD", torch.optim.SGD),
        ("Lion", lightning_optim.Lion),
        ("lightning_optim.AdamW", lightning_optim.AdamW),
    ],
)
def test_plain_lightning_cli(name: str, cls: type) -> None:
    arguments = ["fit", "--trainer.max_steps=1", *QUIET, f"--optimizer={name}", "--optimizer.lr=0.1"]
    assert type(optimizer_of(LightningCLI(Model, args=arguments, save_config_callback=None))) is cls


def test_plain_lightning_cli_with_factories() -> None:
    schedules = [{"class_path": "Linear", "init_args": {"warmup_steps": 2}}, {"class_path": "lightning_optim.WSD"}]
    cli = LightningCLI(
        TwoSchedules,
        args=[
            "fit",
            "--trainer.max_steps=4",
            *QUIET,
            "--model.optimizer=lightning_optim.AdamW",
            "--model.optimizer.lr=0.5",
            f"--model.schedules={json.dumps(schedules)}",
        ],
        save_config_callback=None,
    )
    assert type(optimizer_of(cli)) is lightning_optim.AdamW
    assert [type(config.scheduler).__name__ for config in cli.trainer.lr_scheduler_configs] == ["Linear", "WSD"]


# --- the command


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-optim {lightning_optim.__version__}\n"


def test_an_unknown_command_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    message = capsys.readouterr().err
    assert "'train'" in message
    assert "fit, validate, test, predict, list, doctor" in message


def test_modules_of_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project_of_a_user.py").write_text(f"import {__name__}\n\nclass Mine({__name__}.Model):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert main(["fit", "--model=project_of_a_user.Mine", "--trainer.max_steps=1", *QUIET, "--optimizer=Lion"]) == 0
    assert sys.path[0] == str(tmp_path)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in known["optimizers"]] == registry.list_optimizers()
    assert [entry["name"] for entry in known["schedulers"]] == registry.list_schedulers()
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for entry in (*known["optimizers"], *known["schedulers"]):
        assert entry["summary"] in printed
        assert getattr(lightning_optim, entry["class"])
    columns = {line.index("elementwise") for line in printed.splitlines() if "elementwise" in line}
    assert len(columns) == 1, "the columns are aligned"


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_OPTIM_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setenv("LIGHTNING_OPTIM_THREADS", "many")
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["engines"]) == set(lightning_optim.engines.ENGINES)
    assert "many" in facts["threads"]["host engine"], "a bad setting is reported, not raised"
    for weights in ("float32 on CPU", "bfloat16 on CPU"):
        assert any(engine in facts["auto"][weights] for engine in facts["engines"])
    assert facts["kernel cache"]["folder"] == str(tmp_path / "kernels")
    monkeypatch.delenv("LIGHTNING_OPTIM_THREADS")
    assert main(["doctor"]) == 0
    assert "kernel cache:" in capsys.readouterr().out


@pytest.mark.parametrize(("mode", "state"), [(0o700, "0 kernels"), (0o777, "others can write to it")])
def test_doctor_looks_at_the_cache_folder(
    mode: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_optim.cli.doctor import kernel_cache

    monkeypatch.setenv("LIGHTNING_OPTIM_CACHE", str(tmp_path / "kernels"))
    assert "not there yet" in kernel_cache()["state"]
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(mode)
    assert state in kernel_cache()["state"]


def test_without_lightning_the_other_commands_work() -> None:
    code = (
        "import sys; sys.modules['lightning'] = None; sys.modules['jsonargparse'] = None\n"
        "from lightning_optim.cli.main import main\n"
        "codes = [main(['list']), main(['doctor', '--json']), main(['fit'])]\n"
        "sys.exit(codes != [0, 0, 1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'lightning-optim[cli]'" in done.stderr


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_optim", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"lightning-optim {lightning_optim.__version__}\n"


def test_the_usage_names_every_subcommand_of_the_cli() -> None:
    assert set(cli_main.TRAINER_COMMANDS) == set(OptimCLI.subcommands())
