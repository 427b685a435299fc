"""Over which processes a DTensor is divided."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_optim.stepping.shards import shards_of


@pytest.mark.parametrize(
    ("placements", "dimensions"),
    [
        ((Shard(0),), [0]),
        ((Replicate(), Shard(0)), [1]),
        ((Replicate(), Replicate()), []),
        ((Shard(0), Shard(1)), [0, 1]),
        # FSDP2 over tensor parallelism; it is no `Shard` by its class.
        ((_StridedShard(0, split_factor=2), Shard(0)), [0, 1]),
    ],
    ids=str,
)
def test_dimensions(placements: Any, dimensions: list[int]) -> None:
    tensor: Any = SimpleNamespace(device_mesh="mesh", placements=placements)
    assert shards_of(tensor) == tuple(("mesh", dimension) for dimension in dimensions)
