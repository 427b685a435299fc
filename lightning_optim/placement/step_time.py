"""How long a step takes in each placement, and how much of it the backward pass hides: arithmetic, not measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_optim.checks import NONNEGATIVE, check_choice, check_number

#: How a detached step clips: by the exact norm, after the last bucket; speculatively, with updates during the backward
#: pass that are undone when the norm demands it; or not at all.
ClipMode = Literal["exact", "speculative", "none"]
CLIP_MODES: tuple[ClipMode, ...] = get_args(ClipMode)

#: Bytes of a bucket in the detached pipeline by default: large enough for a link's full speed, small enough to start
#: early.
BUCKET_BYTES = 32 * 10**6

#: Time of a host pass that can be undone, which writes masters and state to a second place, relative to one in place:
#: 1.36 ns to 0.78 ns per weight (AdamW, 1e8 weights, two cores with AVX-512). The ratio is larger than that of the
#: bytes, because a pass in place writes what it has just read into the cache.
SPECULATIVE_FACTOR = 1.75


@dataclass(frozen=True)
class Stages:
    """The three stages of a detached step, each in seconds for the whole model.

    Attributes:
        to_host: Seconds to move the gradients over the link.
        on_host: Seconds of the optimizer's pass over host memory.
        to_device: Seconds to move the weights over the link.
        buckets: Number of buckets.
        whole: Whether the host makes one pass over everything: it begins after the last gradient, and no weight leaves
            before its end.

    >>> stages = Stages(to_host=0.02, on_host=0.08, to_device=0.02, buckets=8)
    >>> round(stages.serial, 4), round(stages.pipelined, 4)
    (0.12, 0.085)
    """

    to_host: float
    on_host: float
    to_device: float
    buckets: int
    whole: bool = False

    @property
    def serial(self) -> float:
        """Seconds of the three stages, one after the other."""
        return self.to_host + self.on_host + self.to_device

    @property
    def pipelined(self) -> float:
        """Seconds if all gradients are there at the start: the slowest stage, plus one bucket's time in the others."""
        if self.whole:
            return self.serial
        slowest = max(self.to_host, self.on_host, self.to_device)
        return slowest + (self.serial - slowest) / self.buckets

    def exposed(self, clip: ClipMode, backward: float = 0.0) -> float:
        """Seconds between the end of the backward pass and the arrival of the last weight.

        Gradients are taken to arrive evenly over the backward pass, as many bytes in one half of it as in the other.
        The next forward pass could begin earlier, since it waits for each bucket by itself; that is not counted.

        Args:
            clip: How gradients are clipped.
            backward: Seconds of the backward pass; 0: nothing is hidden.

        Raises:
            ValueError: The mode is unknown, or not possible in one whole pass; or the time is negative.
        """
        check_choice("", "clip", clip, CLIP_MODES)
        if self.whole and clip != "exact":
            raise ValueError(f"clip={clip!r} with one pass for everything; valid: exact")
        check_number("", "backward", backward, NONNEGATIVE.described("seconds, a finite number >= 0"))
        if clip == "exact":
            # The host's pass and the way back wait for the norm, which waits for the last gradient.
            rest = replace(self, to_host=0.0).pipelined
            return self._late(self.to_host, backward) + self.to_host / self.buckets + rest
        stages = replace(self, on_host=self.on_host * SPECULATIVE_FACTOR) if clip == "speculative" else self
        slowest = max(stages.to_host, stages.on_host, stages.to_device)
        return self._late(slowest, backward) + stages.serial / self.buckets

    def _late(self, stage: float, backward: float) -> float:
        """Seconds that a stage lags behind when the last bucket comes, if buckets come faster than it takes them."""
        return (self.buckets - 1) * max(0.0, stage - backward) / self.buckets
