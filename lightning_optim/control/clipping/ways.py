"""The options of adaptive clipping: by unit (AGC), and by tensor (AdaGC)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lightning_optim.checks import FRACTION, POSITIVE_FINITE, SHARE, above, check_ranges, whole


@dataclass(frozen=True)
class AGC:
    """Adaptive gradient clipping: no unit's gradient gets larger than a share of the unit's weights.

    A unit is an output of a layer: a row of a matrix, a filter of a convolution (index 0 of the weight's first
    dimension). A tensor of at most one dimension is one unit. A unit's gradient ``g`` with weights ``w`` is multiplied
    by ``clip_factor * max(norm(w), eps) / norm(g)`` where that is less than 1.

    Args:
        clip_factor: The largest ratio of a unit's gradient norm to its weight norm.
        eps: The least weight norm, so that units that begin with zeros can learn.
        exclude: Shell patterns of names of parameters that are not clipped, such as ``head.*``; the paper excludes the
            last linear layer. Without ``*`` a pattern is the name of one parameter.

    Raises:
        ValueError: An option is out of its range.

    Example:
        >>> sorted(AGC(exclude=["head.*"]).excluded(["body.weight", "head.weight", "head.bias"]))
        ['head.bias', 'head.weight']

    References:
        Brock et al., High-Performance Large-Scale Image Recognition Without Normalization, arXiv:2102.06171.
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the options."""
        check_ranges("AGC", self, {"clip_factor": POSITIVE_FINITE, "eps": POSITIVE_FINITE})
        if isinstance(self.exclude, str) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ValueError(f"AGC: exclude={self.exclude!r}; valid: a list of names or patterns, such as ['head.*']")

    def excluded(self, names: Collection[str]) -> set[str]:
        """The names that are excluded.

        Args:
            names: The names of all parameters.

        Raises:
            ValueError: A pattern is not that of any name.
        """
        found: set[str] = set()
        for pattern in self.exclude:
            hits = {name for name in names if fnmatchcase(name, pattern)}
            if not hits:
                known = ", ".join(list(names)[:20]) or "none, as the parameters were given without names"
                raise ValueError(f"AGC: exclude={pattern!r} is the name of no parameter; the names are: {known}")
            found |= hits
        return found


@dataclass(frozen=True)
class AdaGC:
    """Adaptive clipping by tensor: each tensor's norm is bounded by an average of its own past, clipped norms.

    During ``warmup_steps`` the global norm is clipped to ``max_norm``, and each tensor's average is the least of its
    clipped norms. After it a tensor's gradient whose norm exceeds ``ratio`` times its average is scaled to that; the
    clipped norm then moves the average. So one tensor's spike scales neither the others nor the bounds to come.

    In three things this differs from the authors' code, so that no tensor freezes and nothing outlasts a fault. A
    gradient of zero, which says nothing about a tensor's scale, leaves its average as it is. No average counts as less
    than ``floor``. A tensor that is first seen after the warm-up is clipped to ``max_norm`` then.

    A step in which a gradient is not finite leaves the averages, and the count of steps, as they are.

    Args:
        ratio: How many times its average a norm may be.
        beta: Decay rate of the averages.
        warmup_steps: Steps with the global norm.
        max_norm: The global norm of the warm-up.
        floor: The least average, as a share of the norm that the tensor would have if a gradient of norm ``max_norm``
            were spread evenly over all elements.

    Raises:
        ValueError: An option is out of its range.

    References:
        Wang et al., AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping, arXiv:2502.11034.
    """

    ratio: float = 1.04
    beta: float = 0.99
    warmup_steps: int = 100
    max_norm: float = 1.0
    floor: float = 0.01

    def __post_init__(self) -> None:
        """Check the options."""
        # With a ratio of 1 no average could ever grow.
        ranges = {"ratio": above(1), "beta": FRACTION, "warmup_steps": whole(0), "max_norm": POSITIVE_FINITE}
        check_ranges("AdaGC", self, ranges | {"floor": SHARE})
