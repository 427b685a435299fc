"""What the documents show runs: blocks of Python, and command lines, which are parsed without a training."""

from __future__ import annotations

import doctest
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from lightning.pytorch.cli import LightningCLI

import lightning_optim
from lightning_optim.cli import find_lr
from lightning_optim.cli.main import main
from lightning_optim.cli.optim_cli import OptimCLI
from lightning_optim.rules import ops
from lightning_optim.strategies import InGraphStrategy

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "examples/**/*.md") for path in ROOT.glob(pattern) if path.name[0] != "_"
)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec|number of training batches)"),
]

CONFIG = ROOT / "examples" / "char_lm" / "config.yaml"

#: Blocks of Python that are not run here, by a piece of their text, and why.
NOT_RUN = {
    "import Signum as Signum": "a line of a file that is there only after the reader has made it",
    "from .shared import": "a file of tests/references",
    "class Signum(RuleOptimizer)": "tests/test_packaging.py trains with it, from this very text",
    "accelerator.state.deepspeed_plugin": "no plugin without DeepSpeed; tests/deepspeed_engine runs the example",
    'strategy="detached_deepspeed"': "Lightning's class wants DeepSpeed; tests/deepspeed_engine makes it",
}

#: Commands of the documents that are not looked at, by their beginning, and why.
NOT_PARSED = {
    "accelerate launch": "tests/deepspeed_engine launches it, where DeepSpeed is installed",
}


def _blocks(path: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_the_python_of_a_document(path: Path) -> None:
    """A page tells one story: later blocks use what earlier ones have made."""
    names = _introduced(path)
    for block in _blocks(path, "python"):
        if any(part in block for part in NOT_RUN):
            compile(block, path.name, "exec")
        elif ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, names, path.name, path.name, 0)
            failed, _ = doctest.DocTestRunner().run(test, clear_globs=False)
            names = test.globs
            assert not failed, "see above what was printed"
        else:
            exec(compile(block, path.name, "exec"), names)  # noqa: S102
    if path.name == "README.md" and path.parent == ROOT:
        configured = names["configure_optimizers"](nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        assert isinstance(configured["optimizer"], lightning_optim.AdamW)


def test_what_is_not_run_is_there() -> None:
    everything = "".join(path.read_text() for path in DOCUMENTS)
    assert [part for part in (*NOT_RUN, *NOT_PARSED) if part not in everything] == []


def test_the_yaml_of_the_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks = [block for path in DOCUMENTS for block in _blocks(path, "yaml")]
    assert blocks
    for block in blocks:
        (tmp_path / "block.yaml").write_text(block)
        cli = _parsed(["fit", "--config", str(tmp_path / "block.yaml")], OptimCLI, monkeypatch)
        assert cli.config.fit.optimizer.class_path.startswith("lightning_optim.")


# ---------------------------------------------------------------- command lines


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_the_commands_of_a_document(path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in _commands(path):
        if words[0] == "lightning-optim" and words[1] in OptimCLI.subcommands():
            _parsed(words[1:], OptimCLI, monkeypatch)
        elif words[:2] == ["lightning-optim", "find-lr"]:
            _, training = find_lr._parser().parse_known_args(words[2:])
            _parsed(["fit", *training], OptimCLI, monkeypatch)
        elif words[:2] == ["python", "train.py"]:  # any LightningCLI
            _parsed(words[2:], LightningCLI, monkeypatch)
        elif words[0] == "lightning-optim":
            # 1: a plan for this machine may find that nothing fits.
            assert main(words[1:]) in ((0, 1) if words[1] == "plan" else (0,)), words
        elif words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in words[1:] if "=" not in word} <= {*targets, *words[:1]}, words
        elif words[0] == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"\w+", words[2].partition("[")[2])) <= set(extras), words
        else:
            assert any(shlex.join(words).startswith(beginning) for beginning in NOT_PARSED), words


@pytest.mark.parametrize("file", sorted((ROOT / "examples").rglob("*.yaml")), ids=_name)
def test_the_command_that_a_configuration_names(file: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [line.strip("# \n") for line in file.read_text().splitlines() if "lightning-optim fit" in line]
    for line in named:
        assert str(file.relative_to(ROOT)) in line
        _parsed(shlex.split(line)[1:], OptimCLI, monkeypatch)
    assert named or "accelerate" in file.name


def test_the_example_with_deepspeed_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="DeepSpeed is not in use: start this by `accelerate launch"):
        runpy.run_path(str(ROOT / "examples" / "deepspeed" / "train.py"), run_name="__main__")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the commands of the documents take for granted."""
    (tmp_path / "my.py").write_text(
        "from lightning.pytorch import LightningDataModule, LightningModule\n\n\n"
        "class Module(LightningModule):\n    pass\n\n\nclass Data(LightningDataModule):\n    pass\n"
    )
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "config.yaml").symlink_to(ROOT / "examples" / "char_lm" / "config.yaml")
    machine = re.search(r"```json\n(.*?)```", (ROOT / "docs" / "placement.md").read_text(), re.DOTALL)
    assert machine is not None
    (tmp_path / "machine.json").write_text(machine[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my", None)


def _introduced(path: Path) -> dict[str, Any]:
    """What the text around the blocks of a page speaks of."""
    model = nn.Linear(4, 2)
    names: dict[str, Any] = {name: getattr(ops, name) for name in dir(ops) if not name.startswith("_")}
    names |= {"torch": torch, "lightning_optim": lightning_optim, "InGraphStrategy": InGraphStrategy}
    names |= {"model": model, "optimizer": lightning_optim.AdamW(model.parameters())}
    names |= {"batches": [torch.ones(3, 4)] * 2, "window": [torch.ones(3, 4)] * 2, "train": lambda placement: None}
    names["loss_of"] = lambda batch: names["model"](batch).square().mean()
    return names


def _commands(path: Path) -> Iterator[list[str]]:
    """The command lines of a document, word by word."""
    shown = [block for block in _blocks(path, "console", "") if "\n$ " in f"\n{block}" or "lightning-optim " in block]
    for block in [*_blocks(path, "bash"), *shown]:
        prompted = "\n$ " in f"\n{block}"
        for line in block.replace("\\\n", " ").splitlines():
            if prompted and not line.startswith("$ "):  # what was printed
                continue
            words = [word for word in shlex.split(line.removeprefix("$ "), comments=True) if word != "..."]
            if words and re.fullmatch(r"[a-z-]+", words[0]):
                yield words


def _parsed(arguments: list[str], cls: type[LightningCLI], monkeypatch: pytest.MonkeyPatch) -> LightningCLI:
    """A command line that was understood, of which nothing was made."""
    for step in ("_set_seed", "_add_instantiators", "instantiate_classes", "after_instantiate_classes"):
        monkeypatch.setattr(cls, step, lambda self: None)
    monkeypatch.setattr(cls, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(sys, "argv", ["lightning-optim"])
    if "--model" not in arguments and str(CONFIG.relative_to(ROOT)) not in arguments:
        arguments = [*arguments, "--model=lightning.pytorch.demos.boring_classes.BoringModel"]
    return cls(args=arguments)
