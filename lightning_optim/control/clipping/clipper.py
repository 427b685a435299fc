"""Clips the gradients of an optimizer in place, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from lightning_optim.checks import POSITIVE_FINITE, check_number, check_switch
from lightning_optim.control.clipping.averages import Averages
from lightning_optim.control.clipping.gradients import (
    Gradient,
    clamp,
    gradients_of,
    nonfinite,
    norm_of_units,
    scale,
    scale_each,
    share,
    tensor_norms,
    unit_norms,
)
from lightning_optim.control.clipping.ways import AGC, AdaGC

#: As in ``torch.nn.utils.clip_grad_norm_``.
NORM_EPS = 1e-6

#: As in AGC's paper: where the gradient of a unit is smaller than this, it is not divided by.
UNIT_EPS = 1e-6

Params = Optimizer | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


class NonfiniteGradientError(RuntimeError):
    """Gradients are infinite or NaN."""


@dataclass(frozen=True)
class Clipped:
    """What clipping did to the gradients of one step, as 0-dim tensors: whoever reads one waits for its device.

    Attributes:
        norm_before: The global norm before clipping.
        norm_after: The global norm after it.
        share: The share that was clipped: of steps (0 or 1) with a global norm, of elements by value, of units with
            AGC, of tensors with AdaGC.
    """

    norm_before: Tensor
    norm_after: Tensor
    share: Tensor

    @classmethod
    def to_norm(cls, norm: Tensor, max_norm: float) -> Clipped:
        """The record of clipping a global norm.

        Args:
            norm: The norm before.
            max_norm: The limit.
        """
        factor = norm_factor(norm, max_norm)
        return cls(norm, norm * factor, (factor < 1).to(torch.float32))


class GradientClipper:
    """Clips gradients by one of four ways.

    Gradients are to be final when they are clipped: accumulated, averaged over processes, and unscaled, for which
    :meth:`clip` can be given the scaler. Norms are of the whole gradient where it is divided over processes (DTensors
    of FSDP2 and tensor parallelism), and are summed in float32 whatever the gradients are stored in. One clipper is for
    one optimizer.

    Args:
        max_norm: Clip the global norm to this, as ``torch.nn.utils.clip_grad_norm_`` does.
        max_value: Clip every element to ``[-max_value, max_value]``.
        agc: Clip each unit by the norm of its weights: see :class:`AGC`; a number is its ``clip_factor``.
        adagc: Clip each tensor by its own past norms: see :class:`AdaGC`; a number is its ``ratio``.
        error_if_nonfinite: Raise an error if a gradient is infinite or NaN. This reads a number back from the device
            at every step, and so waits for it.

    Raises:
        ValueError: Not exactly one way is given, or an option is out of its range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> clipper = GradientClipper(max_norm=1.0)
        >>> (3 * weight).sum().backward()
        >>> clipped = clipper.clip(optimizer)
        >>> weight.grad, float(clipped.norm_before)
        (tensor([0.5000, 0.5000, 0.5000, 0.5000]), 6.0)
    """

    #: Who it is, in errors.
    _called: ClassVar[str] = "GradientClipper"

    def __init__(
        self,
        max_norm: float | None = None,
        max_value: float | None = None,
        agc: float | AGC | None = None,
        adagc: float | AdaGC | None = None,
        error_if_nonfinite: bool = False,
    ) -> None:
        who = self._called
        ways = {"max_norm": max_norm, "max_value": max_value, "agc": agc, "adagc": adagc}
        given = {name: value for name, value in ways.items() if value is not None}
        if len(given) != 1:
            named = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none of them"
            raise ValueError(f"{who}: {named}; valid: exactly one of {', '.join(ways)}")
        number = POSITIVE_FINITE.or_none()
        self.max_norm = check_number(who, "max_norm", max_norm, number)
        self.max_value = check_number(who, "max_value", max_value, number)
        self.agc = _options(who, "agc", agc, AGC, "clip_factor")
        self.adagc = _options(who, "adagc", adagc, AdaGC, "ratio")
        self.error_if_nonfinite = check_switch(who, "error_if_nonfinite", error_if_nonfinite)
        self._averages = None if self.adagc is None else Averages(self.adagc)
        self._excluded: tuple[Mapping[Tensor, str], set[str]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies: without the parameters."""
        return {**self.__dict__, "_excluded": None}

    @torch.no_grad()
    def clip(
        self,
        params: Params,
        *,
        scaler: torch.amp.GradScaler | None = None,
        names: Mapping[Tensor, str] | None = None,
        measure: bool = True,
    ) -> Clipped | None:
        """Clip the gradients in place.

        Args:
            params: An optimizer, or parameters, or ``model.named_parameters()``.
            scaler: The loss scaler; the optimizer's gradients are then unscaled first, if they are not yet. A step
                that it is going to skip raises no error for its infinite gradients.
            names: The parameters' names, for errors, patterns and the state; default: those that ``params`` has.
            measure: Whether a record is wanted. By value it costs two more passes over the gradients, else nothing.

        Returns:
            What was done; None if there is no gradient, or no record is wanted.

        Raises:
            NonfiniteGradientError: (with ``error_if_nonfinite``) A gradient is infinite or NaN; nothing is changed.
            TypeError: A scaler is given without an optimizer.
            ValueError: A pattern of AGC's ``exclude`` is that of no name.
        """
        listed, known = _listed(params)
        names = known if names is None else names
        gradients = gradients_of(listed, names)
        if not gradients:
            return None
        skipped = scaler is not None and scaler.is_enabled() and self._unscale(scaler, params)
        if self.max_value is not None:
            return self._by_value(gradients, self.max_value, measure, skipped)
        if self.agc is not None:
            return self._by_unit(gradients, self.agc, names, skipped)
        norms = tensor_norms(gradients)
        total = torch.linalg.vector_norm(norms)
        self._check(total, gradients, skipped)
        if self.max_norm is not None:
            scale(gradients, norm_factor(total, self.max_norm))
            return Clipped.to_norm(total, self.max_norm)
        assert self._averages is not None  # noqa: S101 # it is the last of the ways
        factors = self._averages.factors(gradients, norms, total)
        scale_each(gradients, factors.unbind())
        return Clipped(total, torch.linalg.vector_norm(norms * factors), (factors < 1).float().mean())

    def state_dict(self) -> dict[str, Any]:
        """The state, which AdaGC alone has: a dict of tensors."""
        return {} if self._averages is None else self._averages.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: The state is of another way of clipping.
        """
        if bool(state) != (self._averages is not None):
            has = "that of AdaGC" if state else "empty"
            raise ValueError(
                f"{self._called}: the state is {has}, and adagc={self.adagc!r}; valid: the way of clipping with "
                "which the state was saved"
            )
        if self._averages is not None:
            self._averages.load_state_dict(state)

    def _unscale(self, scaler: torch.amp.GradScaler, params: Params) -> bool:
        """Unscale gradients that are not yet; whether the step is going to be skipped, if somebody has to know."""
        if not isinstance(params, Optimizer):
            raise TypeError(
                "clip(scaler=...) needs the optimizer, whose gradients the scaler unscales; valid: clip(optimizer)"
            )
        state = scaler._per_optimizer_states[id(params)]
        if state["stage"] is OptState.READY:
            scaler.unscale_(params)
        flags = scaler._per_optimizer_states[id(params)]["found_inf_per_device"].values()
        return self.error_if_nonfinite and any(bool(flag.item()) for flag in flags)

    def _check(self, total: Tensor, gradients: Sequence[Gradient], skipped: bool) -> None:
        if not self.error_if_nonfinite or skipped or math.isfinite(total.item()):
            return
        if not (named := nonfinite(gradients)):
            raise NonfiniteGradientError("the gradients are finite, but the sum of their squares is not")
        more = f" and {len(named) - 10} more" if len(named) > 10 else ""
        raise NonfiniteGradientError(
            f"gradients are infinite or NaN: those of {', '.join(named[:10])}{more} (of {len(gradients)} parameters)"
        )

    def _by_value(self, gradients: Sequence[Gradient], limit: float, measure: bool, skipped: bool) -> Clipped | None:
        before = torch.linalg.vector_norm(tensor_norms(gradients)) if measure or self.error_if_nonfinite else None
        if before is not None:
            self._check(before, gradients, skipped)
        if not measure or before is None:
            clamp(gradients, limit)
            return None
        beyond = [(gradient.values.abs() > limit).sum() for gradient in gradients]
        clipped = share(beyond, [g.shards for g in gradients], sum(g.elements for g in gradients))
        clamp(gradients, limit)
        return Clipped(before, torch.linalg.vector_norm(tensor_norms(gradients)), clipped)

    def _by_unit(self, gradients: Sequence[Gradient], agc: AGC, names: Mapping[Tensor, str], skipped: bool) -> Clipped:
        excluded = self._names_excluded(agc, names)
        units = unit_norms([gradient.values for gradient in gradients], gradients)
        total = norm_of_units(units, gradients)
        self._check(total, gradients, skipped)
        # All units in one tensor, as there are many tensors, and of units there are few.
        sizes, here = [unit.numel() for unit in units], total.device
        weights = unit_norms([gradient.weights for gradient in gradients], gradients)
        unit, weight = (torch.cat([norms.to(here, non_blocking=True) for norms in all_]) for all_ in (units, weights))
        limit = agc.clip_factor * weight.clamp(min=agc.eps)
        factor = torch.where(unit > limit, limit / unit.clamp(min=UNIT_EPS), 1.0)
        factors = list(factor.split(sizes))
        for index, gradient in enumerate(gradients):
            if gradient.key in excluded:
                factors[index].fill_(1.0)
        scale_each(gradients, [_broadcast(part, g.values) for part, g in zip(factors, gradients, strict=True)])
        after = norm_of_units((unit * factor).split(sizes), gradients)
        if any(gradient.row_shards for gradient in gradients):
            counts = [(part < 1).sum() for part in factors]
            clipped = share(counts, [g.row_shards for g in gradients], sum(g.units for g in gradients))
        else:
            clipped = (factor < 1).float().mean()
        return Clipped(total, after, clipped)

    def _names_excluded(self, agc: AGC, names: Mapping[Tensor, str]) -> set[str]:
        if not agc.exclude:
            return set()
        if self._excluded is None or self._excluded[0] is not names:
            self._excluded = (names, agc.excluded(list(names.values())))
        return self._excluded[1]


def norm_factor(norm: Tensor, max_norm: float) -> Tensor:
    """The factor that clips a global norm: NaN if the norm is, as in torch.

    Args:
        norm: The norm.
        max_norm: The limit.
    """
    return (max_norm / (norm + NORM_EPS)).clamp(max=1.0)


def _options(who: str, name: str, value: Any, cls: type[Any], first: str) -> Any:
    if value is None or isinstance(value, cls):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{who}: {name}={value!r}; valid: a number ({first}), or {cls.__name__}({first}=...)")
    return cls(**{first: value})


def _listed(params: Params) -> tuple[list[Tensor], dict[Tensor, str]]:
    """The parameters, and their names where they are known."""
    if isinstance(params, Optimizer):
        pairs = [
            pair
            for group in params.param_groups
            for pair in zip(group.get("param_names") or [""] * len(group["params"]), group["params"], strict=True)
        ]
    else:
        pairs = [p if isinstance(p, tuple) else ("", p) for p in ([params] if isinstance(params, Tensor) else params)]
    return [p for _, p in pairs], {p: name for name, p in pairs if name}


def _broadcast(units: Tensor, values: Tensor) -> Tensor:
    """A number for each unit, in a shape by which values are multiplied."""
    return units.reshape([-1, *[1] * (values.ndim - 1)] if values.ndim else [])
