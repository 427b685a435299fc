"""The cache of kernels: built once, never loaded when damaged, private, and shared by many processes."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lightning_optim.engines import cache
from lightning_optim.engines.host import build
from lightning_optim.engines.host import toolchain as toolchains
from lightning_optim.warnings import LightningOptimWarning

from .common import assert_same, libraries, needs_compiler, new_process, run, script


def logging_compiler(folder: Path) -> tuple[str, Path]:
    """A compiler that notes each build."""
    log = folder / "log"
    log.touch()
    good = toolchains.find_toolchain().compiler
    toolchains.find_toolchain.cache_clear()
    return script(folder / "cc", f'[ "$1" = --version ] || echo build >> {log}\nexec {good} "$@"'), log


@needs_compiler
def test_kernels_are_built_once_and_kept(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler, log = logging_compiler(tmp_path)
    fresh.setenv("CC", compiler)
    expected, optimizer = run()
    assert optimizer.engine_report().count(": host (the fastest that supports it)") == 2
    assert len(log.read_text().split()) == 2  # float32 and bfloat16
    new_process(fresh)
    assert_same(run()[0], expected)
    assert len(log.read_text().split()) == 2
    assert len(libraries(tmp_path / "cache")) == 2
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "cache").glob("build-*")) == []


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "unreadable"])
def test_a_damaged_kernel_is_never_loaded(damage: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler, log = logging_compiler(tmp_path)
    fresh.setenv("CC", compiler)
    expected, _ = run()
    for path in libraries(tmp_path / "cache"):
        # A file that is mapped into this process must not change: the damaged one takes its name.
        content = path.read_bytes()
        path.unlink()
        if damage == "unreadable":
            path.mkdir()
            continue
        middle = len(content) // 2
        path.write_bytes(
            {
                "truncated": content[:middle],
                "altered": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
                "empty": b"",
            }[damage]
        )
    damaged = libraries(tmp_path / "cache")
    new_process(fresh)
    if damage == "unreadable":  # not even replaceable: foreach steps
        with pytest.warns(LightningOptimWarning, match="building a kernel failed"):
            result, _ = run()
        assert_same(result, run(engine="foreach")[0])
        return
    result, optimizer = run()
    assert_same(result, expected)
    assert "foreach" not in optimizer.engine_report()
    assert len(log.read_text().split()) == 4
    assert len(libraries(tmp_path / "cache")) == len(damaged)


@needs_compiler
def test_another_processor_compiler_or_flag_is_another_kernel(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = toolchains.find_toolchain()
    source = "void lo_run(void) {}"
    variants = [
        here,
        dataclasses.replace(here, processor="another"),
        dataclasses.replace(here, version="another"),
        dataclasses.replace(here, flags=(*here.flags, "-O1")),
    ]
    for count, variant in enumerate(variants, start=1):
        build.load(source, variant)
        build.load(source, variant)
        assert len(libraries(tmp_path / "cache")) == count
    build.load(source + "\n", here)
    assert len(libraries(tmp_path / "cache")) == len(variants) + 1


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_not_used(mode: int, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = tmp_path / "cache"
    shared.mkdir()
    shared.chmod(mode)
    assert "foreach" not in run()[1].engine_report()
    assert libraries(shared) == []
    private = cache.private_folder(cache.cache_folder())
    assert private.parent == Path(tempfile.gettempdir())
    assert private.stat().st_mode & 0o777 == 0o700
    assert libraries(private)


@needs_compiler
def test_a_folder_of_another_user_is_not_used(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(os, "getuid", lambda: 12345)
    assert cache.private_folder(cache.cache_folder()).parent == Path(tempfile.gettempdir())


@needs_compiler
@pytest.mark.parametrize("variable", [cache.CACHE_VARIABLE, "XDG_CACHE_HOME", "HOME"])
def test_a_folder_that_cannot_be_made_is_done_without(variable: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (cache.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        fresh.delenv(name, raising=False)
    (tmp_path / "file").write_text("not a folder")
    fresh.setenv(variable, str(tmp_path / "file" / "below"))
    assert "foreach" not in run()[1].engine_report()
    assert cache.private_folder(cache.cache_folder()).parent == Path(tempfile.gettempdir())


def test_the_cache_is_in_the_users_own_folder(fresh: pytest.MonkeyPatch) -> None:
    assert cache.cache_folder() == Path(os.environ[cache.CACHE_VARIABLE])
    fresh.delenv(cache.CACHE_VARIABLE)
    fresh.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_folder() == Path("/somewhere/lightning_optim")
    fresh.delenv("XDG_CACHE_HOME")
    fresh.setenv("HOME", "/home/me")
    assert cache.cache_folder() == Path("/home/me/.cache/lightning_optim")


@needs_compiler
def test_a_lock_that_is_never_released_does_not_stop_the_build(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(cache, "LOCK_SECONDS", 0.05)
    toolchain = toolchains.find_toolchain()
    build.load("void lo_run(void) {}", toolchain)
    (built,) = libraries(tmp_path / "cache")
    key = built.name.partition("-")[0]
    built.unlink()
    with (tmp_path / "cache" / f"{key}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        build.load("void lo_run(void) {}", toolchain)
    assert libraries(tmp_path / "cache") == [built]


RANKS = """
import multiprocessing, os, sys
import torch
from lightning_optim import AdamW

def rank(barrier, results):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 100))
    optimizer = AdamW([p], lr=0.1, max_grad_norm=1.0)
    p.grad = torch.linspace(1, 2, 100)
    barrier.wait()
    optimizer.step()
    assert "not host" not in optimizer.engine_report()
    results.put(p.detach().double().sum().item().hex())

if __name__ == "__main__":
    AdamW([torch.nn.Parameter(torch.ones(1))])  # what is imported late, is now
    # Forked before torch has started any thread: six imports would take most of the time.
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.SimpleQueue()
    ranks = [context.Process(target=rank, args=(barrier, results)) for _ in range(6)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    print([process.exitcode for process in ranks], len({results.get() for _ in ranks}), results.empty())
"""


@needs_compiler
def test_many_processes_start_at_once_with_an_empty_cache(tmp_path: Path) -> None:
    environment = {**os.environ, cache.CACHE_VARIABLE: str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-W", "error::UserWarning", str(tmp_path / "ranks.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{[0] * 6} 1 True\n", done.stderr
    assert len(libraries(tmp_path / "cache")) == 3  # the reader, the update, and the norm that clips
    assert list((tmp_path / "cache").glob("build-*")) == []
