"""Exposed time of an offloaded step on a simulated link: what lies between two passes.

It is from the end of the backward pass to the end of the next forward pass, less the time that this takes by itself.
For ways that wait in the step that is the time until all weights are there; with ``wait="forward"``, what layers wait
for.
The backward pass of :mod:`offload_ways` ends at a fixed time after its beginning; what makes it end later counts as
exposed. A copy over the link is sleep: a GPU's copy engine spares the processor the work. (Its memory traffic is left
out.) Bits are compared, and times measured a second time, on a link on which the processor does copy, and then sleeps
for the rest of the time: two cores copy 248 MB in 20 to 30 ms when they have nothing else to do, so that there the link
is slower than it should be, and in the way of the updates.

What is compared, all with the same link, the same weights and the same gradients:

- *serial*: nothing overlaps. Backward; all gradients to the host in bfloat16; cast, Adam, cast; all weights back.
- *as DeepSpeed*: what DeepSpeed's ZeRO stage 1 and 2 with offload do on one device (``stage_1_and_2.py`` of 0.19.8).
  In the backward pass each gradient is cast to float32 on the device, which costs the host nothing here, and copied to
  its place in one flat buffer: twice the bytes, overlapped. In the step: wait for the copies; a pass that scales the
  gradients if they are clipped (here not); Adam over the flat partition; a cast of the whole partition to bfloat16; one
  copy back. Its gathers, and its norms, which it takes on the device, are left out.
- ours: see :class:`~lightning_optim.offload.DetachedOptions`.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common import machine
from offload_ways import MODELS, Model, Ours, Serial, serial_adam
from torch import Tensor

from lightning_optim.offload.link import SimulatedLink
from lightning_optim.offload.trace import Trace
from lightning_optim.offload.transport import CopyTransport, Ticket

NEVER, ALWAYS = 1e9, 1e-3  # limits of the norm
WARM_UP = 2  # steps: a first one, and one that knows which gradients come

#: With milliseconds exposed, said before the first run: sums of the design's times per weight on another machine and
#: of bytes over 12 GB/s. gpt2: 6.4 ms until the embedding's gradient is there, 30 ms for its update, 20.7 ms for all
#: weights.
WAYS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, float]]] = {
    "serial": (Serial, {}, {"gpt2": 241, "even": 241}),
    "as DeepSpeed": (Serial, {"deepspeed": True}, {"gpt2": 168, "even": 157}),
    "one pass, no overlap": (Ours, {"overlap": False}, {"gpt2": 121, "even": 121}),
    "pipeline, clip=exact": (Ours, {"clip": "exact"}, {"gpt2": 106, "even": 103}),
    "pipeline, clip=exact, clipped": (Ours, {"clip": "exact", "max_norm": ALWAYS}, {"gpt2": 110, "even": 105}),
    "pipeline, clip=speculative": (Ours, {"clip": "speculative"}, {"gpt2": 67, "even": 41}),
    "pipeline, clip=speculative, not clipped": (
        Ours,
        {"clip": "speculative", "max_norm": NEVER},
        {"gpt2": 72, "even": 43},
    ),
    "pipeline, clip=speculative, clipped": (
        Ours,
        {"clip": "speculative", "max_norm": ALWAYS},
        {"gpt2": 350, "even": 320},
    ),
    "pipeline, clip=none": (Ours, {"clip": "none"}, {"gpt2": 57, "even": 36}),
    "pipeline, clip=exact, wait=forward": (Ours, {"clip": "exact", "wait": "forward"}, {"gpt2": 55, "even": 10}),
    "pipeline, clip=exact, wait=forward, bucket_mb=8": (
        Ours,
        {"clip": "exact", "wait": "forward", "bucket_mb": 8},
        {"gpt2": 53, "even": 8},
    ),
    "pipeline, clip=none, wait=forward": (Ours, {"clip": "none", "wait": "forward"}, {"gpt2": 50, "even": 16}),
    "pipeline, delay_one_step": (Ours, {"delay_one_step": True}, {"gpt2": 27, "even": 23}),
}


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        weights: About how many; None: all of GPT-2.
        backward: Seconds of a backward pass.
        forward: Seconds of a forward pass.
        bandwidth: Of the link, in bytes per second and direction.
        latency: Of a copy, in seconds.
        jitter: Copies take up to this share longer, and what is not there yet is NaN, if it is not 0.
        copies: Whether timed copies are done; else they only take their time.
    """

    weights: float | None = None
    backward: float = 0.4
    forward: float = 0.2
    bandwidth: float = 12e9
    latency: float = 20e-6
    jitter: float = 0.0
    copies: bool = False


class Link(SimulatedLink):
    """A link whose copies may be left out.

    Attributes:
        copies: Whether they are done.
    """

    copies = True

    def fetch(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str) -> Ticket:
        """See :meth:`Transport.fetch`. A copy of a tensor to itself is none."""
        return super().fetch(sources, targets if self.copies else sources, label)

    def send(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str, after: Any = None) -> Ticket:
        """See :meth:`Transport.send`."""
        return super().send(sources, targets if self.copies else sources, label, after)


class Bench:
    """Runs ways of stepping one model.

    Args:
        model: Its name.
        setting: What is simulated.
    """

    def __init__(self, model: str, setting: Setting) -> None:
        self.model, self.setting = model, setting
        self.layers = MODELS[model](setting.weights)
        torch.manual_seed(0)
        self.start, self.grads = (
            [[torch.randn(s).mul_(size).bfloat16() for s in layer.shapes] for layer in self.layers]
            for size in (0.02, 1e-3)
        )
        self._factor = 1.0
        self.weights = sum(g.numel() for layer in self.grads for g in layer)

    def run(self, name: str, steps: int) -> tuple[list[float], dict[str, float], list[Tensor]]:
        """Some steps of one way.

        Args:
            name: Of the way.
            steps: That are timed.

        Returns:
            Seconds exposed in each; what ended when in the last, in milliseconds from the end of the backward pass; the
            weights at the end.
        """
        make, options, _ = WAYS[name]
        setting = self.setting
        model = Model(self.layers, self.start, self.grads, setting.backward, setting.forward)
        trace = Trace()
        link = Link(setting.bandwidth, setting.latency, jitter=setting.jitter, poison=bool(setting.jitter), trace=trace)
        way = (
            Serial(model, link, serial_adam()[1], **options) if make is Serial else Ours(model, link, trace, **options)
        )
        exposed: list[float] = []
        try:
            model.forward()
            for step in range(WARM_UP + steps):
                self._change_gradients(step)
                link.copies = setting.copies or step < WARM_UP
                way.prepare()
                trace.events.clear()
                begin = model.backward()
                way.step()
                exposed.append(model.forward() - begin - setting.backward - setting.forward)
        finally:
            way.finish()
            self._restore_gradients()
        return exposed[WARM_UP:], _timeline(trace, begin + setting.backward), [p.detach() for p in model.flat]

    def reference(self, steps: int, **options: Any) -> list[Tensor]:
        """The weights after so many steps without a link, without overlap, and without a clock."""
        model = Model(self.layers, self.start, self.grads, 0.0)
        way = Ours(model, CopyTransport(), overlap=False, **options)
        for step in range(WARM_UP + steps):
            self._change_gradients(step)
            model.forward()
            model.backward()
            way.step()
        way.finish()
        self._restore_gradients()
        return [p.detach() for p in model.flat]

    def _change_gradients(self, step: int) -> None:
        """Exactly, and back again: what uses those of another step is found out."""
        self._multiply(-2.0 if step % 2 == 0 else -0.5)

    def _restore_gradients(self) -> None:
        self._multiply(1 / self._factor)

    def _multiply(self, factor: float) -> None:
        self._factor *= factor
        for layer in self.grads:
            torch._foreach_mul_(layer, factor)


def _timeline(trace: Trace, end: float) -> dict[str, float]:
    """When the last of each kind ended, and how long each kind took, after the backward pass; in milliseconds."""
    found = {}
    for kind in dict.fromkeys(event.kind for event in trace.events):
        events = [event for event in trace.of(kind) if event.end > end]
        if events:
            found[f"last {kind} ends"] = 1e3 * (max(event.end for event in events) - end)
            found[f"{kind}, in all"] = 1e3 * sum(event.end - max(event.begin, end) for event in events)
    return found


def _difference(weights: list[Tensor], expected: list[Tensor]) -> str:
    other = [(i, w, e) for i, (w, e) in enumerate(zip(weights, expected, strict=True)) if not torch.equal(w, e)]
    counts = {(i, tuple(w.shape)): int((w != e).sum()) for i, w, e in other[:5]}
    largest = max(float((w.float() - e.float()).abs().max()) for _, w, e in other)
    return f"not the weights of the serial step in {len(other)} tensors, by up to {largest}; of the first: {counts}"


def check(bench: Bench, names: Sequence[str]) -> dict[str, bool]:
    """Whether a link with jitter, on which nothing may be read too early, changes any bit of any way of ours."""
    same = {}
    references: dict[Any, list[Tensor]] = {}
    for name in names:
        make, options, _ = WAYS[name]
        if make is not Ours:
            continue
        max_norm = options.get("max_norm")
        if max_norm not in references:
            references[max_norm] = bench.reference(3, max_norm=max_norm)
        weights = bench.run(name, 3)[2]
        same[name] = all(map(torch.equal, weights, references[max_norm]))
        assert same[name], f"{bench.model}, {name}: {_difference(weights, references[max_norm])}"
    return same


def run(setting: Setting, *, models: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    """Measure.

    Args:
        setting: What is simulated.
        models: Names.
        rounds: Every way has its turn so often.
        steps: Of each turn.
    """
    small = replace(
        setting,
        weights=min(setting.weights or 7.78e6, 7.78e6),
        backward=min(setting.backward, 0.03),
        forward=min(setting.forward, 0.015),
        jitter=2.0,
        copies=True,
    )
    bits = {model: check(Bench(model, small), list(WAYS)) for model in models}
    cases = []
    for model in models:
        bench = Bench(model, setting)
        exposed: dict[str, list[float]] = {name: [] for name in WAYS}
        timelines: dict[str, dict[str, float]] = {}
        finals: dict[float | None, list[Tensor]] = {}
        for _ in range(rounds):
            for name, (make, options, _) in WAYS.items():
                times, timelines[name], weights = bench.run(name, steps)
                exposed[name] += times
                if make is Ours and setting.copies:
                    # The first of them that clips so is the one without overlap, or compared with it by `check`.
                    first = finals.setdefault(options.get("max_norm"), weights)
                    assert all(map(torch.equal, weights, first)), f"{model}, {name}: {_difference(weights, first)}"
                del weights
                gc.collect()
        rows = _rows(model, exposed, timelines, setting.weights is None)
        cases.append({"model": model, "weights": bench.weights, "rows": rows})
        for row in rows:
            print(f"{model:>5} {row['name']:42} {row['exposed_ms']:8.1f} ms {row['of_serial']:6.1%}", flush=True)
        del bench, finals
        gc.collect()
    return {
        "machine": {**machine(), "serial_optimizer": serial_adam()[0]},
        "setting": asdict(setting),
        "cases": cases,
        "bit_equal_under_jitter": {"setting": asdict(small), **bits},
    }


def _rows(
    model: str, exposed: dict[str, list[float]], timelines: dict[str, dict[str, float]], full: bool
) -> list[dict[str, Any]]:
    medians = {name: statistics.median(times) for name, times in exposed.items()}
    return [
        {
            "name": name,
            "exposed_ms": 1e3 * medians[name],
            "predicted_ms": WAYS[name][2][model] if full else None,
            "of_serial": medians[name] / medians["serial"],
            "of_deepspeed": medians[name] / medians["as DeepSpeed"],
            "spread_ms": [1e3 * min(times), 1e3 * max(times)],
            "timeline_ms": timelines[name],
        }
        for name, times in exposed.items()
    ]
