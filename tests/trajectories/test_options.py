"""Options of groups and options that change between steps count at once; so does every kind of decay."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn

from lightning_optim.optimizers import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules.policy import Decay
from lightning_optim.stepping.options import TORCH_SWITCHES

from .common import (
    ENGINE,
    OPTIMIZER,
    Judge,
    give_gradients,
    inputs_of,
    judged_run,
    normal_with_zeros,
    supported,
    take_step,
    variant,
    weights,
)


@ENGINE
@pytest.mark.parametrize("name", [name for name, info in OPTIMIZERS.items() if "cautious" in info.options])
def test_a_mask_that_keeps_almost_nothing_is_not_scaled_up_without_bound(name: str, engine: str) -> None:
    """The floor under the cautious mask's mean: with one element of 3000 kept, a thousandfold step, not more."""
    p = nn.Parameter(torch.linspace(1, 2, 3000).reshape(3, 1000))
    p.grad = torch.ones_like(p)
    options = supported(name, {"momentum": 0.9}) | references.BASE[name]
    optimizer = OPTIMIZERS[name].create([p], **options, weight_decay=0.0, cautious=True, engine=engine)
    optimizer.step()
    if not optimizer.state[p].keys() & {"exp_avg", "momentum_buffer"}:
        pytest.skip("it remembers no direction: its updates have the signs of their gradients")
    p.grad = torch.full_like(p, -1e-3)
    p.grad[1, 7] = 1.0
    judge = Judge(name, optimizer)
    inputs = inputs_of(name, [p], 1)
    judge.before(inputs)
    before = p.detach().clone()
    take_step(optimizer, inputs)
    judge.after()
    assert int((p != before).sum()) == 1


@pytest.mark.matrix(unless=lambda name, engine: references.representative(name) and engine == references.FASTEST)
@ENGINE
@OPTIMIZER
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_groups_with_options_of_their_own_and_a_changing_lr(name: str, tensor_lr: bool, engine: str) -> None:
    params = weights(torch.float32)

    def lr(value: float) -> float | Tensor:
        return torch.tensor(value, dtype=torch.float64) if tensor_lr else value

    def groups() -> list[dict[str, Any]]:
        return [
            {"params": params[:2], "lr": lr(0.01)},
            {"params": params[2:5], "lr": lr(0.03), "weight_decay": 0.2, "maximize": True},
            {"params": params[5:], "lr": lr(0.02), **supported(name, {"cautious": True})},
        ]

    def each_step(optimizer: RuleOptimizer, step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].mul_(0.9) if tensor_lr else group["lr"] * 0.9
        optimizer.param_groups[1]["maximize"] = step % 3 == 0
        if "betas" in optimizer.param_groups[0]:
            optimizer.param_groups[0]["betas"] = (0.9 - 0.01 * step, 0.99)

    options = {**references.BASE[name], "engine": engine, "max_grad_norm": 2.0}
    judged_run(name, options, params, steps=12, groups=groups, each_step=each_step)


def bool_options(name: str) -> list[str]:
    parameters = inspect.signature(OPTIMIZERS[name].cls).parameters.values()
    return [p.name for p in parameters if isinstance(p.default, bool) and p.name not in TORCH_SWITCHES]


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in OPTIMIZERS for option in bool_options(name)])
def test_an_option_that_changes_between_steps_counts_at_once(name: str, option: str) -> None:
    params = weights(torch.float32)
    optimizer = OPTIMIZERS[name].create(params, **references.BASE[name], weight_decay=0.1, engine="eager")
    for step in range(7):
        for index, p in enumerate(params):
            p.grad = torch.empty_like(p, requires_grad=False).copy_(normal_with_zeros(p.shape, 1000 * step + index))
        if step == 4:  # after steps in which nothing but the gradients' values has changed
            optimizer.param_groups[0][option] = not optimizer.param_groups[0][option]
        judge = Judge(name, optimizer)
        inputs = inputs_of(name, params, step)
        judge.before(inputs)
        take_step(optimizer, inputs)
        judge.after()


@pytest.mark.matrix(
    unless=lambda name, engine, dtype, rounding: (
        references.representative(name)
        and engine == references.FASTEST
        and (dtype == torch.float32 or rounding == "kahan")
    )
)
@ENGINE
@OPTIMIZER
@pytest.mark.parametrize("kind", ["none", "l2", "decoupled", "proximal"])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, "nearest"), (torch.bfloat16, "nearest"), (torch.bfloat16, "kahan")], ids=str
)
def test_every_kind_of_decay(name: str, kind: Decay, dtype: torch.dtype, rounding: str, engine: str) -> None:
    params = weights(dtype)
    options = {**references.BASE[name], "weight_decay": 0.5, "engine": engine, "rounding": rounding}
    optimizer = variant(name, kind)(params, **options)
    for step in range(5):
        give_gradients(params, step)
        judge = Judge(name, optimizer, kind=kind)
        inputs = inputs_of(name, params, step)
        judge.before(inputs)
        take_step(optimizer, inputs)
        judge.after()
