"""Steps made by the backward pass are the steps that would have followed it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_optim
from lightning_optim.control.step_in_backward import StepInBackward
from lightning_optim.registry import OPTIMIZERS, create_optimizer
from lightning_optim.stepping.steps import Steps

NAMES = [
    name
    for name, info in OPTIMIZERS.items()
    if info.kind != "matrix" and not hasattr(info.cls, "request") and not info.cls.rule.shares
]


class Net(nn.Module):
    """Tied weights, a reentrant checkpoint, and a layer that not every step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.rare = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.again = nn.Linear(5, 5)
        self.again.weight = self.tied.weight

    def forward(self, x: Tensor, step: int) -> Tensor:
        x = torch.tanh(self.first(x))
        x = checkpoint(lambda y: torch.tanh(self.tied(y)), x, use_reentrant=True)
        x = checkpoint(lambda y: torch.tanh(self.tied(y)) + self.first(y), x, use_reentrant=True)
        x = self.again(x)
        return self.rare(x) if step % 3 else x


def train(name: str, *, released: bool, batches: int = 1, **options: Any) -> tuple[Net, Any, int]:
    """The model, its optimizer, and the most gradients that were there at once after the first window."""
    torch.manual_seed(0)
    model = Net().to(options.pop("dtype", torch.float32))
    settings = {key: options.pop(key) for key in ("max_norm", "clip") if key in options}
    optimizer = create_optimizer(name, list(model.parameters()), lr=0.01, **options)
    backward = StepInBackward(optimizer, **settings) if released else None
    most = 0
    for step in range(6):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
        for batch in range(batches):
            if backward is not None:
                backward.last = batch == batches - 1
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + batch))
            model(x.to(model.first.weight.dtype).requires_grad_(), step).square().sum().backward()
        if backward is not None:
            if step not in (0, 1):  # the step at which `rare` is first used still observes it
                most = max(most, sum(p.grad is not None for p in model.parameters()))
            backward.finish()
            assert all(p.grad is None for p in model.parameters())
        else:
            optimizer.step()
    return model, optimizer, most


def same(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_and_no_gradients(name: str, batches: int) -> None:
    ours, optimizer, most = train(name, released=True, batches=batches)
    theirs, plain, _ = train(name, released=False, batches=batches)
    same(ours, theirs)
    assert most == 0
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        for slot, value in plain.state[q].items():
            assert torch.equal(optimizer.state[p][slot], value), slot


def test_the_noise_of_stochastic_rounding_is_that_of_the_whole_step() -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "rounding": "stochastic"}
    same(train("adamw", released=True, **options)[0], train("adamw", released=False, **options)[0])


def test_per_tensor_clipping() -> None:
    """Each gradient by its own norm, from the first step on."""
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    backward = StepInBackward(create_optimizer("sgd", weights, lr=1.0), max_norm=1.0, clip="per_tensor")
    for _ in range(3):
        (weights[0] @ torch.tensor([3.0, 4.0]) + weights[1] @ torch.tensor([0.3, 0.4])).backward()
        backward.finish()
    torch.testing.assert_close(weights[0], torch.tensor([-1.8, -2.4]))
    torch.testing.assert_close(weights[1], torch.tensor([-0.9, -1.2]))


def test_clipping_by_the_norm_of_the_step_before() -> None:
    """The first step is exact; later ones use the norm that the one before had."""
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    backward = StepInBackward(create_optimizer("sgd", weights, lr=1.0), max_norm=1.0, clip="previous_norm")
    seen = []
    for scale in (1.0, 2.0, 4.0):
        before = [w.item() for w in weights]
        (3 * scale * weights[0] + 4 * scale * weights[1]).sum().backward()
        backward.finish()
        seen.append([b - w.item() for w, b in zip(weights, before, strict=True)])
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([[0.6, 0.8], [1.2, 1.6], [1.2, 1.6]]))


def test_a_gradient_that_comes_too_late_is_an_error() -> None:
    weight = nn.Parameter(torch.ones(2))
    backward = StepInBackward(create_optimizer("sgd", [weight], lr=0.1))
    weight.sum().backward()
    backward.finish()
    weight.sum().backward()
    weight.sum().backward()  # without `last = False` before it
    with pytest.raises(RuntimeError, match=r"1 gradients .*shape \(2,\).*grew after"):
        backward.finish()


def test_what_cannot_be_exact_is_said_at_once() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = create_optimizer("sgd", [weight], lr=0.1)
    with pytest.raises(ValueError, match=r"max_norm=1.0 cannot be exact.*'per_tensor' or 'previous_norm'"):
        StepInBackward(optimizer, max_norm=1.0)
    with pytest.raises(ValueError, match=r"clip='global'; valid: None, per_tensor, previous_norm"):
        StepInBackward(optimizer, max_norm=1.0, clip="global")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_grad_norm=2.0 of the optimizer"):
        StepInBackward(create_optimizer("sgd", [weight], lr=0.1, max_grad_norm=2.0))
    with pytest.raises(TypeError, match="SGD does not step parameter by parameter"):
        StepInBackward(torch.optim.SGD([weight], lr=0.1))  # type: ignore[arg-type]


def test_hooks_keep_nothing_alive() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = create_optimizer("adamw", [weight], lr=0.1)
    backward = StepInBackward(optimizer)
    weight.sum().backward()
    backward.finish()
    gone = weakref.ref(optimizer)
    del optimizer, backward
    gc.collect()
    assert gone() is None
    weight.sum().backward()
    assert weight.grad is not None


def test_parameters_that_are_frozen_added_or_unfrozen() -> None:
    model = Net()
    model.rare.requires_grad_(False)
    params = [*model.first.parameters(), *model.rare.parameters()]
    optimizer = create_optimizer("sgd", params, lr=0.1)
    backward = StepInBackward(optimizer)
    late = nn.Parameter(torch.ones(5))
    for step in range(5):
        if step == 2:
            model.rare.requires_grad_(True)
            optimizer.add_param_group({"params": [late]})
        before = [p.detach().clone() for p in (*params, late)]
        (model.rare(model.first(torch.ones(2, 5))) * late).sum().backward()
        backward.finish()
        moved = [not torch.equal(p, q) for p, q in zip((*params, late), before, strict=True)]
        assert moved == ([True] * 2 + [step >= 2] * 3)
        late.grad = None if step < 2 else late.grad
        assert late.grad is None


def test_an_interrupted_window_is_forgotten() -> None:
    weight = nn.Parameter(torch.ones(2))
    backward = StepInBackward(create_optimizer("sgd", [weight], lr=0.5))
    for step in range(4):
        weight.sum().backward()
        if step == 2:  # out of memory, say
            weight.grad = None
            backward.discard()
        else:
            backward.finish()
    assert weight.tolist() == [-1.0, -1.0]


def test_groups_that_change_places_or_go() -> None:
    """Each parameter is stepped with the options of the group that it is in, or not at all."""
    params: list[Tensor] = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = lightning_optim.SGD([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)], lr=1.0)
    backward = StepInBackward(optimizer)
    for number in range(3):
        if number == 1:
            optimizer.param_groups.reverse()
        if number == 2:
            del optimizer.param_groups[0]
        backward.watch()
        torch.stack(params).sum().backward()
        backward.finish()
    for p, expected in zip(params, (0.7, 0.4, 0.4), strict=True):
        torch.testing.assert_close(p.detach(), torch.full((2,), expected))
    assert [p.grad is None for p in params] == [True, True, False]


def test_it_is_an_entrance_to_steps_as_the_others_are() -> None:
    optimizer = lightning_optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
    adopted = lightning_optim.adopt(torch.optim.SGD([nn.Parameter(torch.ones(2))]))
    entrances: list[Steps] = [StepInBackward(optimizer), optimizer._stepper, adopted]
    assert [(len(one.report()), one.scaling) for one in entrances] == [(1, None)] * 3
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0, but steps were made in the backward pass"):
        entrances[0].step(max_grad_norm=1.0)


def test_steps_that_ask_for_more_than_gradients_are_refused() -> None:
    optimizer = lightning_optim.Sophia([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=r"step_in_backward: Sophia, whose step asks for more than gradients"):
        StepInBackward(optimizer)


def test_steps_of_all_parameters_together_are_refused() -> None:
    optimizer = lightning_optim.Prodigy([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=r"Prodigy does not step parameter by parameter: .* have in common"):
        StepInBackward(optimizer)


def test_steps_with_the_weights_of_evaluation_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = lightning_optim.ScheduleFreeAdamW([weight])
    backward = StepInBackward(optimizer)
    for _ in range(2):
        weight.sum().backward()
        backward.finish()
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"step\(\) with the weights of evaluation; valid: train\(\)"):
        weight.sum().backward()
