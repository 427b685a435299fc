"""AdaGC's averages of the clipped norms of each tensor, kept and compared on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.control.clipping.gradients import Gradient
from lightning_optim.control.clipping.ways import AdaGC

#: As in the authors' code, in both of its divisions.
EPS = 1e-6


class Averages:
    """The factor of each tensor's gradient, by AdaGC.

    Whether the warm-up is over is decided on the device too: a step that a loss scaler skips does not count, and only
    the device knows of it in time.

    Args:
        options: The options.
    """

    def __init__(self, options: AdaGC) -> None:
        self.options = options
        self._steps: Tensor | None = None
        self._known: dict[str, Tensor] = {}
        # Of the parameters of the last step, which most often are those of the next one: averages, in place of those
        # in the dict, and floors. An average is NaN until there is a gradient other than zero.
        self._keys: tuple[str, ...] = ()
        self._averages: Tensor | None = None
        self._floors: Tensor | None = None

    def factors(self, gradients: Sequence[Gradient], norms: Tensor, total: Tensor) -> Tensor:
        """The factor of each gradient; the averages follow.

        Args:
            gradients: The gradients.
            norms: The norm of each.
            total: The global norm.
        """
        o, device = self.options, norms.device
        keys = tuple(gradient.key for gradient in gradients)
        if self._steps is None:
            self._steps = torch.zeros((), dtype=torch.int64, device=device)
        steps = self._steps = self._steps.to(device)
        if keys != self._keys or self._averages is None or self._floors is None:
            self._prepare(keys, gradients, norms)
        assert self._averages is not None and self._floors is not None  # noqa: S101, PT018 # `_prepare` has made them
        old = self._averages

        warms_up, seen = steps < o.warmup_steps, ~old.isnan()
        average = torch.maximum(old, self._floors)  # NaN stays
        bound = torch.where(seen, o.ratio * average, o.max_norm)
        own = torch.where(norms > bound, bound / (norms + EPS), 1.0)
        factors = torch.where(warms_up, (o.max_norm / (total + EPS)).clamp(max=1.0), own)

        clipped = torch.where(warms_up, norms * factors, torch.minimum(norms, bound))
        least = torch.fmin(old, clipped)  # takes the number where one of them is NaN
        moved = torch.where(seen, o.beta * average + (1 - o.beta) * clipped, clipped)
        new = torch.where(warms_up, least, moved)
        # A gradient of zero tells nothing of its tensor's scale; one that is not finite, nothing of any.
        finite = total.isfinite()
        self._averages = torch.where(finite & (norms > 0), new, old)
        self._steps = steps + finite
        return factors

    def _prepare(self, keys: tuple[str, ...], gradients: Sequence[Gradient], norms: Tensor) -> None:
        """Gather the averages and the floors of other parameters than those of the last step."""
        averages = self._all()
        unseen = torch.full((), math.nan, dtype=norms.dtype, device=norms.device)
        sizes = [gradient.param.numel() for gradient in gradients]
        shares = [self.options.floor * self.options.max_norm * math.sqrt(size / (sum(sizes) or 1)) for size in sizes]
        # One by one, as a list is copied to a device only when that has finished its work.
        self._floors = torch.stack([torch.full_like(unseen, share) for share in shares])
        self._averages = torch.stack([averages.get(key, unseen).to(norms) for key in keys])
        self._keys, self._known = keys, averages

    def _all(self) -> dict[str, Tensor]:
        """The average of every parameter that has had a gradient."""
        last = () if self._averages is None else self._averages.unbind()
        return self._known | dict(zip(self._keys, last, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The count of steps, and the average of each parameter that has had a gradient."""
        none = torch.zeros((), dtype=torch.int64, device="cpu")
        steps = none if self._steps is None else self._steps.clone()
        return {"steps": steps, "averages": {key: average.clone() for key, average in self._all().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self._steps = state["steps"].clone()
        self._known = {key: average.clone() for key, average in state["averages"].items()}
        self._keys, self._averages, self._floors = (), None, None
