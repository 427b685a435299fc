"""Machines: measured, saved, loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from lightning_optim.placement import machine as module
from lightning_optim.placement.machine import Machine

from .common import card


def test_json_round_trip() -> None:
    for known in (card(notes=("from a data sheet",)), Machine.measure("cpu")):
        assert Machine.from_json(known.to_json()) == known
    values = json.loads(card().to_json())
    del values["notes"]
    assert Machine.from_json(json.dumps(values)) == card()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"link_to_host": 0}, "link_to_host=0; valid: a finite number > 0"),
        ({"host_free": -1}, "host_free=-1"),
        ({"devices": True}, "devices=True"),
        ({"host_bandwidth": "fast"}, "host_bandwidth='fast'"),
        ({"device": "tpu"}, "device='tpu'; valid: cpu, cuda"),
        ({"speed": 1}, "'speed' is unknown; valid: device, name, "),
        ({"notes": "one"}, "notes='one'; valid: a list of strings"),
    ],
)
def test_values_that_are_not_valid(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Machine.from_json(json.dumps({**json.loads(card().to_json()), **change}))


def test_files_that_are_no_machine() -> None:
    with pytest.raises(ValueError, match="this is no JSON"):
        Machine.from_json("device: cuda")
    with pytest.raises(ValueError, match="a JSON list; valid: an object"):
        Machine.from_json("[]")
    with pytest.raises(ValueError, match="device_free is missing, host_free is missing"):
        Machine.from_json('{"device": "cpu", "name": "", "devices": 1}')


def test_this_machine() -> None:
    threads = torch.get_num_threads()
    found = Machine.measure("cpu")
    assert torch.get_num_threads() == threads
    assert found.shares_memory
    assert found.device_free == found.host_free > 0
    assert any("stands for the link" in note for note in found.notes)
    # Any memory that is one: from a slow disk's speed to that of the largest servers.
    for rate in (found.host_bandwidth, found.link_to_host, found.link_to_device):
        assert 1e8 < rate < 1e13
    again = Machine.measure("cpu")
    assert (again.host_bandwidth, again.link_to_host) == (found.host_bandwidth, found.link_to_host), "measured once"


def test_the_weakest() -> None:
    least = Machine.weakest([card(device_free=3, link_to_host=9.0), card(device_free=5, link_to_host=7.0)])
    assert least == card(device_free=3, link_to_host=7.0)
    with pytest.raises(ValueError, match=r"device types \['cpu', 'cuda'\]; valid: one type"):
        Machine.weakest([card(), card(device="cpu")])
    with pytest.raises(ValueError, match=r"device types \[\]"):
        Machine.weakest([])


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device='meta'; valid: cpu, cuda"):
        Machine.measure("meta")


def test_threads_are_put_back_when_measuring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: object) -> float:
        raise RuntimeError("no")

    monkeypatch.setenv("LIGHTNING_OPTIM_THREADS", "1")
    monkeypatch.setattr(module, "_fastest", fails)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="no"):
        module._host_bandwidth()
    assert torch.get_num_threads() == threads


def test_nothing_is_measured_at_import() -> None:
    code = (
        "import lightning_optim.placement.choice, lightning_optim.cli.plan\n"
        "from lightning_optim.placement.machine import _speeds\n"
        "print(_speeds.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


@pytest.mark.gpu
def test_a_gpu() -> None:
    found = Machine.measure("cuda")
    assert not found.shares_memory
    assert 0 < found.device_free <= torch.cuda.get_device_properties(0).total_memory
    assert found.device_bandwidth > found.link_to_device > 1e9
    assert found.link_to_host > 1e9
    torch.cuda.empty_cache()
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    taken = Machine.measure("cuda").device_free
    del held
    assert Machine.measure("cuda").device_free >= taken + 2**28, "what the allocator keeps is free"
