"""Settings for the tests of this folder."""

from __future__ import annotations

import logging
import sys

import pytest


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_OPTIM_ENGINE", raising=False)
    monkeypatch.setattr(sys, "argv", ["fit"])  # a LightningCLI that is given arguments looks at pytest's too
    monkeypatch.setattr("lightning_optim.warnings._seen", set())
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
