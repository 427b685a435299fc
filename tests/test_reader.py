"""Tensors read by one call of DLPack's C functions are what they say one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_optim
from lightning_optim.engines.host import reader
from lightning_optim.engines.host.engine import HostEngine
from lightning_optim.engines.host.toolchain import ToolchainError, find_toolchain
from lightning_optim.engines.memory import Reading, read


def _has_reader() -> bool:
    try:
        find_toolchain()
    except ToolchainError:
        return False
    return hasattr(Tensor, "__dlpack_c_exchange_api__")


needs_reader = pytest.mark.skipif(not _has_reader(), reason="no C compiler, or a torch without DLPack's C functions")

TENSORS: dict[str, Tensor] = {
    "plain": torch.zeros(3, 4),
    "transposed": torch.zeros(3, 4).t(),
    "parameter": torch.nn.Parameter(torch.zeros(4, 5)),
    "offset": torch.zeros(5)[1:],
    "stepped": torch.zeros(8)[::2],
    "scalar": torch.zeros(()),
    "empty": torch.zeros(0, 3),
    "bfloat16": torch.zeros(3, 4, dtype=torch.bfloat16),
    "float16": torch.zeros(3, 4, dtype=torch.float16),
    "float64": torch.zeros(3, 4, dtype=torch.float64),
    "one more dimension": torch.zeros(1, 3, 4),
    "channels_last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "many dimensions": torch.zeros((1,) * 12),
}


def native(tensors: list[Any]) -> Reading:
    function = reader.native_reader()
    assert function is not None
    return function(tensors)


@needs_reader
def test_addresses_are_those_of_data_ptr() -> None:
    tensors = list(TENSORS.values())
    assert native(tensors).addresses.tolist() == [t.data_ptr() for t in tensors]
    assert native([]).addresses.tolist() == []


@needs_reader
@pytest.mark.parametrize("function", [native, read])
def test_forms_tell_every_two_kinds_of_tensor_apart(function: Any) -> None:
    forms = [function([t]).forms for t in TENSORS.values()]
    same = {(a, b) for a in range(len(forms)) for b in range(len(forms)) if a != b and forms[a] == forms[b]}
    names = list(TENSORS)
    assert not {(names[a], names[b]) for a, b in same} - {("plain", "plain")}
    assert [function([t]).forms for t in TENSORS.values()] == forms


@needs_reader
def test_what_is_no_dense_tensor_is_an_error() -> None:
    for wrong in (3.0, None, torch.eye(3).to_sparse(), torch.zeros(3, device="meta")):
        with pytest.raises(RuntimeError):
            native([TENSORS["plain"], wrong])


@pytest.mark.parametrize("major", [0, 2])
def test_an_unknown_version_of_the_interface_is_not_used(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "DLPACK_MAJOR", major)
    assert reader.native_reader.__wrapped__() is None


def test_a_torch_without_the_interface_steps_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for whole in (True, False):
        with monkeypatch.context() as patch:
            if not whole:
                patch.setattr("lightning_optim.engines.base.native_reader", lambda: None)
            torch.manual_seed(0)
            weights = [torch.nn.Parameter(torch.randn(s)) for s in ((3, 4), (7,), ())]
            optimizer = lightning_optim.AdamW(weights)
            for step in range(4):
                for w in weights:
                    w.grad = torch.full_like(w, math.sin(step))
                optimizer.step()
                weights[1].data = weights[1].data.clone()
            results.append([w.detach().clone() for w in weights])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_reader
def test_the_host_engine_reads_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    function = reader.native_reader()
    assert function is not None

    def counted(tensors: list[Tensor]) -> Reading:
        calls.append(len(tensors))
        return function(tensors)

    monkeypatch.setattr("lightning_optim.engines.base.native_reader", lambda: counted)
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(5)]
    optimizer = lightning_optim.AdamW(weights, engine=HostEngine.name)
    for _ in range(3):
        for w in weights:
            w.grad = torch.ones(3)
        optimizer.step()
    assert calls == [25, 25, 25]  # weights, gradients, two slots and a counter
