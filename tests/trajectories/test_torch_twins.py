"""The optimizers that torch has too step as torch's do, with its schedulers and with its instances."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import references
import torch
from torch import nn

from lightning_optim import adopt
from lightning_optim.registry import OPTIMIZERS

from .common import (
    ENGINE,
    ROUNDINGS,
    STEPS,
    close,
    give_gradients,
    gradient,
    math_rounding,
    saved_and_loaded,
    takes_complex,
    weights,
)

TORCH_CASES = [
    (name, case)
    for name, info in OPTIMIZERS.items()
    if info.torch_equivalent is not None
    for case, options in references.cases(name).items()
    if set(options) <= {*inspect.signature(info.torch_equivalent).parameters, "max_grad_norm"}
]


def twin_weights(name: str) -> list[nn.Parameter]:
    """Those of all tests, but for such as torch's class fails with."""
    takes_empty = references.REFERENCES[name].twin_takes_empty
    return [p for p in weights(torch.float64) if takes_empty or p.numel()]


@pytest.mark.matrix(
    unless=lambda name, case, dtype, engine: (
        engine == references.FASTEST
        and (case == "default" or (references.representative(name) and not dtype.is_complex))
    )
)
@ENGINE
@pytest.mark.parametrize(("name", "case"), TORCH_CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=["f64", "f32", "c64"])
def test_each_step_is_torchs(name: str, case: str, dtype: torch.dtype, engine: str) -> None:
    """The same weights at each of 50 steps, the state going over to a fresh instance of torch's class and back."""
    options = dict(references.cases(name)[case])
    theirs_class: Callable[..., torch.optim.Optimizer] | None = OPTIMIZERS[name].torch_equivalent
    assert theirs_class is not None
    max_norm = options.pop("max_grad_norm", None)
    if dtype.is_complex and not takes_complex(name):
        pytest.skip("it has no meaning for complex weights")
    ours_params = twin_weights(name)
    if dtype.is_complex:
        ours_params = [
            nn.Parameter(torch.complex(p.detach(), p.detach().flip(0) if p.ndim else p.detach() + 1))
            for p in ours_params
        ]
    ours_params = [nn.Parameter(p.detach().to(dtype)) for p in ours_params]
    params = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in ours_params]
    ours = OPTIMIZERS[name].create(ours_params, engine=engine, max_grad_norm=max_norm, **options)
    theirs = theirs_class(params, **options)
    for step in range(STEPS):
        if step == STEPS // 2:  # ours -> torch's class -> ours
            between = theirs_class([nn.Parameter(p.detach()) for p in ours_params], **options)
            between.load_state_dict(saved_and_loaded(ours))
            ours = OPTIMIZERS[name].create(ours_params, engine=engine, max_grad_norm=max_norm, **options)
            ours.load_state_dict(saved_and_loaded(between))
        for index, (p, q) in enumerate(zip(ours_params, params, strict=True)):
            if (step // 2 + index) % 11 == 5:
                p.grad = q.grad = None
                continue
            p.grad = gradient(p, step, index)
            if dtype.is_complex:
                p.grad = p.grad + 1j * gradient(p, step, index + 50)
            q.grad = p.grad.clone()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        ours.step()
        theirs.step()
        # Two float trajectories from the same gradients: each adds up to ROUNDINGS roundings a step, relative to
        # values of size up to 4.
        atol = 2 * (step + 1) * ROUNDINGS * math_rounding(params[0]) * 4
        close(ours_params, params, atol)
        for p, q in zip(ours_params, params, strict=True):
            # torch keeps an empty momentum_buffer for plain SGD
            slots = {key: value for key, value in theirs.state.get(q, {}).items() if value is not None}
            assert set(ours.state.get(p, {})) == set(slots)
            assert slots.get("step") == ours.state.get(p, {}).get("step")
        for slot in {key for state in theirs.state.values() for key, value in state.items() if value is not None}:
            column = [
                (ours.state[p][slot], theirs.state[q][slot])
                for p, q in zip(ours_params, params, strict=True)
                if slot in theirs.state.get(q, {})
            ]
            close([a for a, _ in column], [b for _, b in column], 10 * atol if slot == "momentum_buffer" else atol)


@ENGINE
@pytest.mark.parametrize("name", [name for name, info in OPTIMIZERS.items() if info.torch_equivalent])
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_a_scheduler_moves_the_lr_as_it_does_torchs(name: str, tensor_lr: bool, engine: str) -> None:
    torch_class: Callable[..., torch.optim.Optimizer] | None = OPTIMIZERS[name].torch_equivalent
    assert torch_class is not None
    params = [nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64)) for _ in range(2)]
    lrs = [torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1 for _ in range(2)]
    ours = OPTIMIZERS[name].create(params[:1], lr=lrs[0], engine=engine)
    theirs = torch_class(params[1:], lr=lrs[1])
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8) for optimizer in (ours, theirs)]
    for step in range(20):
        for p, optimizer, scheduler in zip(params, (ours, theirs), schedulers, strict=True):
            p.grad = gradient(p, step, 0)
            optimizer.step()
            scheduler.step()
        atol = (step + 1) * ROUNDINGS * 2.0**-53
        torch.testing.assert_close(params[0].detach(), params[1].detach(), rtol=0, atol=atol)


@ENGINE
@pytest.mark.parametrize("name", [name for name, info in OPTIMIZERS.items() if info.torch_equivalent])
def test_adopted_instances_step_as_they_would_themselves(name: str, engine: str) -> None:
    torch_class: Callable[..., torch.optim.Optimizer] | None = OPTIMIZERS[name].torch_equivalent
    assert torch_class is not None
    for options in references.cases(name).values():
        if not set(options) <= set(inspect.signature(torch_class).parameters):
            continue
        params, others = twin_weights(name), twin_weights(name)
        adopted_instance, instance = torch_class(params, **options), torch_class(others, **options)
        adopted = adopt(adopted_instance, engine=engine)
        for step in range(6):
            give_gradients(params, step)
            give_gradients(others, step)
            instance.step()
            if step % 3 == 1:  # either may step at any time
                adopted_instance.step()
            else:
                adopted.step()
            for p, q in zip(params, others, strict=True):
                torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=6 * ROUNDINGS * 2.0**-51)
