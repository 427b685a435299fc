"""``undo`` with masters in host memory: they are put back, and the weights follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim.strategies import DetachedStrategy, OptimAutoStrategy

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


@pytest.mark.parametrize("name", ["ours", "torch AdamW", "foreign"])
def test_a_spike_after_a_fall_back(name: str) -> None:
    """What is put back was copied when there were no masters, and the state was of the weights' type."""

    class Failing(in_bfloat16(Poisoned)):  # type: ignore[misc]
        has_failed = False

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            output["loss"].register_hook(self.maybe)
            return output

        def maybe(self, grad: torch.Tensor) -> None:
            if self.number == 4 and not self.has_failed:
                self.has_failed = True
                raise torch.OutOfMemoryError("no more memory (this is a test)")

        def on_train_batch_end(self, *_: Any) -> None:
            if self.number == 5:
                (drive,) = self.trainer.strategy._drives.values()
                masters = drive.detached.masters()
                assert all(torch.equal(master, p) for p, master in masters.items())
                states = self.trainer.optimizers[0].state
                dtypes = {value.dtype for state in states.values() for value in state.values()}
                assert dtypes == {torch.float32}
                self.was_asked = True

    model = Failing(OPTIMIZERS[name], {5: 1e4})
    with pytest.warns(UserWarning, match="ran out of device memory"):
        run, _ = fit(model, OptimAutoStrategy(undo=POLICY))
    assert [record["action"] for record in run.strategy.undo_records] == ["undo"]
    assert model.was_asked


def test_updates_that_cannot_be_taken_back_are_refused() -> None:
    with pytest.raises(ValueError, match=r"undo with clip='none'.*valid: clip='exact'"):
        fit(Poisoned(OPTIMIZERS["ours"]), DetachedStrategy(clip="none", undo=POLICY))


def test_losses_of_older_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="undo with delay_one_step=True"):
        fit(Poisoned(OPTIMIZERS["ours"]), DetachedStrategy(delay_one_step=True, undo=POLICY))
