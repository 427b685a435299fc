"""What the Triton engine does around its kernels: tables, launches, control on the device, nothing that waits."""

from __future__ import annotations

from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_optim
from lightning_optim.engines.scaling import LossScale

from .common import PRINTED, Launches, give_gradients, make, weights


def pair(name: str = "adamw", **options: Any) -> tuple[list[nn.Parameter], Any, list[nn.Parameter], Any]:
    ours, theirs = weights(), weights()
    return ours, make(name, ours, **options), theirs, make(name, theirs, engine="eager", **options)


def close(a: list[nn.Parameter], b: list[nn.Parameter]) -> None:
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_groups_are_rows_of_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Launches(monkeypatch)
    ends = []
    for engine in ("triton", "eager"):
        params = weights()
        groups = [{"params": [p], "lr": 0.01 * (i + 1), "weight_decay": 0.1 * i} for i, p in enumerate(params)]
        optimizer = make("adamw", groups, engine=engine)
        for step in range(4):
            give_gradients(params, step)
            optimizer.step()
        ends.append(params)
    close(*ends)
    assert log.names == ["scalars_0", "sweep_0"] * 4


@pytest.mark.parametrize(("name", "most"), [("adamw", 3), ("lion", 3), ("sgd", 3), ("lamb", 5)])
def test_launches_of_a_bucket(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most three for an element-wise rule, with clipping and a loss scale; norms of a rule's own add a pass."""
    params = [nn.Parameter(torch.zeros(3)) for _ in range(300)]
    optimizer = make(name, params, max_grad_norm=1.0, **({"adapt_1d": True} if name == "lamb" else {}))
    log = Launches(monkeypatch, run=False)
    for step in range(2):
        give_gradients(params, step)
        log.names.clear()
        with torch.no_grad():
            optimizer._stepper.step(loss=LossScale(torch.tensor(8.0), torch.zeros(())))
        assert len(log.names) <= most, log.names


@references.common_to_all
@pytest.mark.parametrize("name", PRINTED)
def test_changing_scalars_compiles_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    optimizer = make(name, params, **references.BASE[name])
    log = Launches(monkeypatch, run=False)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.step()
    known = set(log.keys)
    for change in range(1000):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (change + 1)
            for option in ("weight_decay", "eps", "momentum"):
                if group.get(option):  # without momentum, some rules are others
                    group[option] = 1e-4 * (change + 1)
            if "betas" in group:
                group["betas"] = (0.9 - 1e-4 * change, 0.99)
        optimizer.step()
    assert set(log.keys) == known


class Waits(TorchDispatchMode):
    """Raises where a host would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(part in name for part in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default")), name
        return func(*args, **(kwargs or {}))


@references.common_to_all
@pytest.mark.parametrize("name", PRINTED)
def test_nothing_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights()
    optimizer = make(name, params, max_grad_norm=1.0)
    Launches(monkeypatch, run=False)
    scale, found = torch.tensor(8.0), torch.zeros(())
    for step in range(4):
        give_gradients(params, step)
        if step == 2:
            params[0].data = params[0].data.clone()  # plans and tables are made again
        inputs = optimizer.asked_for(None)
        with torch.no_grad(), Waits():
            loss = LossScale(scale, found) if step % 2 else None
            optimizer._stepper.step(loss=loss, inputs=inputs)


def test_addresses_are_read_at_every_step() -> None:
    ours, optimizer, theirs, eager = pair()
    for step in range(6):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        eager.step()
        for p in ours:
            p.data = p.data.clone()
            for slot in ("exp_avg", "exp_avg_sq", "step"):
                optimizer.state[p][slot] = optimizer.state[p][slot].clone()
    close(ours, theirs)


def test_an_infinite_gradient_leaves_the_step_out() -> None:
    for name in ("adamw", "lamb"):
        ours, optimizer, theirs, eager = pair(name)
        scale, found = torch.tensor(1024.0), torch.zeros(())
        for step in range(4):
            give_gradients(ours, step)
            give_gradients(theirs, step)
            for p in ours:
                assert p.grad is not None
                p.grad *= scale
            if step == 1:
                ours[0].grad[1, 1] = torch.inf  # type: ignore[index] # it has one
            before = [p.detach().clone() for p in ours]
            with torch.no_grad():
                optimizer._stepper.step(loss=LossScale(scale, found.zero_()), max_grad_norm=0.7)
                if step != 1:
                    eager._stepper.step(max_grad_norm=0.7)
            assert bool(found) == (step == 1)
            if step == 1:
                assert all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))
        close(ours, theirs)
        assert {float(optimizer.state[p]["step"]) for p in ours} == {3.0}
        norm = optimizer.grad_norm
        assert norm is not None
        torch.testing.assert_close(norm, eager.grad_norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("in_step", [False, True])
def test_torchs_own_scaler_drives_the_engine(in_step: bool) -> None:
    ours, optimizer, theirs, eager = pair()
    optimizer._step_supports_amp_scaling = in_step
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = None
        give_gradients(theirs, step)
        parts = [(p * q.grad).sum() for p, q in zip(ours, theirs, strict=True) if q.grad is not None]
        loss = torch.stack(parts).sum()
        scaler.scale(loss * (torch.inf if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            eager.step()
    close(ours, theirs)
    assert scaler.get_scale() == 32.0


def test_without_a_scaler_nan_spreads_as_in_torchs_clipping() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, torch.nan, 1.0])
    make("sgd", [weight], max_grad_norm=1.0).step()
    assert torch.isnan(weight).all()


def test_a_learning_rate_may_be_a_tensor() -> None:
    ours, optimizer, theirs, eager = pair(lr=0.01)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.01, dtype=torch.float64)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        eager.step()
        optimizer.param_groups[0]["lr"].fill_(0.02 * (step + 1))
        eager.param_groups[0]["lr"] = 0.02 * (step + 1)
    close(ours, theirs)


def test_adopted_optimizers_and_checkpoints() -> None:
    """torch's own AdamW, stepped by the engine for a while, and on by itself."""
    ours, theirs = weights(), weights()
    adopted, stock = torch.optim.AdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01)
    stepper = lightning_optim.adopt(adopted, engine="triton")
    for step in range(6):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        (stepper if step < 3 else adopted).step()
        stock.step()
    close(ours, theirs)


def test_weights_with_gaps_are_stepped_by_another_engine() -> None:
    memory = torch.zeros(6)
    weight = nn.Parameter(memory[::2])
    weight.grad = torch.ones(3)
    with pytest.warns(lightning_optim.warnings.LightningOptimWarning, match="gaps or overlaps"):
        make("sgd", [weight], lr=1.0).step()
    assert memory.tolist() == [-1.0, 0.0, -1.0, 0.0, -1.0, 0.0]


def test_complex_weights_are_pairs_of_numbers() -> None:
    ends: list[Tensor] = []
    for engine in ("triton", "eager"):
        weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        optimizer = make("adamw", [weight], engine=engine)
        for step in range(3):
            weight.grad = torch.full((3,), complex(step, 1 - step))
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)
