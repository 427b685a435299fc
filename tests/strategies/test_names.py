"""By which names the strategies are found, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from lightning_optim.cli.optim_cli import OptimCLI
from lightning_optim.strategies import InGraphDDPStrategy, InGraphFSDP2Strategy, InGraphStrategy
from lightning_optim.strategy_names import STRATEGIES, register
from lightning_optim.warnings import LightningOptimWarning

from .common import OPTIMIZERS, ROOTS, Model, fit, known_warnings, make_trainer

pytestmark = known_warnings


@pytest.mark.parametrize("root", ROOTS)
def test_names_and_class_paths(root: str) -> None:
    registry = import_module(f"{root}.strategies").StrategyRegistry
    home = import_module(f"lightning_optim.strategies.{root.partition('.')[0]}")
    base = import_module(f"{root}.strategies").Strategy
    register()
    for name, cls in STRATEGIES.items():
        if name == "detached_deepspeed" and find_spec("deepspeed") is None:
            continue  # it says so: tests/deepspeed_engine
        strategy = registry.get(name)
        assert type(strategy) is getattr(home, cls)
        assert isinstance(strategy, base)
        assert name in registry.available_strategies()
    by_name, by_class = make_trainer(root, strategy="in_graph"), make_trainer(root, strategy=home.InGraphStrategy())
    for trainer in (by_name, by_class):
        assert type(trainer.strategy) is home.InGraphStrategy
        assert trainer.strategy.root_device == torch.device("cpu")


ORDERS = {
    "import sorters' order": """
        import lightning.pytorch as pl
        import lightning_optim
        pl.Trainer(strategy="in_graph", accelerator="cpu", logger=False)
    """,
    "ours first, for either": """
        import lightning_optim
        assert not {"lightning", "pytorch_lightning", "triton"} & set(sys.modules), "import lightning_optim is light"
        import lightning.pytorch
        lightning.pytorch.Trainer(strategy="in_graph_ddp", accelerator="cpu", devices=1, logger=False)
        # The other root would take the messages of this one over to its own logger.
        from lightning_utilities.core import rank_zero
        log = rank_zero.log
        import lightning_optim.strategies
        ours = lightning_optim.strategies.InGraphStrategy()
        lightning.pytorch.Trainer(strategy=ours, accelerator="cpu", logger=False)
        assert "pytorch_lightning" not in sys.modules
        assert rank_zero.log is log
        import pytorch_lightning
        pytorch_lightning.Trainer(strategy="in_graph", accelerator="cpu", logger=False)
    """,
}


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_script_has_to_import(order: str) -> None:
    script = "import sys\n" + textwrap.dedent(ORDERS[order])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.strategy=in_graph"],
        ["--trainer.strategy=lightning_optim.strategies.InGraphStrategy", "--trainer.strategy.engine=eager"],
        ["--trainer.strategy=InGraphStrategy", "--trainer.strategy.engine=eager"],
    ],
)
def test_command_line(flags: list[str]) -> None:
    quiet = [f"--trainer.{flag}=false" for flag in ("logger", "enable_checkpointing", "enable_progress_bar")]
    cli = OptimCLI(
        args=[
            "fit",
            f"--model={Model.__module__}.Model",
            "--optimizer=torch.optim.AdamW",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=1",
            "--trainer.enable_model_summary=false",
            *quiet,
            *flags,
        ],
        save_config_callback=None,
    )
    strategy: Any = cli.trainer.strategy
    assert type(strategy) is InGraphStrategy
    assert ("eager (requested)" in strategy.report()) == (len(flags) == 2)


@pytest.mark.parametrize(
    ("cls", "flags"),
    [
        ("DetachedStrategy", ["clip=speculative", "bucket_mb=8.5", "master_dtype=float64", "device_fraction=0.5"]),
        ("DetachedStrategy", ["delay_one_step=true", "undo=false", "engine=host"]),
        ("DetachedDDPStrategy", ["bucket_mb=8.5", "master_dtype=float64", "find_unused_parameters=true"]),
        ("OptimAutoStrategy", ["clip=auto", "activation_gb=1.5"]),
    ],
)
def test_options_from_the_command_line(cls: str, flags: list[str]) -> None:
    quiet = [f"--trainer.{flag}=false" for flag in ("logger", "enable_checkpointing", "enable_progress_bar")]
    chosen = [f"--trainer.strategy=lightning_optim.strategies.{cls}", *[f"--trainer.strategy.{flag}" for flag in flags]]
    model = [f"--model={Model.__module__}.Model", "--optimizer=torch.optim.AdamW", "--trainer.accelerator=cpu"]
    cli = OptimCLI(args=[*model, *quiet, *chosen], run=False, save_config_callback=None)
    assert type(cli.trainer.strategy).__name__ == cls
    options = vars(getattr(cli.trainer.strategy, "options"))  # noqa: B009 # of these classes alone
    for flag in flags:
        name, _, value = flag.partition("=")
        if name in options and (name, value) != ("clip", "auto"):
            assert str(options[name]).lower() == value


def test_options_of_the_class_beneath() -> None:
    device = InGraphStrategy("cpu", engine="eager")
    assert device.parallel_devices == [torch.device("cpu")]
    assert make_trainer(strategy=device).strategy.root_device == torch.device("cpu")
    ddp: Any = InGraphDDPStrategy(engine="eager", find_unused_parameters=True)
    assert ddp._ddp_kwargs == {"find_unused_parameters": True}
    sharded: Any = InGraphFSDP2Strategy(2, save_distributed_checkpoint=False)
    assert (sharded._data_parallel_size, sharded._tensor_parallel_size) == (2, 1)
    assert not sharded._save_distributed_checkpoint


@pytest.mark.parametrize("cls", [InGraphStrategy, InGraphDDPStrategy, InGraphFSDP2Strategy])
def test_an_unknown_engine(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"engine='tritn' is not an engine; valid: auto, .*triton"):
        cls(engine="tritn")


def test_more_than_one_device() -> None:
    with pytest.raises(ValueError, match=r"'in_graph' is for one device.*devices=2; valid: devices=1.*in_graph_ddp"):
        make_trainer(strategy="in_graph", devices=2)


def test_report_before_any_training() -> None:
    assert InGraphStrategy().report() == "in_graph: no training has begun"


def test_it_says_once_that_there_is_no_triton_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_optim.engines import ENGINES

    for reason in ("there is no CUDA device", "Triton is not installed"):
        monkeypatch.setattr(ENGINES["triton"], "unavailable", lambda reason=reason: reason)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                fit(Model(OPTIMIZERS["torch AdamW"]), max_steps=1)
                fit(Model(OPTIMIZERS["ours"]), max_steps=1)
        messages = [str(one.message) for one in caught if one.category is LightningOptimWarning]
        (told,) = [message for message in messages if "the triton engine" in message]  # not that there is no compiler
        engine = "foreach" if ENGINES["host"].unavailable() else "host"
        assert told == (
            f"in_graph: the triton engine cannot be used ({reason}); stepping with {engine} instead, with the same "
            "results"
        )


@pytest.mark.filterwarnings("error::lightning_optim.warnings.LightningOptimWarning")
def test_it_says_nothing_where_another_engine_was_asked_for() -> None:
    fit(Model(OPTIMIZERS["torch AdamW"]), InGraphStrategy(engine="foreach"), max_steps=1)
    fit(Model(OPTIMIZERS["foreign"]), max_steps=1)


def test_the_report_is_logged_when_the_training_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_info", logged.append)

    class Started(Model):
        def training_step(self, *args: Any) -> Any:
            assert any("in_graph: foreign's Foreign runs its own step" in line for line in logged)
            return super().training_step(*args)

    fit(Started(OPTIMIZERS["foreign"]), max_steps=1)
