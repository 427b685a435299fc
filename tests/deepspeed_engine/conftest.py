"""Settings for the tests of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _as_if_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_OPTIM_ENGINE", raising=False)
    monkeypatch.delenv("PL_DEEPSPEED_CONFIG_PATH", raising=False)
    monkeypatch.setattr("lightning_optim.warnings._seen", set())


@pytest.fixture(scope="session")
def operators() -> None:
    """DeepSpeed's compiled operators: a minute or two at the first time on a machine, and then kept.

    Here, because processes that wait for one another would be taken for stuck.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder

        ShareMemCommBuilder().load()
        CPUAdamBuilder().load()
