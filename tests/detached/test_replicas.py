"""Masters and state divided over processes: replicas, which have the same weights, and shards, which have parts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RANKS, launch, leave
from torch import Tensor, nn

from lightning_optim.engines.scaling import LossScale
from lightning_optim.offload import Detached, DetachedOptions
from lightning_optim.offload.checkpoint import gathered_masters, gathered_state, own_entries
from lightning_optim.offload.replicas import Replicas

from .common import PAIRS, bits, known_warnings, loss_of, small, weights

pytestmark = known_warnings

NAMES = ("torch AdamW", "sgd, dampening", "lamb", "adafactor", "muon", "prodigy", "foreign")
MAKES: dict[str, Any] = {name: PAIRS[name][0] for name in NAMES}


def strange() -> list[nn.Parameter]:
    """Some whose memory is not in order, has gaps or is complex, or has no elements."""
    w = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    return [nn.Parameter(p) for p in (w.t(), w.clone()[:, ::2], torch.complex(w, w), w[:0], w.clone().bfloat16()[0])]


def train(pipeline: Detached, params: list[nn.Parameter], begin: int, end: int, absent: Any = ()) -> list[float]:
    norms = []
    for step in range(begin, end):
        loss_of(params, step, absent=absent).backward()
        pipeline.step(max_grad_norm=20.0)
        assert pipeline.scaling is not None
        norm = pipeline.scaling.norm()
        norms.append(None if norm is None else norm.item())
        pipeline.zero_grad()
    return norms  # type: ignore[return-value]


def result(pipeline: Detached, optimizer: Any, params: list[nn.Parameter], norms: list[float]) -> dict[str, Any]:
    divided = pipeline.replicas is not None
    state = gathered_state(pipeline, optimizer) if divided else optimizer.state_dict()
    masters = gathered_masters(pipeline, {p: str(number) for number, p in enumerate(params)})
    return {"weights": [p.detach() for p in params], "state": state["state"], "masters": masters, "norms": norms}


def case(make: Any, params: list[nn.Parameter], replicas: Replicas | None, *, overlap: bool, bucket_mb: float) -> Any:
    """Train, save, load into another, and go on."""
    absent = (1,) if len(params) == 6 else ()
    optimizer = make(params)
    pipeline = Detached(optimizer, small(bucket_mb=bucket_mb), replicas=replicas, overlap=overlap)
    norms = train(pipeline, params, 0, 3, absent)
    saved = result(pipeline, optimizer, params, [])
    state = {**optimizer.state_dict(), "state": saved["state"]}
    pipeline.close()
    params = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    optimizer = make(params)
    pipeline = Detached(optimizer, small(bucket_mb=bucket_mb), replicas=replicas, overlap=overlap)
    with pipeline.masters_in_place():
        optimizer.load_state_dict(state if replicas is None else own_entries(pipeline, optimizer, state))
    values: dict[Tensor, Tensor] = {params[int(name)]: value for name, value in saved["masters"].items()}
    assert pipeline.set_masters(values) == []
    norms += train(pipeline, params, 3, 5, absent)
    before = [p.detach().clone() for p in params]
    # An overflow in one process's share is left out by all.
    (loss_of(params, 5) + params[0].real.sum() * float("inf")).backward()
    found = torch.zeros(())
    pipeline.step(loss=LossScale(torch.tensor(1.0), found))
    assert found.item() == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    pipeline.zero_grad()
    end = result(pipeline, optimizer, params, norms)
    pipeline.close()
    return end


def cases(divided: bool) -> dict[str, Any]:
    replicas = Replicas() if divided else None
    found: dict[str, Any] = {}
    for name, make in MAKES.items():
        for overlap in (True, False):
            key = f"{name}, {overlap=}"
            found[key] = case(make, weights(), replicas, overlap=overlap, bucket_mb=1e-6)
    make = MAKES["torch AdamW"]
    found["memory in other orders"] = case(make, strange(), replicas, overlap=True, bucket_mb=1e-6)
    # One bucket, and two processes.
    one = weights(shapes=[(40, 3)])
    found["empty shards"] = case(make, one, replicas, overlap=False, bucket_mb=1.0)
    return found


def sharded(folder: Path, rank: int) -> None:
    """DTensors: each process has its part of each master, and none of some."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    for name, make in (MAKES | {"schedule-free": PAIRS["schedule-free"][0]}).items():
        whole = weights(torch.float32, [(5, 4), (3,), (1, 6)])
        params = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
        optimizer: Any = make(params)
        stock: Any = PAIRS[name][1](whole)
        pipeline = Detached(optimizer, small(bucket_mb=1e-6), overlap=False)
        for step in range(4):
            loss_of(whole, step).backward()
            for p, q in zip(params, whole, strict=True):
                assert q.grad is not None
                p.grad = distribute_tensor(q.grad.clone(), mesh, [Shard(0)])
            norm = nn.utils.clip_grad_norm_(whole, 10.0)
            stock.step()
            stock.zero_grad()
            pipeline.step(max_grad_norm=10.0)
            assert pipeline.scaling is not None
            assert (pipeline.scaling.norm() or torch.zeros(())).item() == pytest.approx(norm.item(), rel=1e-6)
            pipeline.zero_grad()
        if name == "schedule-free":
            before = [p.full_tensor().detach().clone() for p in params]  # type: ignore[attr-defined]
            optimizer.eval()
            optimizer.train()
            assert all(torch.equal(p.full_tensor(), b) for p, b in zip(params, before, strict=True))  # type: ignore[attr-defined]
            optimizer.eval()
            stock.eval()
        for p, q in zip(params, whole, strict=True):
            full: Tensor = p.full_tensor()  # type: ignore[attr-defined]
            torch.testing.assert_close(full, q, rtol=1e-5, atol=3e-4 if name == "muon" else 1e-6)
        pipeline.close()
    # Masters of all processes, given as a whole.
    low = [nn.Parameter(distribute_tensor(w.detach().bfloat16(), mesh, [Shard(0)])) for w in weights(shapes=[(5, 4)])]
    with_bits = low[0].full_tensor().detach().float() * (1 + 1e-4)  # type: ignore[attr-defined]
    pipeline = Detached(torch.optim.AdamW(low), DetachedOptions())
    assert pipeline.set_masters({low[0]: with_bits}) == []
    assert torch.equal(gathered_masters(pipeline, {low[0]: "w"})["w"], with_bits)
    pipeline.close()
    with pytest.raises(ValueError, match=r"ScheduleFreeAdamW with replicated weights: its eval.*'detached_fsdp2'"):
        Detached(PAIRS["schedule-free"][0](whole), replicas=Replicas())
    (folder / f"sharded {rank}").touch()


def _rank(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.pop("LIGHTNING_OPTIM_ENGINE", None)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save(cases(True), folder / f"{rank}.pt")
    sharded(folder, rank)
    leave()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(_rank, tmp_path_factory.mktemp("replicas"))


def test_divided_masters_give_the_steps_of_one_process(ended: Path) -> None:
    expected = cases(False)
    both = [torch.load(ended / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for found in both:
        assert found.keys() == expected.keys()
        for name, run in expected.items():
            other = found[name]
            assert other["norms"] == pytest.approx(run["norms"], rel=1e-12), name
            for p, q in zip(other["weights"], run["weights"], strict=True):
                assert torch.equal(bits(p), bits(q)), name
            assert other["masters"].keys() == run["masters"].keys()
            assert all(torch.equal(other["masters"][key], run["masters"][key]) for key in run["masters"]), name
            assert other["state"].keys() == run["state"].keys(), name
            for key, values in run["state"].items():
                assert values.keys() == other["state"][key].keys()
                for slot, value in values.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][key][slot])), (name, slot)


def test_parameters_that_are_divided(ended: Path) -> None:
    assert all((ended / f"sharded {rank}").exists() for rank in range(RANKS))


def test_every_process_gets_its_share() -> None:
    from lightning_optim.offload.buckets import OffloadBucket, Place

    buckets = [OffloadBucket(str(n), [Place(torch.zeros(size), 0, n, n)]) for n, size in enumerate((1, 5, 3, 3, 0))]
    replicas = Replicas.__new__(Replicas)
    replicas.rank, replicas.world = 1, 3
    replicas.assign(buckets)
    assert [bucket.rank for bucket in buckets] == [1, 0, 1, 2, 2]
    assert [bucket.mine for bucket in buckets] == [True, False, True, False, False]
