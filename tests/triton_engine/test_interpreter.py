"""The Triton engine in Triton's interpreter, in processes of their own: one after the other they would take minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .common import needs_triton

TESTS = Path(__file__).parent / "interpreted"

pytestmark = pytest.mark.long

#: What each process runs: a file.
PARTS = {path.stem: [str(path)] for path in sorted(TESTS.glob("test_*.py"))}


class Part:
    """A process that runs one of them."""

    def __init__(self, name: str, folder: Path, *options: str) -> None:
        self._said = folder / f"{name}.txt"
        with self._said.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-x", *options, *PARTS[name]],
                env={**os.environ, "TRITON_INTERPRET": "1"},
                cwd=Path(__file__).parents[2],
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> tuple[int, str]:
        return self.process.wait(), self._said.read_text()


@pytest.fixture(scope="module")
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Part]]:
    """Gives the process of a part, where all that are wanted were started at the same time."""
    folder = tmp_path_factory.mktemp("interpreted")
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted = [str(item.callspec.params["part"]) for item in items if item.function is test_interpreted]
    # Under pytest-xdist other workers have other parts.
    wanted = [] if "PYTEST_XDIST_WORKER" in os.environ else wanted
    options = ["--matrix"] if request.config.getoption("--matrix") else []
    started = {part: Part(part, folder, *options) for part in wanted}
    yield lambda part: started[part] if part in started else started.setdefault(part, Part(part, folder, *options))
    for part in started.values():
        part.process.kill()
        part.process.wait()


@needs_triton
@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part: str, start: Callable[[str], Part]) -> None:
    code, said = start(part).end()
    assert code == 0, said[-8000:]
    assert " passed" in said
