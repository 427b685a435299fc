"""Settings for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_optim.engines import ENGINES, cache
from lightning_optim.engines.host import reader
from lightning_optim.engines.host import toolchain as toolchains
from lightning_optim.engines.host.engine import HostEngine


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """As in a new process: no compiler looked for, nothing compiled or warned of, an empty cache."""

    def forget() -> None:
        toolchains.find_toolchain.cache_clear()
        cache.private_folder.cache_clear()

    reader.native_reader()  # not what is tested here: once found, it stays for the process
    monkeypatch.setitem(ENGINES, "host", HostEngine())
    monkeypatch.setattr("lightning_optim.warnings._seen", set())
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTNING_OPTIM_ENGINE", raising=False)
    forget()
    yield monkeypatch
    forget()
