"""What the host engine reads through addresses is what the tensors say, and torch knows of what it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import lightning_optim
from lightning_optim.engines import ENGINES
from lightning_optim.engines.cache import BuildError
from lightning_optim.stepping.method import Options
from lightning_optim.stepping.stepper import Stepper

from .common import known_warnings

pytestmark = [
    known_warnings,
    # An engine that is asked for by name, and rightly passed over, says so.
    pytest.mark.filterwarnings("ignore:.*engine cannot be used:lightning_optim.warnings.LightningOptimWarning"),
    pytest.mark.filterwarnings("ignore:.*clipping by torch:lightning_optim.warnings.LightningOptimWarning"),
]

each_engine = pytest.mark.parametrize("engine", list(ENGINES))


@each_engine
def test_a_lazily_negated_gradient_has_its_values(engine: str) -> None:
    # Autograd itself makes such a gradient, of a conjugate's imaginary part.
    real, imaginary = (torch.nn.Parameter(torch.tensor(x)) for x in (1.0, 2.0))
    (torch.complex(real, imaginary).conj() * (1 + 3j)).real.backward()
    assert imaginary.grad is not None
    assert imaginary.grad.is_neg()
    wanted = imaginary.detach() - imaginary.grad
    lightning_optim.SGD([real, imaginary], lr=1.0, engine=engine).step()
    assert imaginary.item() == wanted.item()


@each_engine
def test_a_gradient_that_becomes_lazily_negated_is_noticed(engine: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(8))
    optimizer = lightning_optim.SGD([weight], lr=1.0, engine=engine)
    for g in (torch.ones(8), torch._neg_view(torch.ones(8))):
        weight.grad = g
        optimizer.step()
    assert weight.tolist() == [0.0] * 8


@each_engine
def test_a_backward_through_an_old_weight_fails(engine: str) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    loss = (weight * weight).sum()
    lightning_optim.SGD([weight], lr=0.5, engine=engine).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_engine
def test_a_weight_that_changes_its_type_where_it_lies_is_noticed(engine: str) -> None:
    memory = torch.zeros(32, dtype=torch.float16)
    weight = torch.nn.Parameter(memory.view(torch.float32)[:8])
    optimizer = lightning_optim.SGD([weight], lr=1.0, engine=engine)
    for _ in range(2):
        weight.grad = torch.ones(8)
        optimizer.step()
    memory.zero_()
    weight.data = memory[:8]  # the same address, half as many bytes
    weight.grad = torch.ones(8, dtype=torch.float16)
    optimizer.step()
    assert memory.tolist() == [-1.0] * 8 + [0.0] * 24


@each_engine
def test_a_gradient_of_another_size_is_refused_at_any_step(engine: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(8))
    owner = lightning_optim.SGD([weight], engine=engine)
    stepper = Stepper(owner, type(owner), Options(engine=engine))
    with torch.no_grad():
        for _ in range(2):
            stepper.step({weight: torch.ones(8)})
        with pytest.raises(RuntimeError, match=r"gradient of shape \(4,\)"):
            stepper.step({weight: torch.ones(4)})


@each_engine
def test_a_gradient_of_a_wrapper_class_is_not_read_by_address(engine: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = lightning_optim.SGD([weight], lr=1.0, engine=engine)
    for wrapped in (False, True):
        weight.grad = TwoTensor(torch.ones(3), torch.ones(3)) if wrapped else torch.ones(3)
        optimizer.step()
    assert weight.tolist() == [-2.0] * 3


@each_engine
def test_overlapping_weights_are_updated_one_after_the_other(engine: str) -> None:
    memory = torch.zeros(6)
    weights = [torch.nn.Parameter(memory[:4]), torch.nn.Parameter(memory[2:])]
    for weight in weights:
        weight.grad = torch.ones(4)
    lightning_optim.SGD(weights, lr=1.0, engine=engine).step()
    assert memory.tolist() == [-1.0, -1.0, -2.0, -2.0, -1.0, -1.0]


def test_clipping_goes_on_if_its_kernel_does_not_build(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_optim.engines.compiled import NORM
    from lightning_optim.engines.host.engine import HostEngine

    def fail(self: Any, program: Any, layout: Any) -> Any:
        if program is NORM:
            raise BuildError("no norm today")
        return kernel(self, program, layout)

    kernel = HostEngine._built
    weights = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    for weight, name in zip(weights, ("broken", "whole"), strict=True):
        with monkeypatch.context() as patch:
            if name == "broken":
                patch.setattr(HostEngine, "_built", fail)
            weight.grad = torch.full((4,), 5.0)
            lightning_optim.SGD([weight], lr=1.0, max_grad_norm=1.0).step()
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize(("dtype", "state"), [(torch.float16, None), (torch.float64, "bfloat16")])
def test_stochastic_rounding_is_refused_where_it_cannot_be(dtype: torch.dtype, state: str | None) -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    with pytest.raises(ValueError, match=r"rounding='stochastic'.*valid here: nearest, kahan"):
        lightning_optim.Lion([weight], rounding="stochastic", state_dtype=state)


@pytest.mark.parametrize("switch", [{"fused": True}, {"differentiable": True}, {"weight_deacy": 0.1}])
def test_what_would_be_ignored_in_a_group_is_refused(switch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(switch))}=.* is not an option"):
        lightning_optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(2))], **switch}])


def test_a_group_of_its_own_must_be_valid_for_nesterov() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"nesterov=True with momentum=0.0"):
        lightning_optim.SGD([{"params": [weight], "nesterov": True}])


def test_adopted_steps_run_hooks_and_satisfy_schedulers(recwarn: pytest.WarningsRecorder) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    weight.grad = torch.ones(2)
    lightning_optim.adopt(optimizer).step()
    schedule.step()
    assert calls == ["before", "after"]
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]
