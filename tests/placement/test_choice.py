"""The golden rule, on machines that do not exist."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import pytest
import torch
from foreign import Foreign

import lightning_optim
from lightning_optim import AdamW, Lion
from lightning_optim.placement.choice import PlacementError, Plan, choose, fall_back
from lightning_optim.placement.footprint import Footprint, Maker, footprint
from lightning_optim.placement.machine import Machine
from lightning_optim.placement.needs import Conditions

from .common import GIB, card, weights


def bf16(count: float, make: Maker = AdamW) -> Footprint:
    return footprint(weights(count, torch.bfloat16), make)


def refused(needed: Footprint, machine: Machine, conditions: Conditions | None = None) -> str:
    with pytest.raises(PlacementError) as caught:
        choose(needed, machine, conditions)
    return str(caught.value)


def test_in_graph_by_default() -> None:
    plan = choose(bf16(1e9), card())
    assert plan.placement == "in_graph"
    assert plan["in_graph"].fits
    assert plan["detached"].fits
    assert "19.2 GiB of the device's memory (room for 72.0 GiB)" in plan.reason


def test_detached_where_the_state_does_not_fit() -> None:
    plan = choose(bf16(7e9), card())
    assert plan.placement == "detached"
    assert not plan["in_graph"].fits
    assert "state 52.2 = 86.2 GiB of device memory, and there is room for 72.0 GiB" in plan.reason
    assert "104.3 GiB of the host's (room for 230.4 GiB)" in plan.reason


def test_the_border_is_the_margin() -> None:
    needed, nothing = bf16(1e9), Conditions(activation_bytes=0)
    size = 12 * 10**9 + 4
    assert choose(needed, card(device_free=int(size / 0.9) + 2), nothing).placement == "in_graph"
    assert choose(needed, card(device_free=int(size / 0.9) - 2), nothing).placement == "detached"


@pytest.mark.parametrize("name", ["in_graph", "detached"])
def test_measured_times_decide_where_both_fit(name: Any) -> None:
    other: Any = "detached" if name == "in_graph" else "in_graph"
    plan = choose(bf16(1e9), card(), measured={name: 0.010, other: 0.012})
    assert plan.placement == name
    assert "10 ms" in plan.reason
    assert "12 ms" in plan.reason


def test_measured_times_do_not_make_room() -> None:
    assert choose(bf16(7e9), card(), measured={"in_graph": 0.1, "detached": 0.2}).placement == "detached"
    small = card(host_free=GIB)
    assert choose(bf16(1e9), small, measured={"in_graph": 0.2, "detached": 0.1}).placement == "in_graph"


@pytest.mark.parametrize("measured", [{"in_graph": 1.0}, {"in_graph": 1.0, "detached": 0.0}, {"cloud": 1.0}])
def test_measured_times_that_are_not_valid(measured: Any) -> None:
    with pytest.raises(ValueError, match="valid: seconds > 0 for in_graph and detached"):
        choose(bf16(1e9), card(), measured=measured)


def test_a_history_goes_to_the_host_however_large_the_device_is() -> None:
    needed = footprint(weights(1e6), torch.optim.LBFGS)
    plan = choose(needed, card())
    assert plan.placement == "detached"
    assert "100 past steps, 200 vectors" in plan.reason
    assert "in_graph does not fit" not in plan.reason


def test_float64_masters_are_on_the_host() -> None:
    params = weights(1e6)
    assert choose(footprint(params, AdamW, master_dtype=torch.float64), card()).placement == "detached"
    wide = weights(1e6, torch.float64)
    assert choose(footprint(wide, AdamW, master_dtype=torch.float64), card()).placement == "in_graph"


def test_what_would_fit_is_computed() -> None:
    # 4 + 8 + 2 + 2 bytes a weight on the host: 149 GiB. Less state, or more processes, and it fits.
    needed = bf16(10e9)
    message = refused(needed, card(host_free=140 * GIB))
    assert "in_graph: weights 18.6 + gradients 18.6 + a reserve for activations 8.0 + state 74.5 = 119.8 GiB" in message
    assert "= 149.0 GiB of host memory, and there is room for 126.0 GiB" in message
    remedies = message.splitlines()[3].removeprefix("it would fit with: ").split("; or ")
    assert remedies == [
        "lightning_optim's state_dtype='bfloat16'",
        "lightning_optim's Lion",
        "2 ranks with sharding='ddp' on 2 machines like this one",
        "2 ranks with sharding='fsdp2' on 2 machines like this one",
    ]
    # Each of these is true.
    machine = card(host_free=140 * GIB)
    assert choose(bf16(10e9, partial(AdamW, state_dtype="bfloat16")), machine).placement == "detached"
    assert choose(bf16(10e9, Lion), machine).placement == "detached"
    for sharding in ("ddp", "fsdp2"):
        more: Any = {"ranks": 2, "local_ranks": 1, "sharding": sharding}
        assert choose(needed, machine, Conditions(**more))["detached"].fits


def test_as_few_ranks_as_will_do() -> None:
    needed, machine = bf16(30e9), card(devices=8, host_free=1024 * GIB)
    message = refused(needed, machine)
    assert message.count("ranks with sharding") == 1, "DDP would not divide the weights"
    found = re.search(r"(\d+) ranks with sharding='fsdp2' on this machine", message)
    assert found is not None
    count = int(found[1])
    choose(needed, machine, Conditions(ranks=count, sharding="fsdp2"))
    assert count == 2
    shorter = card(devices=8, host_free=1024 * GIB, device_free=40 * GIB)
    assert "4 ranks with sharding='fsdp2'" in refused(needed, shorter)
    refused(needed, shorter, Conditions(ranks=2, sharding="fsdp2"))


def test_one_change_hides_the_same_with_another() -> None:
    assert refused(bf16(10e9), card(host_free=140 * GIB)).count("state_dtype") == 1
    both = refused(bf16(10e9), card(host_free=105 * GIB))
    assert "lightning_optim's Lion and lightning_optim's state_dtype='bfloat16'" in both


def test_a_shorter_history_is_named() -> None:
    needed = footprint(weights(1e9), torch.optim.LBFGS)
    message = refused(needed, card())
    found = re.search(r"history_size=(\d+)", message)
    assert found is not None
    longest = int(found[1])
    fits = footprint(weights(1e9), partial(torch.optim.LBFGS, history_size=longest))
    assert choose(fits, card()).placement == "detached"
    refused(footprint(weights(1e9), partial(torch.optim.LBFGS, history_size=longest + 1)), card())
    assert "ranks" not in message, "a history is of all weights together"


def test_where_nothing_helps_it_says_so() -> None:
    message = refused(footprint(weights(1e15), lightning_optim.SGD), card())
    assert "only a smaller model or a larger machine" in message


def test_clip_modes() -> None:
    needed = bf16(1e9)
    assert choose(needed, card()).clip == "none"
    assert choose(needed, card(), Conditions(clips=True)).clip == "exact"
    assert choose(bf16(1e9, partial(AdamW, max_grad_norm=1.0)), card()).clip == "exact"
    assert choose(bf16(1e8, Foreign), card()).clip == "exact", "its own step has no other"
    long, short = Conditions(clips=True, backward_seconds=1.0), Conditions(clips=True, backward_seconds=0.01)
    assert choose(needed, card(), long).clip == "speculative", "all of it hides behind the backward pass"
    assert choose(needed, card(), short).clip == "exact", "nothing does, and its pass is the longer one"
    assert choose(needed, card(host_free=20 * GIB), long).clip == "exact", "there is no room for a second copy"


def test_no_step_is_taken_back_that_cannot_be() -> None:
    long = Conditions(clips=True, backward_seconds=1.0)
    assert choose(bf16(1e9, lightning_optim.Muon), card(), long).clip == "exact"
    assert choose(bf16(1e9), card(devices=2), Conditions(clips=True, backward_seconds=1.0, ranks=2)).clip == "exact"
    assert choose(bf16(1e9), card(devices=2), Conditions(ranks=2)).clip == "exact"


def test_falling_back() -> None:
    plan = choose(bf16(1e9), card())
    after = fall_back(plan, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it"))
    assert after.placement == "detached"
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in after.reason
    assert "More of it" not in after.reason
    assert "frees 7.5 GiB of the device" in after.reason
    assert after.rows == plan.rows
    with pytest.raises(PlacementError, match=r"in host memory already .*1\.9 GiB for weights, 1\.9 GiB for gradients"):
        fall_back(after, torch.OutOfMemoryError("again"))
    with pytest.raises(PlacementError, match=r"the host has no room for a detached step: masters 3\.7"):
        fall_back(choose(bf16(1e9), card(host_free=GIB)), torch.OutOfMemoryError("once"))


def test_notes_say_what_was_not_counted() -> None:
    def notes(conditions: Conditions | None = None, make: Maker = AdamW, **machine: Any) -> str:
        return "\n".join(choose(bf16(1e8, make), card(**machine), conditions).notes)

    assert "activations are not counted: 10%" in notes()
    assert "activations" not in notes(Conditions(activation_bytes=1))
    assert "least times" in notes(make=Foreign)
    assert "least times" not in notes()
    assert "dry step" in notes(make=Foreign)
    assert "matrix products" in notes(make=lightning_optim.Muon)
    assert "no accelerator" in notes(device="cpu")
    assert "gathered layers" in notes(Conditions(ranks=2, sharding="fsdp2"))
    assert "evaluations of the loss" in notes(make=torch.optim.LBFGS)
    assert "from a data sheet" in notes(notes=("from a data sheet",))


def test_table_and_json() -> None:
    plan = choose(bf16(7e9), card(), Conditions(clips=True, backward_seconds=0.5))
    head, in_graph, detached = plan.table()
    assert len(head) == len(in_graph) == len(detached)
    assert in_graph[0] == "in_graph"
    assert in_graph[-1] == "no"
    assert detached[1:5] == ["34.1 GiB", "72.0 GiB", "104.3 GiB", "230.4 GiB"]
    assert detached[-1] == "yes"
    loaded = json.loads(json.dumps(plan.as_dict()))
    assert loaded["placement"] == "detached"
    assert loaded["reason"] == plan.reason
    assert loaded["rows"][0]["lacks"] == plan["in_graph"].lacks
    assert loaded["rows"][1]["host_bytes"] == plan["detached"].host_bytes
    assert loaded["rows"][1]["exposed_seconds"].keys() == {"exact", "speculative", "none"}
    assert Machine.from_json(json.dumps(loaded["machine"])) == plan.machine
    assert isinstance(plan, Plan)
