"""The host engine and the choice of an engine: what happens without a compiler, with a broken one, with many processes
at once, with a damaged cache; and that the number of threads changes nothing but the speed."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from lightning_optim.engines import ENGINES, available_engines
from lightning_optim.engines.base import Layout
from lightning_optim.engines.host import HostEngine, build
from lightning_optim.engines.host import toolchain as toolchains
from lightning_optim.engines.host.engine import CHUNK, SERIAL_ELEMENTS, _divide
from lightning_optim.engines.host.printer import CPrinter
from lightning_optim.engines.host.threads import thread_count
from lightning_optim.optimizers import LAMB, AdamWOptim, Lion, RuleOptimizer, SGDOptim
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules import Program, ops, trace
from lightning_optim.warnings import LightningOptimWarning

NO_COMPILER = ENGINES["host"].unavailable()
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
ALL_CASES = [(name, case) for name in OPTIMIZERS for case in reference.cases(name)]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """As in a new process: no compiler looked for, nothing compiled or warned of, an empty cache."""

    def forget() -> None:
        toolchains.find_toolchain.cache_clear()
        build.private_folder.cache_clear()

    monkeypatch.setitem(ENGINES, "host", HostEngine())
    monkeypatch.setattr("lightning_optim.warnings._seen", set())
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTNING_OPTIM_ENGINE", raising=False)
    forget()
    yield monkeypatch
    forget()


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was loaded, but not the cache folder."""
    monkeypatch.setitem(ENGINES, "host", HostEngine())
    monkeypatch.setattr("lightning_optim.warnings._seen", set())
    toolchains.find_toolchain.cache_clear()
    build.private_folder.cache_clear()


def run(steps: int = 3, name: str = "adamw", **options: Any) -> tuple[list[Tensor], RuleOptimizer]:
    """Weights of two types (so, two buckets) after some steps, and their optimizer."""
    random = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 5, generator=random)) for _ in range(2)]
    params.append(nn.Parameter(torch.randn(7, generator=random).to(torch.bfloat16)))
    optimizer = OPTIMIZERS[name].create(params, lr=0.1, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=random).to(p.dtype)
        optimizer.step()
    return [p.detach() for p in params], optimizer


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


# ---------------------------------------------------------------- no compiler, or a broken one


def test_without_a_compiler_foreach_steps(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.delenv("CC", raising=False)
    fresh.setenv("PATH", str(tmp_path))
    assert_falls_back("no C compiler: cc, gcc, clang not found in PATH")
    assert available_engines() == {
        "eager": None,
        "foreach": None,
        "host": "no C compiler: cc, gcc, clang not found in PATH",
    }


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


# ---------------------------------------------------------------- the cache


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
    private = build.private_folder(build.cache_folder())
    assert private.parent == Path(tempfile.gettempdir())
    assert private.stat().st_mode & 0o777 == 0o700
    assert libraries(private)


@needs_compiler
def test_a_folder_of_another_user_is_not_used(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(os, "getuid", lambda: 12345)
    assert build.private_folder(build.cache_folder()).parent == Path(tempfile.gettempdir())


@needs_compiler
@pytest.mark.parametrize("variable", [build.CACHE_VARIABLE, "XDG_CACHE_HOME", "HOME"])
def test_a_folder_that_cannot_be_made_is_done_without(variable: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (build.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        fresh.delenv(name, raising=False)
    (tmp_path / "file").write_text("not a folder")
    fresh.setenv(variable, str(tmp_path / "file" / "below"))
    assert "foreach" not in run()[1].engine_report()
    assert build.private_folder(build.cache_folder()).parent == Path(tempfile.gettempdir())


def test_the_cache_is_in_the_users_own_folder(fresh: pytest.MonkeyPatch) -> None:
    assert build.cache_folder() == Path(os.environ[build.CACHE_VARIABLE])
    fresh.delenv(build.CACHE_VARIABLE)
    fresh.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_folder() == Path("/somewhere/lightning_optim")
    fresh.delenv("XDG_CACHE_HOME")
    fresh.setenv("HOME", "/home/me")
    assert build.cache_folder() == Path("/home/me/.cache/lightning_optim")


@needs_compiler
def test_a_lock_that_is_never_released_does_not_stop_the_build(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(build, "LOCK_SECONDS", 0.05)
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
    environment = {**os.environ, build.CACHE_VARIABLE: str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-W", "error::UserWarning", str(tmp_path / "ranks.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{[0] * 6} 1 True\n", done.stderr
    assert len(libraries(tmp_path / "cache")) == 3  # the reader, the update, and the norm that clips
    assert list((tmp_path / "cache").glob("build-*")) == []


# ---------------------------------------------------------------- threads


def test_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LIGHTNING_OPTIM_THREADS", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert thread_count() == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert thread_count() == 1  # the user's own wish
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert thread_count() == 2  # a launcher's precaution: this process's share
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert thread_count() == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert thread_count() == 3  # torch.set_num_threads() was called since
    monkeypatch.setenv("LIGHTNING_OPTIM_THREADS", "6")
    assert thread_count() == 6


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", " "])
def test_an_invalid_number_of_threads_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_OPTIM_THREADS", value)
    with pytest.raises(ValueError, match=re.escape(f"LIGHTNING_OPTIM_THREADS={value!r}; valid: a positive integer")):
        thread_count()


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "sizes",
    [
        (),
        (0,),
        (1,),
        (0, 5, 0),
        (CHUNK,),
        (CHUNK + 1,),
        (SERIAL_ELEMENTS,),
        (10 * CHUNK + 3, 0, 1, CHUNK - 1),
        (1,) * 99,
    ],
    ids=lambda sizes: f"{len(sizes)} tensors of {sum(sizes)}",
)
def test_chunks_cover_every_element_once(sizes: tuple[int, ...], threads: int) -> None:
    chunks = _divide(sizes, threads)
    bounds = list(chunks.bounds)
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(chunks.tensor), chunks.parts + 1)
    assert chunks.parts == (threads if sum(sizes) >= SERIAL_ELEMENTS else 1)
    covered = [[0] * size for size in sizes]
    work = [0] * chunks.parts
    for part in range(chunks.parts):
        for c in range(bounds[part], bounds[part + 1]):
            tensor, begin = chunks.tensor[c], chunks.begin[c]
            end = min(begin + CHUNK, sizes[tensor])
            work[part] += end - begin
            covered[tensor][begin:end] = [n + 1 for n in covered[tensor][begin:end]]
    assert all(n == 1 for counts in covered for n in counts)
    assert list(chunks.tensor) == sorted(chunks.tensor), "the order in which reductions are summed"
    assert max(work, default=0) <= sum(sizes) / chunks.parts + CHUNK, "a thread has more than its share"


@needs_compiler
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_results_do_not_depend_on_the_number_of_threads(
    name: str, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, reductions (LAMB's norms, the cautious mean) and the clipping norm included."""
    ends = []
    for threads in (1, 2, 5):
        monkeypatch.setenv("LIGHTNING_OPTIM_THREADS", str(threads))
        random = torch.Generator().manual_seed(1)
        dtype = torch.bfloat16 if rounding == "stochastic" else torch.float32
        shapes = [(3, CHUNK + 1), (7, 11), (0,), (SERIAL_ELEMENTS,)]
        params = [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]
        options = {**reference.BASE[name], "max_grad_norm": 0.1, "cautious": True, "rounding": rounding}
        optimizer = OPTIMIZERS[name].create(params, engine="host", weight_decay=0.1, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=random).to(dtype)
            optimizer.step()
        assert optimizer.grad_norm is not None
        slots = [value for p in params for _, value in sorted(optimizer.state[p].items())]
        ends.append([optimizer.grad_norm, *(p.detach() for p in params), *slots])
    for other in ends[1:]:
        assert_same(ends[0], other)


# ---------------------------------------------------------------- the generated code


def sources() -> dict[str, str]:
    """The C of every optimizer in every case, on many mixtures of types."""
    found: dict[str, str] = {}
    for name, case in ALL_CASES:
        for rounding, dtype in (
            ("nearest", torch.float64),
            ("nearest", torch.float32),
            ("nearest", torch.float16),
            ("kahan", torch.bfloat16),
            ("stochastic", torch.bfloat16),
        ):
            params = [nn.Parameter(torch.ones(2, 2, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
            options = {**reference.cases(name)[case], "rounding": rounding}
            optimizer = OPTIMIZERS[name].create(params, engine="eager", **options)
            planner = optimizer._stepper.planner
            copies: dict[Tensor, Tensor] = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in params}
            for planned in planner.build(planner.members(params), params, copies if case == "default" else None):
                source = CPrinter(planned.bucket.update.program, planned.bucket.layout).source()
                found.setdefault(source, f"{name}-{case}-{rounding}-{dtype}")
    return {label: source for source, label in found.items()}


@needs_compiler
def test_generated_code_has_no_warnings(tmp_path: Path) -> None:
    """Many kernels in one file each, as the compiler's start is most of its time for one."""
    compiler = toolchains.find_toolchain().compiler
    paths = []
    for number, (label, source) in enumerate(sources().items()):
        paths.append(tmp_path / f"{number}.c")
        paths[-1].write_text(f"/* {label} */\n{source}")
    assert len(paths) > 50
    flags = ["-std=gnu11", "-fopenmp", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run([compiler, *flags, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]


def test_generated_code_is_the_same_in_every_run() -> None:
    assert sources() == sources()


def printer(program: Program, dtype: torch.dtype = torch.float32) -> CPrinter:
    return CPrinter(program, Layout(dtype, tuple((name, dtype) for name in program.tensors)))


def test_every_operation_has_its_templates() -> None:
    reductions = {op.name for op in ops.OPS.values() if op.result == "reduction"}
    rounding = {"round_to", "stochastic_round"}  # elements only
    assert set(CPrinter.scalar_templates) == set(ops.OPS) - rounding
    assert set(CPrinter.element_templates) == set(ops.OPS) - reductions - {"noise_key"}
    assert set(CPrinter.accumulate_templates) == reductions


def test_values_have_a_kind() -> None:
    def rule(p: Any, g: Any, lr: Any, seed: Any) -> dict[str, Any]:
        keys = [ops.noise_key(seed, 0.0, 1.0, salt) for salt in range(2)]
        key = ops.where(lr > 0, *keys)
        mask = ops.where(lr > 0, g > 0, p > 0)
        return {"p": ops.stochastic_round(p * mask + ops.where(mask, p, g > 0), key) * ops.mean(mask)}

    program = trace(rule, tensors=("p", "g"), scalars=("lr", "seed"))
    c = printer(program)
    kinds = [(node.op, c.kind(node)) for node in program.nodes]
    assert sorted(kind for op, kind in kinds if op == "where") == ["bool", "key", "number"]
    assert {kind for op, kind in kinds if op == "gt"} == {"bool"}
    assert {kind for op, kind in kinds if op == "noise_key"} == {"key"}
    assert {kind for op, kind in kinds if op not in ("where", "gt", "noise_key")} == {"number"}
    # A key that was selected keeps its 32 bits.
    selected = next(i for i, node in enumerate(program.nodes) if c.kind(node) == "key" and node.op == "where")
    assert f"const uint32_t s{selected} = (uint32_t)w[{c.work_slots[selected]}];" in c.source()


def test_what_passes_accumulate_and_hand_on() -> None:
    def rule(p: Any, g: Any, lr: Any, step: Any) -> dict[str, Any]:
        half = lr * 0.5
        scaled = p / (ops.norm(p) + half)
        return {"p": scaled * ops.sum(scaled) * ops.mean(g) * half, "return": [ops.norm(g) * step]}

    program = trace(rule, tensors=("p", "g"), scalars=("lr", "step"))
    c = printer(program)
    first, second, last = program.passes
    squares, sums = c.accumulated(first), c.accumulated(second)
    nodes = program.nodes
    assert {nodes[i].op: text for i, text in squares if nodes[nodes[i].args[0]].attr("name") == "g"} == {
        "mean": f"(double){c.name(nodes[squares[-1][0]].args[0])}",
        "norm": "(double)v1 * (double)v1",
    }
    assert [(nodes[i].op, text) for i, text in sums] == [("sum", f"(double)v{nodes[sums[0][0]].args[0]}")]
    assert c.accumulated(last) == []
    assert c.reductions == len(squares) == 3
    assert [c.reduced_before(stage) for stage in range(3)] == [(), first.reductions, second.reductions]
    assert [nodes[i].op for i in c.earlier_scalars(first)] == []
    assert [nodes[i].op for i in c.earlier_scalars(second)] == ["scalar", "mul"]  # step; and half, for norm(p) + half
    assert c.table_scalars == ["lr"]
    assert list(c.work_slots.values()) == list(range(len(c.work_slots)))


# ---------------------------------------------------------------- which engine, and why


def test_an_unknown_engine_is_named_with_the_valid_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_OPTIM_ENGINE", raising=False)
    with pytest.raises(ValueError, match="engine='cuda' is not an engine; valid: auto, eager, foreach, host"):
        SGDOptim([nn.Parameter(torch.ones(1))], engine="cuda")
    monkeypatch.setenv("LIGHTNING_OPTIM_ENGINE", "gpu")
    message = (
        "the environment variable LIGHTNING_OPTIM_ENGINE='gpu' is not an engine; valid: auto, eager, foreach, host"
    )
    with pytest.raises(ValueError, match=message):
        SGDOptim([nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
def test_the_environment_overrides_the_argument(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_OPTIM_ENGINE", engine)
    assert run(engine="eager")[1].engine_report().count(f": {engine} (requested)") == 2
    monkeypatch.setenv("LIGHTNING_OPTIM_ENGINE", "")  # set, but empty: as if it were not
    assert run(engine="eager")[1].engine_report().count(": eager (requested)") == 2


@needs_compiler
def test_the_report_says_before_and_after_the_first_step_what_runs(fresh: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 4)[:, :2]), nn.Parameter(torch.ones(2).double())]
    optimizer = AdamWOptim(params)
    before = optimizer.engine_report()
    assert not optimizer.state, "a report is not a step"
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.engine_report() == before
    lines = before.splitlines()
    kinds = "(p float32, g float32, exp_avg float32, exp_avg_sq float32)"
    assert lines[0] == f"AdamW, 1 tensors on cpu {kinds}: host (the fastest that supports it)"
    assert lines[1] == f"AdamW, 1 tensors on cpu {kinds}: foreach (the fastest that supports it)"
    assert lines[2] == "  not host: the weights have gaps or overlaps in memory"
    assert "p float64" in lines[3]
    assert lines[3].endswith("host (the fastest that supports it)")
    # A gradient of another type is another kernel, and the report says so.
    optimizer = AdamWOptim(params[:1])
    optimizer._stepper.step(grads={params[0]: torch.ones(3, dtype=torch.bfloat16)})
    assert "g bfloat16" in optimizer.engine_report()


def test_the_report_on_a_device_without_the_engine(fresh: pytest.MonkeyPatch) -> None:
    optimizer = SGDOptim([nn.Parameter(torch.empty(2, device="meta"))], engine="host")
    if NO_COMPILER is None:
        with pytest.warns(LightningOptimWarning, match="the weights are on meta, not on the CPU"):
            report = optimizer.engine_report()
        assert "foreach (in place of host)\n  not host: the weights are on meta, not on the CPU" in report
    assert "not host" not in SGDOptim([nn.Parameter(torch.empty(2, device="meta"))]).engine_report()


def test_a_type_that_c_has_not_is_passed_over(fresh: pytest.MonkeyPatch) -> None:
    if NO_COMPILER is not None:
        pytest.skip(NO_COMPILER)
    p = nn.Parameter(torch.ones(4))
    optimizer = Lion([p], lr=0.5)
    grad = torch.ones(4).to(torch.float8_e5m2)
    optimizer._stepper.step(grads={p: grad})
    assert p.tolist() == [0.5] * 4
    assert "not host: g is stored as torch.float8_e5m2" in optimizer.engine_report()


# ---------------------------------------------------------------- what is read, and when


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_only_read(name: str, engine: str) -> None:
    options = {"max_grad_norm": 0.1, "maximize": True, "cautious": True, "weight_decay": 0.1, "engine": engine}
    params = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 4).t().to(torch.bfloat16))]
    optimizer = OPTIMIZERS[name].create(params, **{**reference.BASE[name], **options})
    for step in range(3):
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        given = [p.grad for p in params]
        known = [(g, g._version, g.data_ptr(), g.clone()) for g in given if g is not None]
        optimizer.step()
        for p, (g, version, address, value) in zip(params, known, strict=True):
            assert p.grad is g, step
            assert (g._version, g.data_ptr()) == (version, address)
            assert torch.equal(g, value)


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
@pytest.mark.parametrize("moved", ["weight", "gradient", "state"])
def test_memory_that_moved_since_the_last_step_is_found(engine: str, moved: str) -> None:
    ends = []
    for moves in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 40).reshape(5, 8))
        optimizer = AdamWOptim([p], lr=0.1, engine=engine)
        keep: list[Any] = []  # so that nothing is allocated where it was
        for step in range(6):
            grad = torch.linspace(1, 2, 40).reshape(5, 8) * (step + 1)
            if p.grad is None or moved != "gradient" or not moves:
                p.grad = grad
            else:
                keep.append(p.grad)
                p.grad = grad.t().contiguous().t()
            if moves and step >= 3 and moved == "weight":
                keep.append(p.data)
                p.data = p.data.clone() if step % 2 else p.data.t().contiguous().t()
            if moves and step >= 3 and moved == "state":
                state = optimizer.state[p]
                keep.append(dict(state))
                state["exp_avg"] = state["exp_avg"].t().contiguous().t() if step % 2 else state["exp_avg"].clone()
            optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "f64"])
def test_weights_that_change_type_since_the_last_step(engine: str, dtype: torch.dtype) -> None:
    """As ``model.bfloat16()`` or ``model.double()`` after some steps: the state keeps its type, the math follows."""
    p = nn.Parameter(torch.linspace(-1, 1, 40))
    optimizer = LAMB([p], lr=0.1, engine=engine, adapt_1d=True)
    for _ in range(3):
        p.grad = torch.linspace(1, 2, 40)
        optimizer.step()
    p.data = p.data.to(dtype)
    p.grad = torch.linspace(1, 2, 40, dtype=torch.float64).to(dtype)
    before = p.detach().to(torch.float64, copy=True)
    state = {slot: value.double() for slot, value in optimizer.state[p].items()}
    optimizer.step()
    expected, _ = reference.step("lamb", before, p.grad.double(), state, optimizer.param_groups[0])
    # Math in float64 for float64 weights, in float32 otherwise, and then one rounding to the weight's type.
    rtol = 2.0**-8 if dtype == torch.bfloat16 else 1e-13
    torch.testing.assert_close(p.detach().double(), expected, rtol=rtol, atol=rtol)
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
def test_a_gradient_of_a_type_that_the_parameter_allows(engine: str) -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 40))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p.grad_dtype = torch.bfloat16
    q = nn.Parameter(p.detach().clone())
    p.grad = torch.linspace(1, 2, 40).to(torch.bfloat16)
    q.grad = p.grad.float()
    for weight in (p, q):
        AdamWOptim([weight], lr=0.1, engine=engine).step()
    assert torch.equal(p, q)
