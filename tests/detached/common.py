"""What the tests of detached steps share: weights, gradients that do not depend on them, runs, and torch's own steps.

Gradients that depended on weights would carry one weight that rounds the other way into all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from foreign import Foreign, ForeignAdagrad, ForeignNAdam
from torch import Tensor, nn
from torch.optim import Optimizer

import lightning_optim
from lightning_optim.engines.scaling import LossScale
from lightning_optim.offload import Detached, DetachedOptions
from lightning_optim.offload.link import SimulatedLink
from lightning_optim.offload.trace import Trace
from lightning_optim.offload.transport import Transport

SHAPES: list[tuple[int, ...]] = [(7, 5), (5,), (3, 2, 2), (), (40, 3), (0, 4)]
STEPS = 6

# Without a C compiler another engine steps, "with the same results": these tests then find out.
known_warnings = pytest.mark.filterwarnings(
    "ignore:.*the host engine cannot be used .no C compiler:lightning_optim.warnings.LightningOptimWarning"
)

Make = Callable[[Any], Optimizer]

#: Ours, and what must come to the same in one piece, in float32: torch's, or for those that torch lacks, ours.
PAIRS: dict[str, tuple[Make, Make]] = {
    "adam": (partial(lightning_optim.Adam, lr=0.02), partial(torch.optim.Adam, lr=0.02)),
    "adam, L2": (
        partial(lightning_optim.Adam, lr=0.02, weight_decay=0.1),
        partial(torch.optim.Adam, lr=0.02, weight_decay=0.1),
    ),
    "adamw, amsgrad": (
        partial(lightning_optim.AdamW, lr=0.02, amsgrad=True),
        partial(torch.optim.AdamW, lr=0.02, amsgrad=True),
    ),
    "adamw, maximize": (
        partial(lightning_optim.AdamW, lr=0.02, maximize=True),
        partial(torch.optim.AdamW, lr=0.02, maximize=True),
    ),
    "adamw, cautious": (
        partial(lightning_optim.AdamW, lr=0.02, cautious=True),
        partial(lightning_optim.AdamW, lr=0.02, cautious=True, engine="eager"),
    ),
    "sgd, dampening": (
        partial(lightning_optim.SGD, lr=0.02, momentum=0.9, dampening=0.5),
        partial(torch.optim.SGD, lr=0.02, momentum=0.9, dampening=0.5),
    ),
    "lion": (partial(lightning_optim.Lion, lr=0.02), partial(lightning_optim.Lion, lr=0.02, engine="eager")),
    "lamb": (partial(lightning_optim.LAMB, lr=0.02), partial(lightning_optim.LAMB, lr=0.02, engine="eager")),
    "muon": (partial(lightning_optim.Muon, lr=0.02), partial(lightning_optim.Muon, lr=0.02, engine="eager")),
    "rmsprop": (partial(lightning_optim.RMSprop, lr=0.02), partial(torch.optim.RMSprop, lr=0.02)),
    "radam": (partial(lightning_optim.RAdam, lr=0.02), partial(torch.optim.RAdam, lr=0.02)),
    "adafactor": (
        partial(lightning_optim.Adafactor, lr=0.02),
        partial(lightning_optim.Adafactor, lr=0.02, engine="eager"),
    ),
    "prodigy": (partial(lightning_optim.Prodigy, d0=1e-2), partial(lightning_optim.Prodigy, d0=1e-2, engine="eager")),
    "schedule-free": (
        partial(lightning_optim.ScheduleFreeAdamW, lr=0.02, warmup_steps=2),
        partial(lightning_optim.ScheduleFreeAdamW, lr=0.02, warmup_steps=2, engine="eager"),
    ),
    "torch SGD": (partial(torch.optim.SGD, lr=0.02, momentum=0.9, dampening=0.5),) * 2,
    "torch Adam": (partial(torch.optim.Adam, lr=0.02),) * 2,
    "torch AdamW": (partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),) * 2,
    "foreign": (partial(Foreign, lr=0.01, momentum=0.5),) * 2,
    "foreign Adagrad": (partial(ForeignAdagrad, lr=0.02),) * 2,
    "foreign NAdam": (partial(ForeignNAdam, lr=0.02),) * 2,
}
#: Those that are stepped bucket by bucket.
OURS = [name for name in PAIRS if not name.startswith("foreign") and name != "prodigy"]
UNDOABLE = [name for name in OURS if name != "muon"]


def weights(dtype: torch.dtype = torch.bfloat16, shapes: Any = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def slope(p: Tensor, *key: int) -> Tensor:
    """A gradient, of the type of ``p``; ``key`` says which."""
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    size = 1 + key[0] % 3  # so that clipping bites at some steps, and at others not
    kind = torch.complex64 if p.is_complex() else torch.float32
    return (torch.randn(p.shape, generator=generator, dtype=kind) * size).to(p.dtype)


def loss_of(params: Sequence[Tensor], step: int, micro: int = 0, absent: Iterable[int] = ()) -> Tensor:
    """A loss whose gradients are the slopes: products with 1."""
    terms = [
        (p * slope(p, step, micro, number).conj()).real.sum().to(torch.float64)
        if p.is_complex()
        else (p * slope(p, step, micro, number)).sum().to(torch.float64)
        for number, p in enumerate(params)
        if number not in absent and p.requires_grad
    ]
    return torch.stack([*terms, torch.zeros((), dtype=torch.float64, requires_grad=True)]).sum()


@dataclass
class Plan:
    """How a run goes; what the reference does as well.

    Attributes:
        steps, micro: Steps, and backward passes of each.
        clip: By norm.
        scale: Of the loss.
        absent: By step, the numbers of parameters without a gradient.
        schedule: Whether lr changes between steps.
        before: Called with the step and the parameters, before its backward passes.
        groups: Makes param groups of parameters.
    """

    steps: int = STEPS
    micro: int = 1
    clip: float | None = None
    scale: float | None = None
    absent: Callable[[int], Iterable[int]] = lambda step: ()
    schedule: bool = True
    groups: Callable[[list[Any]], Any] = list


@dataclass
class Run:
    """What a run has come to."""

    params: list[nn.Parameter]
    optimizer: Optimizer
    masters: list[Tensor]
    norms: list[float] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)

    @property
    def state(self) -> dict[Any, Any]:
        return self.optimizer.state_dict()["state"]


def small(**options: Any) -> DetachedOptions:
    """Options with buckets of a few of these weights."""
    return DetachedOptions(**{"bucket_mb": 1e-4, **options})


@contextmanager
def detached(optimizer: Optimizer, options: DetachedOptions | None = None, **kwargs: Any) -> Iterator[Detached]:
    pipeline = Detached(optimizer, options or small(), **kwargs)
    try:
        yield pipeline
    finally:
        pipeline.close()


def back_and_step(pipeline: Detached, loss: Tensor, **kwargs: Any) -> None:
    """A backward pass and its step: what fails may come up in either."""
    loss.backward()
    pipeline.step(**kwargs)


def link(seed: int = 0, trace: Trace | None = None) -> SimulatedLink:
    """Slow enough, and irregular enough, that what reads too early reads NaN."""
    return SimulatedLink(2e6, 2e-4, jitter=3.0, poison=True, seed=seed, trace=trace)


def run(
    params: list[nn.Parameter],
    make: Make,
    plan: Plan | None = None,
    options: DetachedOptions | None = None,
    *,
    last: bool = True,
    transport: Transport | None = None,
    trace: Trace | None = None,
    **kwargs: Any,
) -> Run:
    """Train detached.

    Args:
        last: Whether the pipeline is told which backward pass is the last.
    """
    plan = plan or Plan()
    optimizer = make(plan.groups(params))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    trace = trace or Trace()
    norms = []
    with detached(optimizer, options, transport=transport, trace=trace, **kwargs) as pipeline:
        pipeline.expects = (plan.scale, plan.clip)
        for step in range(plan.steps):
            for micro in range(plan.micro):
                pipeline.last = not last or micro == plan.micro - 1
                loss = loss_of(params, step, micro, plan.absent(step))
                (loss * (plan.scale or 1.0)).backward()
            scaled = None if plan.scale is None else LossScale(torch.tensor(plan.scale), torch.zeros(()))
            pipeline.step(max_grad_norm=plan.clip, loss=scaled)
            if pipeline.scaling is not None and (norm := pipeline.scaling.norm()) is not None:
                norms.append(norm.item())
            pipeline.zero_grad()
            if plan.schedule:
                schedule.step()
        found = pipeline.masters()
        masters = [found[p].detach().clone() for p in params if p in found]
    return Run(params, optimizer, masters, norms, trace)


def reference(params: list[nn.Parameter], make: Make, plan: Plan, dtype: torch.dtype = torch.float32) -> Run:
    """The same, by an optimizer that has masters for its parameters and steps them in one piece."""
    wide = [torch.promote_types(p.dtype, dtype.to_complex() if p.is_complex() else dtype) for p in params]
    masters = [nn.Parameter(p.detach().to(kind), p.requires_grad) for p, kind in zip(params, wide, strict=True)]
    optimizer = make(plan.groups(masters))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    norms = []
    for step in range(plan.steps):
        for number, (p, master) in enumerate(zip(params, masters, strict=True)):
            if number in plan.absent(step) or not p.requires_grad:
                master.grad = None
                continue
            parts = [slope(p, step, micro, number) * (plan.scale or 1.0) for micro in range(plan.micro)]
            total = torch.zeros_like(master)
            for part in parts:
                total += part.to(master.dtype)
            master.grad = total / (plan.scale or 1.0)
        if plan.clip is not None:
            norms.append(nn.utils.clip_grad_norm_(masters, plan.clip).item())
        optimizer.step()
        if plan.schedule:
            schedule.step()
    return Run([nn.Parameter(m.detach().to(p.dtype)) for p, m in zip(params, masters, strict=True)], optimizer,
               [m.detach() for m in masters], norms)  # fmt: skip


def assert_close_to(found: Run, expected: Run, tolerance: float = 1e-6) -> None:
    """Masters to the rounding of their type; weights are the masters, rounded."""
    for p, master, other in zip(found.params, found.masters, expected.masters, strict=True):
        # Additions in another order: a few units in the last place of what is summed, the weight or the larger update.
        torch.testing.assert_close(master, other, rtol=tolerance, atol=tolerance)
        assert torch.equal(p.detach(), master.to(p.dtype))
    assert found.norms == pytest.approx(expected.norms, rel=1e-6)


def assert_same_bits(a: Run, b: Run) -> None:
    """Weights, masters, state and norms."""
    for x, y in zip([*a.params, *a.masters], [*b.params, *b.masters], strict=True):
        assert torch.equal(bits(x.detach()), bits(y.detach()))
    assert_same_state(a.state, b.state)
    assert a.norms == b.norms


def assert_same_state(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].keys() == b[key].keys()
        for name, value in a[key].items():
            other = b[key][name]
            assert torch.equal(bits(value), bits(other)) if isinstance(value, Tensor) else value == other, (key, name)


def bits(tensor: Tensor) -> Tensor:
    """A copy of the bytes: NaN equals itself, and -0 is not 0."""
    return tensor.detach().resolve_conj().reshape(-1).clone().view(torch.uint8)
