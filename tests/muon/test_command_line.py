"""The command line knows the parameters' names, and with ``--param_groups`` their modules."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from lightning.pytorch import LightningModule

from lightning_optim import LightningOptimWarning, Muon
from lightning_optim import warnings as package_warnings
from lightning_optim.cli.optim_cli import OptimCLI

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter"),
]


class Words(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return torch.zeros((), requires_grad=True)


@pytest.mark.parametrize("groups", [[], ["--param_groups={}"]])
def test_matrices_are_told_apart(groups: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_warnings, "_seen", set())
    flags = ["--optimizer=Muon", "--optimizer.lr=0.1", "--optimizer.adamw_lr=0.01", "--optimizer.ns_steps=4"]
    cli = OptimCLI(
        args=[f"--model={__name__}.Words", "--trainer.logger=false", *flags, *groups],
        run=False,
        save_config_callback=None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", LightningOptimWarning)
        optimizer: Any = cli.model.configure_optimizers()
    optimizer = optimizer["optimizer"]
    assert isinstance(optimizer, Muon)
    names = {id(p): name for name, p in cli.model.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    # "words" is no usual name of an embedding: its type tells, where modules are looked at.
    hidden = {"body.weight"} if groups else {"body.weight", "words.weight"}
    assert {name for name, group in found.items() if group["use_muon"]} == hidden
    assert {group["lr"] for name, group in found.items() if name not in hidden} == {0.01}
    assert found["body.weight"]["lr"] == 0.1
    assert found["body.weight"]["ns_steps"] == 4
    assert found["body.bias"]["weight_decay"] == (0.0 if groups else 0.1)
