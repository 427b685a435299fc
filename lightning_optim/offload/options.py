"""The options of detached steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lightning_optim.checks import POSITIVE_FINITE, SHARE, check_choice, check_ranges, check_switch
from lightning_optim.engines.base import dtype_name
from lightning_optim.engines.choice import requested_engine
from lightning_optim.engines.scaling import LossScale
from lightning_optim.stepping.options import parse_dtype

#: When updates are done, if the gradients' norm may change them: see :class:`DetachedOptions`.
Clip = Literal["exact", "speculative", "none"]
CLIPS: tuple[Clip, ...] = get_args(Clip)

#: Where new weights are waited for: see :class:`DetachedOptions`.
Wait = Literal["step", "forward"]
WAITS: tuple[Wait, ...] = get_args(Wait)

MASTER_DTYPES = (torch.float32, torch.float64)

_RANGES = {"bucket_mb": POSITIVE_FINITE.described("megabytes, more than 0"), "device_fraction": SHARE}


@dataclass(frozen=True)
class DetachedOptions:
    """The options of detached steps.

    Attributes:
        master_dtype: The type of the master weights: ``"float32"`` or ``"float64"``.
        clip: ``"exact"``: updates wait for the norm of all gradients. ``"speculative"``: updates run during the
            backward pass as if nothing was to be clipped; if that was wrong, they are undone, bit for bit, and done
            again. It needs host memory for the old masters and state; the results are those of ``"exact"``.
            ``"none"``: updates run during the backward pass, and there may be no clipping and no loss scale; a step
            raises RuntimeError if an update turns out to have been too early.
        bucket_mb: Megabytes (1e6 bytes) of gradients that travel together.
        device_fraction: The share of the weights whose masters and state stay on the device, from 0 to 1: those whose
            gradients come last, and whose way to the host and back nothing would hide.
        delay_one_step: The update runs beside the next forward pass, and beside the backward pass until its first
            bucket is complete. These passes use the weights before the update: an approximation (ZeRO-Offload's
            "one-step delayed parameter update"). Only for optimizers that our engines step.
        engine: The engine of our optimizers, and of those of torch's that we step.
        wait: ``"step"``: a step ends when all weights have arrived, or when the next work on the device waits for them.
            ``"forward"``: a step ends at once, and in the next forward pass each module waits, when it is called, for
            the weights that it owns: later layers are updated beside the first layers' forward pass. Code that reads
            weights in another way must call :meth:`~lightning_optim.offload.Detached.publish` first. The results are
            the same. Only for optimizers that our engines step.

    Raises:
        ValueError: A value is not valid.

    >>> DetachedOptions(clip="sometimes")
    Traceback (most recent call last):
        ...
    ValueError: clip='sometimes'; valid: exact, speculative, none
    """

    master_dtype: str | torch.dtype = "float32"
    clip: Clip = "exact"
    bucket_mb: float = 32.0
    device_fraction: float = 0.0
    delay_one_step: bool = False
    engine: str = "auto"
    wait: Wait = "step"

    def __post_init__(self) -> None:
        """Check the options."""
        if parse_dtype("master_dtype", self.master_dtype) not in MASTER_DTYPES:
            valid = ", ".join(map(dtype_name, MASTER_DTYPES))
            raise ValueError(f"master_dtype={self.master_dtype!r}; valid: {valid}")
        check_choice("", "clip", self.clip, CLIPS)
        check_ranges("", self, _RANGES)
        check_switch("", "delay_one_step", self.delay_one_step)
        if self.delay_one_step and self.clip != "exact":
            raise ValueError(
                f"delay_one_step=True with clip={self.clip!r}: an update that is late cannot be early; valid: one of "
                "them, delay_one_step=False or clip='exact'"
            )
        if self.delay_one_step and self.device_fraction:
            raise ValueError(
                f"delay_one_step=True with device_fraction={self.device_fraction!r}: weights on the device would "
                "change while they are used; valid: one of them"
            )
        check_choice("", "wait", self.wait, WAITS)
        if self.wait == "forward" and self.delay_one_step:
            raise ValueError("wait='forward' with delay_one_step=True, which waits for nothing; valid: wait='step'")
        requested_engine(self.engine)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the masters."""
        dtype = parse_dtype("master_dtype", self.master_dtype)
        assert dtype is not None  # noqa: S101 # checked above
        return dtype

    def check_step(self, max_norm: float | None, loss: LossScale | None) -> None:
        """Check that a step can be done as asked.

        Raises:
            ValueError: It cannot.
        """
        if self.clip == "none" and (max_norm is not None or loss is not None):
            what = "gradients are to be clipped" if max_norm is not None else "the loss is scaled"
            raise ValueError(f"clip='none', and {what}; valid: clip='exact' or clip='speculative'")

    def described(self) -> str:
        """The options in words."""
        words = f"masters in {dtype_name(self.dtype)}, clip={self.clip!r}, buckets of {self.bucket_mb:g} MB"
        words += f", {self.device_fraction:.0%} on the device" if self.device_fraction else ""
        words += ", waited for in the forward pass" if self.wait == "forward" else ""
        return words + (", delayed by one step (approximate)" if self.delay_one_step else "")
