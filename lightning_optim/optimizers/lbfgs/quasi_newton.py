"""The iterations of L-BFGS: direction, line search, pair. :class:`LBFGSOptim` wraps them for torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_optim.optimizers.lbfgs.byrd_nocedal import MIN_COSINE, CompactHistory, cosine, dot
from lightning_optim.optimizers.lbfgs.iterate import Iterate, Signature, count
from lightning_optim.optimizers.lbfgs.line_search import Point, armijo, estimate_noise, strong_wolfe
from lightning_optim.optimizers.lbfgs.options import EVALUATIONS, LBFGSOptions
from lightning_optim.warnings import warn_once

#: How much larger than the gradient's noise its change along a pair must be: c3 of Shi et al., and of their code.
C3 = 0.5
#: A pair may span up to this many times the step.
LENGTHEN = 8

#: Steps shorter than this fail if they move no weight. A longer step that moves none means that the end is reached.
FAR_BACK = 1e-3

Closure = Callable[[], Any]
Groups = Sequence[dict[str, Any]]


@dataclass
class Record:
    """What is kept besides the vectors.

    Attributes:
        name: The optimizer's name, for messages.
        noise: Relative error of the loss; None: to be measured.
        counts: What happened so far.
    """

    name: str
    noise: float | None
    counts: dict[str, int] = field(
        default_factory=lambda: {"iterations": 0, "evaluations": 0, "skipped_pairs": 0, "failed_searches": 0}
    )

    def failed(self, why: str, numbers: str) -> None:
        """Count a failed step, and warn about the reason the first time."""
        self.counts["failed_searches"] += 1
        said_once = "said once; counts['failed_searches'] goes on"
        warn_once(f"{self.name}: {why} ({numbers}; {said_once})", key=f"{self.name}: {why}")


class QuasiNewton:
    """The vectors and the history of L-BFGS, and its step.

    Args:
        layout: The layout of the trained parameters, with at least one element.
        options: The optimizer's options.

    Attributes:
        iterate: The weights and the direction.
        history: The pairs.
        gradient: The gradient at the weights, during a step and while ``loss`` is known.
        trial: The gradient at the point that was evaluated last.
        loss: The loss at the weights, if the next step is to start from it.
    """

    def __init__(self, layout: Signature, options: LBFGSOptions) -> None:
        history_dtype, dtype = options.dtypes(layout)
        self.layout = layout
        self.iterate = Iterate(layout, dtype)
        self.history = CompactHistory(count(layout), options.history_size, history_dtype)
        self.gradient, self.trial, self._displacement = (self.iterate.vector() for _ in range(3))
        self.loss: float | None = None

    def start_from(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Replace the history by these pairs (s, y)."""
        self.loss = None
        self.history.clear()
        for pair in pairs:
            padded = [self.iterate.vector() for _ in pair]
            for vector, values in zip(padded, pair, strict=True):
                vector[: values.numel()].copy_(values)
            self.history.add(*padded)

    def step(self, groups: Groups, closure: Closure, options: LBFGSOptions, record: Record) -> Any:
        """Make one step, of up to ``max_iter`` iterations.

        Args:
            groups: The optimizer's param groups.
            closure: Evaluates the model and leaves the gradients.
            options: The optimizer's options.
            record: The record, which is updated.

        Returns:
            What the closure returned at the weights before the step.
        """
        known, self.loss = self.loss, None
        if self.iterate.read(groups, record.name):
            known = None
        line = _Line(self, groups, closure, record)
        if known is None:
            first, value = line.evaluate()
            self.gradient, self.trial = self.trial, self.gradient
        else:
            first, value = torch.tensor(known, dtype=torch.float64, device="cpu"), known
        try:
            end = self._iterations(line, options, record, value)
        except BaseException:
            self.iterate.go(groups, 0.0)
            raise
        self.loss = end if options.reuse_evaluation else None
        return first

    def _iterations(self, line: _Line, options: LBFGSOptions, record: Record, value: float) -> float | None:
        """Run all iterations of a step; returns the loss at the end, or None if ``gradient`` does not belong to it."""
        if not (math.isfinite(value) and math.isfinite(dot(self.gradient, self.gradient))):
            record.failed("the loss or its gradient is not finite before the step, which is left out", f"loss {value}")
            return None
        limit = record.counts["evaluations"] - 1 + (options.max_eval or EVALUATIONS * options.max_iter)
        for iteration in range(options.max_iter):
            left = limit - record.counts["evaluations"]
            if left <= 0 or _largest(self.gradient) <= options.tolerance_grad:
                break
            slope = self._direction(line.groups)
            if not slope < 0:  # every lr is 0
                break
            if record.noise is None:
                record.noise = self._measure_noise(line, value)
            start = Point(0.0, value, slope)
            found = self._search(line, start, options, record.noise, min(EVALUATIONS, left))
            if found is not None and found.t < FAR_BACK and not self.iterate.moves(line.groups, found.t):
                found = None  # the search went back until no weight moves, where the loss is the old one
            if found is None and iteration > 0 and left < EVALUATIONS:
                line(0.0)  # the step's evaluations ran out during a search, which says nothing about its direction
                break
            if found is None:
                tried = record.counts["evaluations"] + left - limit
                line(0.0)  # the weights as they were, with their gradient
                self.history.clear()
                record.failed(
                    "the line search found no acceptable step: the weights are as before, and the history is dropped",
                    f"{tried} evaluations, loss {value:.6g}, slope {slope:.3g}",
                )
                return None
            if line.t != found.t:
                found = Point(found.t, *line(found.t))
            record.counts["skipped_pairs"] += not self._add_pair(line, start, found, options, record.noise)
            last = iteration + 1 == options.max_iter
            moved = math.inf if last else found.t * _largest(self.iterate.direction)
            self.iterate.accept(line.groups, found.t)
            self.gradient, self.trial = self.trial, self.gradient
            record.counts["iterations"] += 1
            change, value = abs(found.value - value), found.value
            if not last and min(change, moved) <= options.tolerance_change:
                break
        return value

    def _direction(self, groups: Groups) -> float:
        """Write the direction and return its slope."""
        slope = 0.0
        for _ in range(2):
            first = 1.0
            if not len(self.history):  # the scale is unknown: a step whose 1-norm is at most 1, as in torch
                first = min(1.0, 1.0 / float(torch.linalg.vector_norm(self.gradient, 1, dtype=torch.float64)))
            self.history.direction(self.gradient, first, out=self.iterate.direction)
            for group, bounds in zip(groups, self.iterate.bounds, strict=True):
                if (lr := float(group["lr"])) != 1:
                    self.iterate.direction[bounds].mul_(lr)
            slope = dot(self.gradient, self.iterate.direction)
            if slope < 0 and math.isfinite(slope):
                break
            self.history.clear()  # uphill: because of unequal lr, or of rounding in a bad history
        return slope

    def _search(self, line: _Line, start: Point, options: LBFGSOptions, noise: float, evaluations: int) -> Point | None:
        slack = 2 * max(noise, line.rounding) * abs(start.value)
        if options.line_search == "strong_wolfe":
            width = options.tolerance_change and options.tolerance_change / _largest(self.iterate.direction)
            return strong_wolfe(line, start, slack=slack, evaluations=evaluations, min_width=width)
        if options.line_search == "armijo":
            return armijo(line, start, slack=slack, evaluations=evaluations)
        found = Point(1.0, *line(1.0))
        return found if found.finite else None

    def _add_pair(self, line: _Line, start: Point, found: Point, options: LBFGSOptions, noise: float) -> bool:
        """Add the pair of two points, the second perhaps beyond the step; the weights end at the step."""
        end, needed = found, -math.inf
        if noise > 0:
            gradient, direction = (dot(v, v) ** 0.5 for v in (self.gradient, self.iterate.direction))
            needed = 2 * (1 + C3) * noise * gradient * direction
            while end.finite and end.slope - start.slope < needed and end.t < LENGTHEN * found.t:
                end = Point(2 * end.t, *line(2 * end.t))
        added = False
        if end.finite and end.slope - start.slope >= needed:
            self.iterate.displacement(line.groups, self._displacement)
            y = torch.sub(self.trial, self.gradient, out=self.gradient)  # the old gradient is no longer needed
            bound = options.min_curvature
            if cosine(self._displacement, y) > (MIN_COSINE[self.history.dtype] if bound is None else bound):
                self.history.add(self._displacement, y)
                added = True
        if end is not found:
            line(found.t)
        return added

    def _measure_noise(self, line: _Line, value: float) -> float:
        """The loss's relative error, from six more values on a line of some units in the last place of the weights."""
        coarsest = max(torch.finfo(dtype).eps for group in self.layout for _, dtype in group)
        weights, direction = (dot(v, v) ** 0.5 for v in (self.iterate.x, self.iterate.direction))
        distance = 8 * coarsest * (weights or 1.0) / direction
        noise = estimate_noise([value, *(line(i * distance)[0] for i in range(1, 7))])
        return min(noise / abs(value), 0.5) if value and math.isfinite(noise) else 0.0


class _Line:
    """The loss along the direction: sets the weights, evaluates, and leaves the gradient in ``trial``."""

    def __init__(self, work: QuasiNewton, groups: Groups, closure: Closure, record: Record) -> None:
        self.work, self.groups, self.closure, self.record = work, groups, closure, record
        self.t = 0.0  # where it was evaluated last
        self.rounding = 0.0  # the relative rounding error of the loss's own type

    def __call__(self, t: float) -> tuple[float, float]:
        self.t = t
        self.work.iterate.go(self.groups, t)
        _, value = self.evaluate()
        slope = dot(self.work.trial, self.work.iterate.direction)
        return (value, slope) if math.isfinite(value) and math.isfinite(slope) else (math.inf, math.nan)

    def evaluate(self) -> tuple[Any, float]:
        """Call the closure; returns what it returned, and the loss with weight decay."""
        with torch.enable_grad():
            loss = self.closure()
        self.record.counts["evaluations"] += 1
        if loss is None:
            raise RuntimeError(f"{self.record.name}: the closure returned None; it must return the loss")
        floating = isinstance(loss, Tensor) and loss.is_floating_point()
        self.rounding = torch.finfo(loss.dtype if floating else torch.float64).eps
        self.work.iterate.gradient(self.groups, self.work.trial)
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        return loss, value + self.work.iterate.decay(self.groups, self.work.trial)


def _largest(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, math.inf))
