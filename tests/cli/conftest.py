"""Settings for the tests of this folder."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _no_arguments_of_pytests(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns about ``args=`` in a process that was started with arguments."""
    monkeypatch.setattr(sys, "argv", ["lightning-optim"])
