"""The number of threads: where it comes from, and that it changes nothing but the speed."""

from __future__ import annotations

import os
import re

import pytest
import references
import torch
from torch import nn

from lightning_optim.engines.base import Layout
from lightning_optim.engines.compiled import NORM
from lightning_optim.engines.host.engine import CHUNK, SERIAL_ELEMENTS, _divide
from lightning_optim.engines.host.printer import CPrinter
from lightning_optim.engines.host.threads import thread_count
from lightning_optim.registry import OPTIMIZERS

from .common import assert_same, needs_compiler


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


@pytest.mark.parametrize(
    "value", ["0", "-1", "two", "1.5", " ", " 2 ", "+2", "٣", "²", "1025", "1000000000", "9" * 5000]
)
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


@references.common_to_all
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
        options = {**references.BASE[name], "max_grad_norm": 0.1, "rounding": rounding}
        if "cautious" in OPTIMIZERS[name].options:
            options["cautious"] = True
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


@needs_compiler
def test_denormal_numbers_are_flushed_by_all_threads_or_none(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.set_flush_denormal has it in the calling thread: the others are not told."""
    ends = {}
    for flush in (True, False):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor does not flush them")
        try:
            for threads in (1, 3):
                monkeypatch.setenv("LIGHTNING_OPTIM_THREADS", str(threads))
                p = nn.Parameter(torch.zeros(4 * SERIAL_ELEMENTS))
                optimizer = OPTIMIZERS["sgd"].create([p], lr=0.5, engine="host")
                p.grad = torch.full_like(p, 1.5e-38)
                optimizer.step()
                torch.set_flush_denormal(False)
                ends[flush, threads] = (p.detach().double() * -1e38).unique().tolist()
                torch.set_flush_denormal(flush)
        finally:
            torch.set_flush_denormal(False)
    assert ends[True, 1] == ends[True, 3] == [0.0]
    assert ends[False, 1] == ends[False, 3] == [pytest.approx(0.75, rel=1e-5)]


def test_an_invalid_number_of_processes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_OPTIM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE='many'; valid: a positive integer"):
        thread_count()


def test_an_invalid_number_of_threads_is_told_when_the_optimizer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_OPTIM_THREADS", "1000000000")
    with pytest.raises(ValueError, match="LIGHTNING_OPTIM_THREADS='1000000000'; valid: a positive integer up to 1024"):
        OPTIMIZERS["sgd"].create([nn.Parameter(torch.ones(1))])


def test_no_array_on_the_stack_is_sized_by_a_number_of_threads() -> None:
    source = CPrinter(NORM, Layout(torch.float32, (("g", torch.float32),))).source()
    declared = re.findall(r"^ *\w+ \w+\[(.*)\](?: = .*)?;", source, re.MULTILINE)
    assert declared
    assert all(size.isdecimal() for size in declared)
