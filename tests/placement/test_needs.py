"""What placements need of a machine: memory for each process, and times."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from foreign import Foreign

from lightning_optim import SGD, AdamW
from lightning_optim.placement.footprint import footprint
from lightning_optim.placement.needs import ACTIVATION_RESERVE, MARGIN, Conditions, Needs, Placement, needs

from .common import GIB, card, weights

N = 10**9
BF16 = footprint(weights(N, torch.bfloat16), AdamW)
F32 = footprint(weights(N), AdamW)


def of(placement: Placement, /, clip: Any = "exact", footprint: Any = BF16, machine: Any = None, **how: Any) -> Needs:
    return needs(placement, footprint, machine or card(), Conditions(activation_bytes=GIB, **how), clip)


def test_memory_of_one_process() -> None:
    in_graph = of("in_graph")
    assert in_graph.device == {"weights": 2 * N, "gradients": 2 * N, "activations": GIB, "state": 8 * N + 4}
    assert in_graph.host == {}
    detached = of("detached")
    assert detached.device == {"weights": 2 * N, "gradients": 2 * N, "activations": GIB}
    assert detached.host == {
        "masters": 4 * N,
        "state": 8 * N + 4,
        "pinned gradients": 2 * N,
        "pinned weights": 2 * N,
    }
    assert "pinned weights" not in of("detached", footprint=F32).host, "masters of the same type leave as they are"
    assert of("detached", accumulates=True).host["sums of gradients"] == 4 * N


def test_speculative_has_masters_and_state_twice() -> None:
    exact, speculative = of("detached"), of("detached", "speculative")
    assert speculative.host_bytes - exact.host_bytes == 4 * N + 8 * N + 4


def test_ddp_divides_masters_and_state_only() -> None:
    in_graph, detached = (of(placement, ranks=4) for placement in ("in_graph", "detached"))
    assert in_graph.device["state"] == 8 * N + 4, "each replica has all of it"
    assert in_graph.device["DDP's gradient buckets"] == 2 * N
    assert detached.device["weights"] == 2 * N
    assert detached.host == {
        "masters": N,
        "state": 2 * N + 1,
        "pinned gradients": N // 2,
        "pinned weights": N // 2,
    }


def test_fsdp2_divides_everything() -> None:
    in_graph, detached = (of(placement, ranks=4, sharding="fsdp2") for placement in ("in_graph", "detached"))
    divided = {"weights": N // 2, "gradients": N // 2, "activations": GIB}
    assert in_graph.device == {**divided, "state": 2 * N + 1}
    assert detached.device == divided
    assert detached.host["masters"] == N


def test_processes_of_one_host_share_it() -> None:
    machine = card(devices=4)
    alone, four, spread = (of("detached", machine=machine, **how) for how in ({}, {"ranks": 4}, {"ranks": 8}))
    assert four.host_room == spread.host_room == alone.host_room // 4
    pairs = of("detached", machine=machine, ranks=8, local_ranks=2)
    assert pairs.host_room == alone.host_room // 2
    # A quarter of the work, a quarter of the bandwidth, and a link for each.
    assert of("detached", machine=machine, ranks=4, backward_seconds=0.0).arithmetic[1].endswith("= 280 ms")
    assert four.arithmetic[0].endswith("= 25 ms")


def test_the_margin_and_the_reserve() -> None:
    row = needs("in_graph", BF16, card(), Conditions())
    assert row.device_room == int(80 * GIB * (1 - MARGIN))
    assert row.device["a reserve for activations"] == int(80 * GIB * ACTIVATION_RESERVE)
    assert row.host_room == int(256 * GIB * (1 - MARGIN))


def test_what_is_there_already_is_not_free_but_counted() -> None:
    row = needs("in_graph", BF16, card(device_free=78 * GIB), Conditions(activation_bytes=0, resident_bytes=2 * GIB))
    assert row.device_room == of("in_graph").device_room


def test_times() -> None:
    assert of("in_graph").step_seconds == pytest.approx(22 * N / 2e12)
    assert of("in_graph", clips=True).step_seconds == pytest.approx(24 * N / 2e12)
    clipping = footprint(weights(N, torch.bfloat16), partial(AdamW, max_grad_norm=1.0))
    assert of("in_graph", footprint=clipping).step_seconds == pytest.approx(24 * N / 2e12)
    detached = of("detached", "none")
    buckets = -(-2 * N // (32 * 10**6))
    up, on_host, down = 2 * N / 2e10, 28 * N / 1e11, 2 * N / 2.5e10
    assert detached.step_seconds == pytest.approx(on_host + (up + down) / buckets)
    assert detached.exposed_seconds is None
    assert of("detached").step_seconds == pytest.approx(up + on_host + down / buckets), "the norm comes first"
    hidden = of("detached", backward_seconds=1.0)
    assert hidden.exposed_seconds is not None
    assert hidden.exposed_seconds["none"] == pytest.approx((up + on_host + down) / buckets)
    assert hidden.exposed_seconds["exact"] == pytest.approx(up / buckets + on_host + down / buckets)
    in_graph = of("in_graph", backward_seconds=1.0)
    assert in_graph.exposed_seconds == dict.fromkeys(("exact", "speculative", "none"), in_graph.step_seconds)


def test_the_arithmetic_is_shown() -> None:
    assert of("in_graph", clips=True).arithmetic == (
        "in_graph: 22 GB moved + 2 GB to read the gradients for their norm / 2000 GB/s = 12 ms",
    )
    shown = of("detached").arithmetic
    assert shown[:3] == (
        "detached: gradients to the host: 2 GB / 20 GB/s = 100 ms",
        "detached: the host's pass: 28 GB / 100 GB/s = 280 ms",
        "detached: weights to the device: 2 GB / 25 GB/s = 80 ms",
    )
    assert shown[3] == (
        "detached: in a pipeline of 63 buckets: the slowest, and one bucket's fill of 2.86 ms = 283 ms (one after the "
        "other: 460 ms); clip='exact': 381 ms, as all gradients come before it"
    )
    assert "clip" not in of("detached", "none").arithmetic[3]
    assert "a pipeline of 2 buckets" in of("detached", bucket_bytes=10**9).arithmetic[3]


def test_between_processes_nothing_is_hidden() -> None:
    one, two = (of("detached", backward_seconds=10.0, ranks=ranks) for ranks in (1, 2))
    assert one.exposed_seconds is not None
    assert set(one.exposed_seconds) == {"exact", "speculative", "none"}
    assert one.exposed_seconds["none"] < 0.01
    assert two.exposed_seconds == {"exact": pytest.approx(two.step_seconds)}


def test_a_step_of_its_own_is_one_after_the_other() -> None:
    own = footprint(weights(N, torch.bfloat16), Foreign)
    row = of("detached", footprint=own, backward_seconds=10.0)
    stages = [float(line.rpartition(" = ")[2].removesuffix(" ms")) / 1e3 for line in row.arithmetic[:3]]
    assert row.step_seconds == pytest.approx(sum(stages), rel=0.01)
    assert row.exposed_seconds == {"exact": pytest.approx(stages[1] + stages[2], rel=0.02)}, "gradients come early"
    divided = of("detached", footprint=own, ranks=4)
    assert divided.host["masters"] == 4 * N, "every process has all masters"
    assert of("detached", footprint=own, ranks=4, sharding="fsdp2").host["masters"] == N


def test_on_a_cpu_there_is_one_memory() -> None:
    machine = card(device="cpu", device_free=32 * GIB, host_free=32 * GIB)
    in_graph, detached = (of(placement, machine=machine, footprint=F32) for placement in ("in_graph", "detached"))
    assert in_graph.fits, "16 GB and activations"
    assert detached.lacks is None, "24 GB and activations"
    two = {"machine": machine, "footprint": F32, "ranks": 2}
    assert of("in_graph", **two).lacks is not None, "both processes are on this host"


def test_what_is_lacking_has_its_arithmetic() -> None:
    assert of("in_graph", machine=card(device_free=10 * GIB)).lacks == (
        "weights 1.9 + gradients 1.9 + activations 1.0 + state 7.5 = 12.2 GiB of device memory, and there is room "
        "for 9.0 GiB"
    )
    lacks = of("detached", machine=card(host_free=10 * GIB)).lacks
    assert lacks is not None
    assert lacks.endswith("= 14.9 GiB of host memory, and there is room for 9.0 GiB")
    assert of("detached", footprint=footprint(weights(N), SGD), machine=card(host_free=10 * GIB)).fits


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": 0}, "ranks=0; valid: a whole number >= 1"),
        ({"ranks": 2.5}, "ranks=2.5"),
        ({"ranks": 2, "local_ranks": 3}, "local_ranks=3 of ranks=2; valid: 1 to 2"),
        ({"sharding": "zero"}, "sharding='zero'; valid: ddp, fsdp2"),
        ({"activation_bytes": -1}, "activation_bytes=-1"),
        ({"backward_seconds": float("nan")}, "backward_seconds=nan"),
        ({"bucket_bytes": 0}, "bucket_bytes=0"),
    ],
)
def test_conditions_that_are_not_valid(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conditions(**values)


def test_an_unknown_placement() -> None:
    with pytest.raises(ValueError, match="placement='cloud'; valid: in_graph, detached"):
        needs("cloud", BF16, card(), Conditions())  # type: ignore[arg-type]
