"""``undo`` with masters in host memory: they are put back, and the weights follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim.strategies import DetachedStrategy

from .common import OPTIMIZERS, fit, known_warnings
from .undoing import POLICY, Poisoned, Reference, assert_same_from

pytestmark = known_warnings


def in_bfloat16(cls: Any) -> Any:
    """With weights that have fewer bits than their masters."""

    def training_step(self: Any, batch: list[torch.Tensor], batch_idx: int) -> Any:
        x, y = batch
        return cls.training_step(self, [x.to(self.net[0].weight.dtype), y], batch_idx)

    def configure_model(self: Any) -> None:
        self.net.to(torch.bfloat16)

    return type(
        f"{cls.__name__}InBfloat16", (cls,), {"training_step": training_step, "configure_model": configure_model}
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize(
    ("name", "clip"), [("ours", "exact"), ("ours", "speculative"), ("torch SGD", "speculative"), ("foreign", "exact")]
)
def test_a_spike(name: str, clip: Any, options: dict[str, Any], dtype: str) -> None:
    poisoned, reference = (
        (Poisoned, Reference) if dtype == "float32" else (in_bfloat16(Poisoned), in_bfloat16(Reference))
    )
    skip = {2, 3, 4, 5} if options else {4, 5}
    make = OPTIMIZERS[name]
    run, found = fit(poisoned(make, {5: 1e4}), DetachedStrategy(clip=clip, undo=POLICY), **options)
    _, expected = fit(reference(make, skip=skip, halve={5}), DetachedStrategy(clip=clip), **options)
    (record,) = run.strategy.undo_records
    assert (record["action"], record["undone"]) == ("undo", 1)
    assert_same_from(found, expected, 5)


def test_losses_of_older_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="undo with delay_one_step=True"):
        fit(Poisoned(OPTIMIZERS["ours"]), DetachedStrategy(delay_one_step=True, undo=POLICY))
