"""Noticing what others change between two steps: weights, and states that are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.stepping.shards import local


class Outside:
    """Notices what was changed from outside since the last look.

    It sees in-place changes, and new memory of a tensor, but not changes through ``.data``, which torch does not count.

    Args:
        optimizer: The optimizer, whose state may be replaced; not kept alive.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._state = optimizer.state
        self._seen: dict[Tensor, tuple[int, int]] = {}

    def note(self, params: Sequence[Tensor]) -> None:
        """Note the present weights as known."""
        self._seen.update((p, _version(p)) for p in params)

    def note_state(self, optimizer: Optimizer) -> None:
        """Note the present state as known."""
        self._state = optimizer.state

    def loaded(self, optimizer: Optimizer) -> bool:
        """Whether the state has been replaced since it was noted."""
        return optimizer.state is not self._state

    def changed(self, bucket: OffloadBucket) -> list[int]:
        """The indices of a bucket's weights that have changed since they were noted."""
        return [i for i, p in enumerate(bucket.params) if self._seen.get(p) != _version(p)]


def _version(p: Tensor) -> tuple[int, int]:
    mine = local(p)
    return mine._version, mine.data_ptr()
