"""What a plan says of a detached step, against a detached step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import Tensor, nn

import lightning_optim
from lightning_optim import AdamW, Lion
from lightning_optim.offload.options import CLIPS, DetachedOptions
from lightning_optim.offload.pipeline import Detached
from lightning_optim.placement.footprint import Maker, footprint
from lightning_optim.placement.needs import Conditions, clip_modes, needs
from lightning_optim.placement.step_time import BUCKET_BYTES, CLIP_MODES

from .common import card

known_warnings = pytest.mark.filterwarnings(
    "ignore:.*the host engine cannot be used .no C compiler:lightning_optim.warnings.LightningOptimWarning"
)


def size(tensors: Iterable[Tensor] | None) -> int:
    return sum(t.nbytes for t in tensors or ())


def train(make: Maker, dtype: torch.dtype, batches: int, **options: Any) -> tuple[nn.Module, Any, Detached]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10)).to(dtype)
    optimizer = make(model.parameters())
    detached = Detached(optimizer, DetachedOptions(**options))
    for _ in range(3):
        for batch in range(batches):
            detached.last = batch == batches - 1
            model(torch.ones(4, 30, dtype=dtype)).sum().backward()
        detached.step()
        detached.zero_grad()
    return model, optimizer, detached


@known_warnings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(
    ("make", "master_dtype"),
    [
        (AdamW, torch.float32),
        (AdamW, torch.float64),
        (partial(AdamW, state_dtype="bfloat16"), torch.float32),
        (partial(Lion, rounding="kahan"), torch.float32),
        (torch.optim.AdamW, torch.float32),
        (Foreign, torch.float32),
    ],
)
def test_host_memory(make: Maker, master_dtype: torch.dtype, batches: int, dtype: torch.dtype) -> None:
    name = str(master_dtype).removeprefix("torch.")
    model, optimizer, detached = train(make, dtype, batches, master_dtype=name)
    predicted = footprint(model, make, master_dtype=master_dtype)
    row = needs("detached", predicted, card(), Conditions(accumulates=batches > 1, activation_bytes=0))
    buckets = detached._placement.buckets
    real = {
        "masters": size(detached.masters().values()),
        "state": sum(size(v for v in state.values() if isinstance(v, Tensor)) for state in optimizer.state.values()),
        "pinned gradients": sum(size(bucket.staging) for bucket in buckets),
        "pinned weights": sum(size(bucket.outgoing) for bucket in buckets),
        "sums of gradients": sum(size(bucket.sums) for bucket in buckets),
    }
    detached.close()
    assert row.host == {name: bytes for name, bytes in real.items() if bytes}


@known_warnings
def test_what_undoes_a_step() -> None:
    model, _, detached = train(AdamW, torch.bfloat16, 1, clip="speculative")
    row = needs("detached", footprint(model, AdamW), card(), Conditions(), "speculative")
    counters = 4 * len(list(model.parameters()))
    kept = sum(size(bucket.undo._buffers.values()) for bucket in detached._placement.buckets)
    detached.close()
    assert row.host["what undoes a step"] == kept + counters


def test_the_defaults_and_the_names_are_the_pipeline_s() -> None:
    assert set(CLIP_MODES) == set(CLIPS)
    assert DetachedOptions().bucket_mb * 1e6 == BUCKET_BYTES


@pytest.mark.parametrize(
    "make",
    [
        AdamW,
        partial(AdamW, state_dtype="float64"),
        partial(AdamW, state_dtype="bfloat16"),
        lightning_optim.Muon,
        torch.optim.AdamW,
        Foreign,
    ],
)
@pytest.mark.filterwarnings("ignore:.*the parameters have no names")
def test_clip_modes_are_those_that_the_pipeline_takes(make: Maker) -> None:
    params = [nn.Parameter(torch.ones(4, 4))]
    taken = []
    for mode in CLIPS:
        try:
            Detached(make(params), DetachedOptions(clip=mode)).close()
        except ValueError:
            continue
        taken.append(mode)
    assert set(clip_modes(footprint(params, make), Conditions())) == set(taken)
    assert clip_modes(footprint(params, make), Conditions(ranks=2)) == ("exact",)
