"""What earlier versions have saved loads without pickle, with all its bits, and goes on to where it went there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import AFTER, BEFORE, CASES, TRAININGS, fit, made, steps

#: By the commit at which they were written.
VERSIONS = sorted(path for path in Path(__file__).parent.iterdir() if (path / "loops.pt").exists())
#: float32: an engine of another processor may fuse a product and a sum. Each of three steps moves by up to 0.05.
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 1e-6, "atol": 1e-7},
    # Rounded from that: the same number, but where that lies next to a tie. One of its steps.
    torch.float16: {"rtol": 2**-10, "atol": 0.0},
    torch.bfloat16: {"rtol": 2**-7, "atol": 0.0},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec|dataloader is not resumable)"),
    pytest.mark.filterwarnings("ignore:in_graph\\w*. the triton engine cannot be used"),
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@cache
def loops(version: Path) -> dict[str, dict[str, Any]]:
    return torch.load(version / "loops.pt", weights_only=True)


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p.detach(), q, **CLOSE[q.dtype])


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_a_loop_goes_on(version: Path, case: str, engine: str) -> None:
    saved = loops(version)[case]
    net, optimizer, schedule = made(case)
    params = list(net.parameters())
    for p, value in zip(params, saved["weights"], strict=True):
        p.data.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    if schedule is not None:
        schedule.load_state_dict(saved["schedule"])
        assert schedule.get_last_lr() == saved["schedule"]["_last_lr"]
    same(optimizer.state_dict(), saved["optimizer"])
    stepping = getattr(optimizer, "base", optimizer)
    if hasattr(stepping, "use_engine"):
        stepping.use_engine(engine)
    elif engine != "auto":
        pytest.skip("it runs on no engine")
    steps(optimizer, params, schedule, range(BEFORE, BEFORE + AFTER))
    close(params, saved["after"])


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_a_training_goes_on(version: Path, training: str) -> None:
    expected = torch.load(version / "trained.pt", weights_only=True)[training]
    trainer = fit(training, str(version / f"{training}.ckpt"))
    assert trainer.global_step == BEFORE + AFTER
    found = dict(trainer.lightning_module.named_parameters())
    close(list(found.values()), [expected[name] for name in found])


def same(found: Any, saved: Any, where: str = "") -> None:
    """All that was saved is there, to the bit; there may be more."""
    if isinstance(saved, dict):
        for key, value in saved.items():
            if value != {}:  # of a parameter with no slots
                assert key in found, f"{where}[{key!r}] is lost"
                same(found[key], value, f"{where}[{key!r}]")
    elif isinstance(saved, list | tuple):
        assert len(found) == len(saved), where
        for index, (a, b) in enumerate(zip(found, saved, strict=True)):
            same(a, b, f"{where}[{index}]")
    elif isinstance(saved, Tensor):
        assert torch.equal(found, saved), where
        assert found.dtype == saved.dtype, where
    else:
        assert found == saved, where


def test_all_that_the_files_hold_is_tested() -> None:
    assert [path.name for path in VERSIONS] == ["0c93982"]
    for version in VERSIONS:
        assert set(loops(version)) == set(CASES)
        assert {path.stem for path in version.glob("*.ckpt")} == set(TRAININGS)
        assert sum(path.stat().st_size for path in version.iterdir()) < 300_000
