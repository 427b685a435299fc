"""Names and options of optimizers and schedules, as flags and in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

import lightning_optim
from lightning_optim import registry
from lightning_optim.cli.optim_cli import OptimCLI

from .common import MODULE, QUIET, build, fit, known_warnings, optimizer_of

pytestmark = known_warnings

NAMES = [
    ("AdamW", lightning_optim.AdamW),
    ("adamw", lightning_optim.AdamW),
    ("Adam", lightning_optim.Adam),
    ("SGD", lightning_optim.SGD),
    ("Lion", lightning_optim.Lion),
    ("LAMB", lightning_optim.LAMB),
    ("lightning_optim.AdamW", lightning_optim.AdamW),
    ("torch.optim.AdamW", torch.optim.AdamW),
    ("ASGD", torch.optim.ASGD),
]


@pytest.mark.matrix(unless=lambda name: name not in ("Adam", "SGD", "Lion"))
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
        args=[f"--config={tmp_path / 'sub.yaml'}", "fit", f"--model={MODULE}.Model", "--trainer.max_steps=1", *QUIET],
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
    config = {"subcommand": "fit", "fit": {"model": f"{MODULE}.Model", "optimizer": "adamw", "trainer": trainer}}
    cli = OptimCLI(args=config, save_config_callback=None)
    assert type(optimizer_of(cli)) is lightning_optim.AdamW


def test_a_file_keeps_its_types(tmp_path: Path) -> None:
    parser = OptimCLI(args=[f"--model={MODULE}.Model"], run=False).parser
    parser.add_argument("--quoted", type=str)
    parser.add_argument("--table", type=dict[int, float])
    file = tmp_path / "types.yaml"
    file.write_text(f"model: {MODULE}.Model\nquoted: '1e-3'\ntable: {{0: 1e-3, 4: .inf}}\n")
    config = parser.parse_args([f"--config={file}"])
    assert (config.quoted, config.table) == ("1e-3", {0: 1e-3, 4: float("inf")})


def test_every_name_of_the_list_is_a_name_on_the_command_line() -> None:
    for name in registry.list_optimizers():
        more = ["--optimizer.base=AdamW"] if name in registry.WRAPPERS else []
        assert type(build(f"--optimizer={name}", *more)["optimizer"]) is registry.optimizer_info(name).cls
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


def test_a_models_own_optimizer_is_used_without_the_flag_and_replaced_with_it() -> None:
    assert optimizer_of(fit(model="OwnOptimizer")).param_groups[0]["lr"] == 0.5
    assert type(optimizer_of(fit("--optimizer=Lion", model="OwnOptimizer"))) is lightning_optim.Lion
