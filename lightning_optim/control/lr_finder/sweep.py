"""The numbers of a range test: which learning rates are tried, the smoothed losses, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_optim.checks import FRACTION, POSITIVE_FINITE, above, check_choice, check_number, whole

Mode = Literal["exponential", "linear"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: Fewer points show no curve: a suggestion takes the slope over several of them.
LEAST_STEPS = 10


@dataclass(frozen=True)
class LRRange:
    """The learning rates of a range test, one for each optimizer step.

    Args:
        min_lr: The first one.
        max_lr: The last one.
        steps: How many there are.
        mode: ``"exponential"``: equal ratios between them; ``"linear"``: equal differences.
        who: Whose options these are, for errors.

    Raises:
        ValueError: A value is out of its range, or ``min_lr`` is not below ``max_lr``.

    Example:
        >>> [f"{lr:.0e}" for lr in LRRange(1e-9, 1.0, steps=10)]
        ['1e-09', '1e-08', '1e-07', '1e-06', '1e-05', '1e-04', '1e-03', '1e-02', '1e-01', '1e+00']
    """

    min_lr: float = 1e-7
    max_lr: float = 10.0
    steps: int = 100
    mode: Mode = "exponential"
    who: str = "LRRange"

    def __post_init__(self) -> None:
        for name in ("min_lr", "max_lr"):
            check_number(self.who, name, getattr(self, name), POSITIVE_FINITE)
        check_number(self.who, "steps", self.steps, whole(LEAST_STEPS))
        check_choice(self.who, "mode", self.mode, MODES)
        if self.min_lr >= self.max_lr:
            raise ValueError(f"{self.who}: min_lr={self.min_lr!r}, max_lr={self.max_lr!r}; valid: min_lr < max_lr")

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[float]:
        for step in range(self.steps):
            share = step / (self.steps - 1)
            if self.mode == "linear":
                yield self.min_lr + share * (self.max_lr - self.min_lr)
            else:
                yield math.exp((1 - share) * math.log(self.min_lr) + share * math.log(self.max_lr))


class Sweep:
    """The losses of a range test so far, and whether it goes on.

    The losses are smoothed by an exponential moving average with correction of its bias. The test ends early where the
    loss is not finite, or where the smoothed loss has risen above its best value by ``divergence - 1`` times that
    value, or that many times what it had fallen by before, whichever is more. (The second makes the rule right for
    losses near zero, and below it.)

    Args:
        smoothing: Decay rate of the average; 0: the losses as they are.
        divergence: See above; None: the test ends early only where the loss is not finite.
        who: Whose options these are, for errors.

    Attributes:
        lrs: The learning rates.
        losses: The loss at each one, before the step with it.
        smoothed: The average after each.
        stopped: Why the test ended early, in words; None: it did not.

    Raises:
        ValueError: A value is out of its range.

    Example:
        >>> sweep = Sweep(smoothing=0.0, divergence=4.0)
        >>> [sweep.add(0.1 * 2**step, loss) for step, loss in enumerate([1.0, 0.5, 1.5, 3.0])]
        [True, True, True, False]
        >>> sweep.stopped
        'the loss diverged at lr=0.8'
    """

    def __init__(self, smoothing: float = 0.8, divergence: float | None = 4.0, who: str = "Sweep") -> None:
        self._smoothing = float(check_number(who, "smoothing", smoothing, FRACTION))
        self._divergence = check_number(who, "divergence", divergence, above(1).or_none())
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.stopped: str | None = None
        self._average = 0.0
        self._weight = 0.0

    def add(self, lr: float, loss: float) -> bool:
        """Add a point; a loss that is not finite ends the test, and is left out.

        Args:
            lr: The learning rate of a step.
            loss: The loss before it.

        Returns:
            Whether the test goes on.
        """
        if not math.isfinite(loss):
            self.stopped = f"the loss became {loss} at lr={lr:.3g}"
            return False
        # The correction of the bias divides by the sum of the weights: with 0.9 they are 0.1, 0.19, 0.271, ...
        self._average = self._smoothing * self._average + (1 - self._smoothing) * loss
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)
        self.lrs.append(lr)
        self.losses.append(loss)
        self.smoothed.append(self._average / self._weight)
        if self._divergence is not None:
            best = min(self.smoothed)
            if self.smoothed[-1] > best + (self._divergence - 1) * max(abs(best), self.smoothed[0] - best):
                self.stopped = f"the loss diverged at lr={lr:.3g}"
        return self.stopped is None
