"""What others change between two steps: weights, and states that are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.stepping.shards import local


class Outside:
    """Notices what was changed from outside since the last look.

    In-place changes are seen, and tensors that were put in place of others; not those through ``.data``, of which
    torch keeps no count.

    Args:
        optimizer: Whose state may be another; not kept alive.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._state = optimizer.state
        self._seen: dict[Tensor, tuple[int, int]] = {}

    def note(self, params: Sequence[Tensor]) -> None:
        """What these weights are now is known."""
        self._seen.update((p, _version(p)) for p in params)

    def note_state(self, optimizer: Optimizer) -> None:
        """The state that there is now is known."""
        self._state = optimizer.state

    def loaded(self, optimizer: Optimizer) -> bool:
        """Whether the state is another."""
        return optimizer.state is not self._state

    def changed(self, bucket: OffloadBucket) -> list[int]:
        """The weights of a bucket that are others."""
        return [i for i, p in enumerate(bucket.params) if self._seen.get(p) != _version(p)]


def _version(p: Tensor) -> tuple[int, int]:
    mine = local(p)
    return mine._version, mine.data_ptr()
