"""Without a compiler, or with a broken one, foreach steps with the same results, and this is said once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim.engines import available_engines
from lightning_optim.engines.host import build
from lightning_optim.engines.host import toolchain as toolchains
from lightning_optim.optimizers import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.warnings import LightningOptimWarning

from .common import assert_same, needs_compiler, new_process, run, script


def assert_falls_back(reason: str, **options: Any) -> RuleOptimizer:
    """Steps with foreach, and says so once, with the reason."""
    expected, _ = run(engine="foreach")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [run(**options)[0] for _ in range(2)]
        result, optimizer = run(name="lion", **options)
        assert all(x.isfinite().all() for x in result)
        OPTIMIZERS["adamw"].create([nn.Parameter(torch.ones(2))]).engine_report()
    assert_same(results[0], expected)
    assert_same(results[1], expected)
    said = [str(w.message) for w in caught if issubclass(w.category, LightningOptimWarning)]
    assert len(said) == 1, said
    assert re.search(reason, said[0]), said
    assert "stepping with foreach instead, with the same results" in said[0]
    report = optimizer.engine_report()
    assert report.count(": foreach (") == 2
    assert re.search(f"not host: .*{reason}", report)
    return optimizer


def test_without_a_compiler_foreach_steps(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.delenv("CC", raising=False)
    fresh.setenv("PATH", str(tmp_path))
    assert_falls_back("no C compiler: cc, gcc, clang not found in PATH")
    available = available_engines()
    assert available.pop("triton") != ""
    assert available == {"eager": None, "foreach": None, "host": "no C compiler: cc, gcc, clang not found in PATH"}


def test_asking_for_it_by_name_changes_nothing(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CC", str(tmp_path / "missing"))
    assert_falls_back("no C compiler: .*missing not found", engine="host")


def test_a_compiler_that_does_not_run(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CC", script(tmp_path / "false", "exit 1"))
    assert_falls_back("the C compiler .*false does not run")


COMPILERS = {
    "fails": ('echo "kernel.c: no such instruction" >&2; exit 1', "cc failed: kernel.c: no such instruction"),
    "writes nothing": ("exit 0", "building a kernel failed"),
    "writes garbage": ('while [ "$1" != -o ]; do shift; done; echo garbage > "$2"', "does not load"),
    "hangs": ("while :; do :; done", "building a kernel failed: .* timed out"),
}


@pytest.mark.parametrize("kind", COMPILERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_compiler_that_is_broken(kind: str, clip: float | None, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    what, reason = COMPILERS[kind]
    fresh.setattr(build, "BUILD_SECONDS", 0.3)
    fresh.setenv("CC", script(tmp_path / "cc", f'[ "$1" = --version ] && echo cc 1.0 && exit 0\n{what}'))
    if clip is None:
        assert_falls_back(reason)
    else:
        with pytest.warns(LightningOptimWarning, match=reason):
            clipped, optimizer = run(max_grad_norm=clip)
        assert_same(clipped, run(max_grad_norm=clip, engine="foreach")[0])
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm > 0
    assert list((tmp_path / "cache").glob("*.so")) == [], "what does not load must not be kept"
    assert list((tmp_path / "cache").glob("build-*")) == [], "what is left of a build"


@needs_compiler
def test_a_repaired_compiler_is_used(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = toolchains.find_toolchain().compiler
    garbage = '[ "$1" = --version ] && echo cc 1.0 && exit 0\nwhile [ "$1" != -o ]; do shift; done; echo x > "$2"'
    path = script(tmp_path / "cc", garbage)
    fresh.setenv("CC", path)
    new_process(fresh)
    with pytest.warns(LightningOptimWarning, match="does not load"):
        run()
    script(tmp_path / "cc", f'[ "$1" = --version ] && echo cc 1.0 && exit 0\nexec {good} "$@"')
    new_process(fresh)
    assert "foreach" not in run()[1].engine_report()


ALONE = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lightning_optim
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = lightning_optim.SGD([p], lr=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.step()
print([str(w.message) for w in caught if w.category is lightning_optim.LightningOptimWarning])
print([w.filename for w in caught if w.category is lightning_optim.LightningOptimWarning])
print(p.tolist())
"""


def test_a_process_without_a_compiler_warns_at_the_users_line(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "LIGHTNING_OPTIM_ENGINE")}
    user = tmp_path / "train.py"
    user.write_text(ALONE)
    done = subprocess.run(
        [sys.executable, str(user)], env={**environment, "PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    messages, places, weights = done.stdout.splitlines()
    assert messages.count("the host engine cannot be used (no C compiler") == 1
    assert places == str([str(user)])
    assert weights == "[0.0, 0.0, 0.0]"
