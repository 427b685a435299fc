"""Nothing that is done to a tensor between two steps makes a step touch memory that is not the tensor's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import lightning_optim
from lightning_optim.engines import ENGINES

from .common import known_warnings

pytestmark = [
    known_warnings,
    pytest.mark.filterwarnings("ignore:.*engine cannot be used:lightning_optim.warnings.LightningOptimWarning"),
]

each_engine = pytest.mark.parametrize("engine", list(ENGINES))


def two(engine: str, **options: Any) -> tuple[list[nn.Parameter], Any]:
    weights = [nn.Parameter(torch.zeros(8)) for _ in range(2)]
    return weights, lightning_optim.SGD(weights, lr=1.0, momentum=0.9, engine=engine, **options)


def step(weights: list[nn.Parameter], optimizer: Any, times: int = 1) -> None:
    for _ in range(times):
        for p in weights:
            p.grad = torch.ones(p.shape, dtype=p.dtype)
        optimizer.step()


@each_engine
def test_a_gradient_of_a_wrapper_class_may_be_any_parameters(engine: str) -> None:
    weights, _ = two(engine)
    optimizer = lightning_optim.SGD(weights, lr=1.0, engine=engine)
    for wrapped in (0, 0, 1, None, 1, 0):
        for index, p in enumerate(weights):
            p.grad = TwoTensor(torch.ones(8), torch.ones(8)) if index == wrapped else torch.ones(8)
        optimizer.step()
    assert [p.tolist() for p in weights] == [[-6.0] * 8] * 2


@each_engine
@pytest.mark.parametrize("which", ["weight", "gradient", "slot"])
@pytest.mark.parametrize("size", [0, 16])
def test_a_storage_that_has_become_too_small_is_refused(which: str, size: int, engine: str) -> None:
    weights, optimizer = two(engine)
    step(weights, optimizer, 2)
    kept = weights[0].detach().clone()
    for p in weights:
        p.grad = torch.ones(8)
    tensor = {"weight": weights[1], "gradient": weights[1].grad, "slot": optimizer.state[weights[1]]["momentum_buffer"]}
    whole = tensor[which]
    assert isinstance(whole, Tensor)
    whole.untyped_storage().resize_(size)
    with pytest.raises(RuntimeError, match=rf"parameter 1 .*its storage has been resized to {size} bytes"):
        optimizer.step()
    assert torch.equal(weights[0].detach(), kept)
    whole.untyped_storage().resize_(32)
    whole.detach().fill_(1.0)
    optimizer.step()
    assert not torch.equal(weights[0].detach(), kept)


def test_a_storage_that_is_too_small_where_it_was_is_refused() -> None:
    """Its address says nothing."""
    memory = torch.zeros(16)
    weight = nn.Parameter(memory[:8])
    optimizer = lightning_optim.SGD([weight], lr=1.0)
    step([weight], optimizer, 2)
    reached = False
    for _ in range(200):
        storage, place = weight.untyped_storage(), weight.data_ptr()
        storage.resize_(64)
        step([weight], optimizer)
        kept = [torch.zeros(4) for _ in range(8)]
        place = weight.data_ptr()
        storage.resize_(16)
        kept += [torch.zeros(16)]
        storage.resize_(15)
        reached |= place == weight.data_ptr()
        weight.grad = torch.ones(8)
        with pytest.raises(RuntimeError, match="its storage has been resized"):
            optimizer.step()
        if reached:
            break


@each_engine
def test_classes_exchanged_by_swap_tensors_are_noticed(engine: str) -> None:
    weights, optimizer = two(engine)
    step(weights, optimizer, 2)
    for p in weights:
        p.grad = None
    other = nn.Parameter(TwoTensor(torch.zeros(8), torch.zeros(8)))
    torch.utils.swap_tensors(weights[0], other)
    assert type(weights[0]) is not nn.Parameter
    for _ in range(2):
        weights[0].grad = TwoTensor(torch.ones(8), torch.ones(8))
        weights[1].grad = torch.ones(8)
        optimizer.step()
    assert weights[0].a.tolist() == weights[0].b.tolist()  # type: ignore[attr-defined]
    assert weights[0].a[0].item() < 0  # type: ignore[attr-defined]
    assert other.detach().tolist() == [-2.9] * 8 or torch.allclose(other.detach(), torch.full((8,), -2.9))


@each_engine
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("?", "momentum_buffer has '\\?'"),
        (torch.zeros(3), r"momentum_buffer has shape \(3,\) on cpu"),
        (torch.zeros(8, device="meta"), r"momentum_buffer has shape \(8,\) on meta"),
        (torch.zeros(8).to_sparse(), "momentum_buffer has layout torch.sparse_coo"),
        (torch.zeros(8, dtype=torch.int32), "momentum_buffer has type torch.int32"),
        (torch.zeros(8, dtype=torch.cfloat), "momentum_buffer has type torch.complex64"),
    ],
    ids=["text", "shape", "meta", "sparse", "integer", "complex"],
)
def test_state_that_cannot_be_is_refused(wrong: Any, message: str, engine: str) -> None:
    weights, optimizer = two(engine)
    step(weights, optimizer, 2)
    kept = [p.detach().clone() for p in weights]
    optimizer.state[weights[1]]["momentum_buffer"] = wrong
    with pytest.raises(RuntimeError, match=rf"parameter 1 .*: its state does not fit: {message}"):
        step(weights, optimizer)
    assert all(map(torch.equal, map(Tensor.detach, weights), kept))


@each_engine
def test_counters_and_states_that_cannot_be_are_refused(engine: str) -> None:
    weights = [nn.Parameter(torch.zeros(8)) for _ in range(2)]
    optimizer = lightning_optim.AdamW(weights, engine=engine)
    step(weights, optimizer, 2)
    optimizer.state[weights[0]]["step"] = "?"
    with pytest.raises(RuntimeError, match=r"parameter 0 .*: its state does not fit: step is '\?'; valid: a number"):
        step(weights, optimizer)
    optimizer.state[weights[0]]["step"] = torch._neg_view(torch.tensor(-2.0))
    step(weights, optimizer)
    assert float(optimizer.state[weights[0]]["step"]) == 3
    optimizer.state[weights[1]] = None
    with pytest.raises(RuntimeError, match=r"parameter 1 .*: its state is None; valid: a dict"):
        step(weights, optimizer)


@each_engine
def test_what_was_made_in_inference_mode_is_refused_or_copied(engine: str) -> None:
    weights = [nn.Parameter(torch.zeros(8)) for _ in range(2)]
    optimizer = lightning_optim.SGD(weights, lr=1.0, momentum=0.5, engine=engine)
    with torch.inference_mode():
        step(weights, optimizer, 2)  # makes state there
    step(weights, optimizer)
    assert torch.allclose(weights[0].detach(), torch.full((8,), -1 - 1.5 - 1.75))
    with torch.inference_mode():
        data = torch.zeros(8)
    weights[1].data = data
    kept = weights[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 1 .* cannot be stepped: it was made in inference mode"):
        step(weights, optimizer)
    assert torch.equal(weights[0].detach(), kept)


@each_engine
def test_steps_do_not_depend_on_the_ambient_device_dtype_or_autocast(engine: str) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(4, 4, device="cpu", dtype=torch.float32)) for _ in range(2)]
        optimizer = lightning_optim.AdamW(weights, engine=engine, max_grad_norm=1.0)
        muon = lightning_optim.Muon([{"params": weights, "use_muon": True}], engine=engine)
        for number in range(3):
            for p in weights:
                p.grad = torch.full((4, 4), number - 1.5, device="cpu", dtype=torch.float32) + p.detach()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
                optimizer.step()
                muon.step()
        return [p.detach() for p in weights] + [
            optimizer.state[p][name] for p in weights for name in ("step", "exp_avg")
        ]

    ambient = False
    wanted = run()
    ambient = True
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        got = run()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, wanted, strict=True):
        assert a.device.type == "cpu"
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_sgd_without_momentum_keeps_no_empty_state() -> None:
    weight = nn.Parameter(torch.zeros(2))
    ours, torchs = lightning_optim.SGD([weight], lr=0.1), torch.optim.SGD([weight], lr=0.1)
    adopted = lightning_optim.adopt(torchs)
    for _ in range(2):
        weight.grad = torch.ones(2)
        ours.step()
        adopted.step()
    assert not ours.state_dict()["state"]
    assert not torchs.state_dict()["state"]
