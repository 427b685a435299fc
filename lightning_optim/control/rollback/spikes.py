"""Loss spikes: a loss that is far above the recent ones, judged by numbers that are the same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_optim.checks import Range, above, check_choice, check_ranges, whole

#: The scale on which losses are averaged and compared.
Scale = Literal["log", "linear"]
SCALES = ("log", "linear")

#: The verdict about a loss. A suspect is a spike that has not lasted long enough yet.
Verdict = Literal["fine", "suspect", "spike"]


@dataclass(frozen=True)
class SpikePolicy:
    """What a spike is. A loss that is NaN or infinite always is one, at once.

    Args:
        threshold: Standard deviations above the running mean. 7, as in OLMo 2's "spike score". (ZClip's 2.5 are for
            gradient norms, and mean a smaller step; a false alarm here costs a step.)
        window: Number of losses over which mean and deviation are averaged, exponentially. As to 100: OLMo 2 looks back
            over 1000, ZClip over some 30 (its factor is 0.97); PaLM went back by 100 steps to be clear of a spike.
        warmup_steps: Number of losses before one can be a spike by its size. The default is ``window``, after which the
            mean begins to forget.
        min_ratio: Multiple of the running mean that a spike must exceed, however small the deviation is: a smaller rise
            is not worth a step. The default is our own choice.
        patience: How many high losses in a row make a spike. With more than 1, all steps since the first are undone
            together.
        scale: ``"log"`` compares logarithms, for losses that are positive and fall by orders of magnitude; a loss of
            zero or less sets it to ``"linear"`` from there on.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of its range.

    References:
        OLMo Team, 2 OLMo 2 Furious, arXiv:2501.00656 (the spike score). Kumar et al., ZClip: Adaptive Spike Mitigation
        for LLM Pre-Training, arXiv:2504.02507. Chowdhery et al., PaLM, arXiv:2204.02311, section 5.1.

    Example:
        >>> SpikePolicy(threshold=6.0).window
        100
        >>> SpikePolicy(threshold=-1.0)
        Traceback (most recent call last):
        ValueError: SpikePolicy: threshold=-1.0; valid: a finite number > 0
    """

    threshold: float = 7.0
    window: int = 100
    warmup_steps: int | None = None
    min_ratio: float = 1.1
    patience: int = 1
    scale: Scale = "log"

    #: The valid values of each number, and of each word.
    ranges: ClassVar[Mapping[str, Range]] = {
        "threshold": above(0),
        "window": whole(2),
        "warmup_steps": whole(1).or_none(),
        "min_ratio": above(1),
        "patience": whole(1),
    }
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"scale": SCALES}

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_ranges(name, self, self.ranges)
        for option, words in self.choices.items():
            check_choice(name, option, getattr(self, option), words)

    @property
    def warmup(self) -> int:
        """Number of losses before one can be a spike by its size."""
        return self.window if self.warmup_steps is None else self.warmup_steps


class SpikeDetector:
    """Judges losses one after the other; a function of nothing but the losses it was given.

    Mean and variance are exponential averages, plain ones until ``window`` losses are there. Spikes and suspects do not
    enter them; a loss further below the mean than the limit is above it enters as if it were just that far below.

    Args:
        policy: What a spike is.

    Example:
        >>> detector = SpikeDetector(SpikePolicy(warmup_steps=4))
        >>> [detector.judge(loss) for loss in (2.0, 2.1, 1.9, 2.0, 2.05, 9.0, float("nan"), 2.0)]
        ['fine', 'fine', 'fine', 'fine', 'fine', 'spike', 'spike', 'fine']
    """

    def __init__(self, policy: SpikePolicy) -> None:
        self.policy = policy
        self._linear = policy.scale == "linear"
        self._seen = 0
        self._mean = 0.0
        self._variance = 0.0
        self._suspects = 0

    @property
    def expected(self) -> float | None:
        """The running mean (on the log scale, the geometric mean); None before the first loss."""
        if not self._seen:
            return None
        return self._mean if self._linear else _exp(self._mean)

    @property
    def limit(self) -> float:
        """A loss above this limit is a spike; infinite during the warm-up."""
        if self._seen < self.policy.warmup:
            return math.inf
        limit = self._mean + self._width
        return limit if self._linear else _exp(limit)

    def judge(self, loss: float) -> Verdict:
        """Judge the next loss."""
        if not math.isfinite(loss):
            self._suspects = 0
            return "spike"
        if loss <= 0 and not self._linear:
            self._linear = True
            self.restart()
        if loss > self.limit:
            self._suspects += 1
            if self._suspects < self.policy.patience:
                return "suspect"
            self._suspects = 0
            return "spike"
        self._suspects = 0
        self._add(loss if self._linear else math.log(loss))
        return "fine"

    def restart(self) -> None:
        """Forget all losses and begin a warm-up, at a new level."""
        self._seen, self._mean, self._variance, self._suspects = 0, 0.0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """The detector's state, as primitives."""
        return {
            "linear": self._linear,
            "seen": self._seen,
            "mean": self._mean,
            "variance": self._variance,
            "suspects": self._suspects,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another detector was; the policy stays this one's.

        Raises:
            ValueError: This is not the state of a detector.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError(
                f"not a SpikeDetector's state: it has {sorted(state_dict)}; valid: {sorted(self.state_dict())}"
            )
        # A linear policy stays linear; a log policy may have become linear at a loss of zero or less.
        linear = bool(state_dict["linear"]) or self.policy.scale == "linear"
        if linear != state_dict["linear"]:
            self._linear = linear
            self.restart()
            return
        self._linear = linear
        self._seen, self._suspects = int(state_dict["seen"]), int(state_dict["suspects"])
        self._mean, self._variance = float(state_dict["mean"]), float(state_dict["variance"])

    @property
    def _width(self) -> float:
        least = (self.policy.min_ratio - 1) * abs(self._mean) if self._linear else math.log(self.policy.min_ratio)
        return max(self.policy.threshold * math.sqrt(self._variance), least)

    def _add(self, value: float) -> None:
        if self._seen >= self.policy.warmup:
            value = max(value, self._mean - self._width)
        self._seen += 1
        weight = max(1 / self._seen, 1 / self.policy.window)
        delta = value - self._mean
        self._mean += weight * delta
        # West's update: with 1/n for a weight it is the variance of the n values.
        self._variance = (1 - weight) * (self._variance + weight * delta * delta)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
