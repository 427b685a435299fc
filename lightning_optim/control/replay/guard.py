"""Refusing trainings in which an optimizer's step would not get the evaluations of the model that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from lightning_optim.stepping.evaluations import request_of
from lightning_optim.strategy_names import STRATEGIES


class ReplayGuard:
    """Checks, when a training starts, those of our optimizers whose step evaluates the model.

    In Lightning's own strategies their closure evaluates only the last batch of an accumulation window, clips at every
    evaluation, and is missing with a loss scaler. Trainings that are right nevertheless (SAM on whole batches, say) may
    run, although hooks and logs then come at every evaluation. These strategies cannot give Sophia second derivatives.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizers.

        Raises:
            ValueError: An optimizer would compute something else than it should.
        """
        for optimizer in guarded(trainer):
            if reasons := list(_reasons(optimizer, trainer)):
                name = type(optimizer).__name__.removesuffix("Optim")
                curves = request_of(optimizer) == "hessian_vector"
                valid = ", ".join(repr(name) for name in STRATEGIES if not _cannot_answer(name, curves))
                otherwise = "manual optimization with step(evaluate=...)" if curves else "none of these settings"
                raise ValueError(
                    f"{name} under {type(trainer.strategy).__name__} with {'; with '.join(reasons)}. Valid: "
                    f"Trainer(strategy=...) with one of {valid}, or {otherwise}"
                )


def guarded(trainer: Any) -> list[Optimizer]:
    """The optimizers of a Lightning ``Trainer`` that :class:`ReplayGuard` checks."""
    if not trainer.lightning_module.automatic_optimization or getattr(trainer.strategy, "replays_windows", False):
        return []
    # Other optimizers, such as torch's LBFGS, belong to users who may not use this package.
    ours = [optimizer for optimizer in trainer.optimizers if type(optimizer).__module__.startswith("lightning_optim.")]
    return [optimizer for optimizer in ours if request_of(optimizer) is not None]


def _cannot_answer(strategy: str, curves: bool) -> bool:
    """Whether one of our strategies cannot answer: DeepSpeed steps by itself, FSDP2 has no second derivatives."""
    return "deepspeed" in strategy or (curves and "fsdp2" in strategy)


def _reasons(optimizer: Optimizer, trainer: Any) -> Iterator[str]:
    if request_of(optimizer) == "hessian_vector":
        yield "no second derivative of the loss, of which the step needs products"
        return
    accumulate = {0: trainer.accumulate_grad_batches}
    for callback in trainer.callbacks:
        # The callback is found by its method, because each root of Lightning has its own class.
        if hasattr(callback, "get_accumulate_grad_batches"):
            accumulate |= callback.scheduling
    if max(accumulate.values()) > 1:
        yield (
            f"accumulate_grad_batches={max(accumulate.values())}, where its closure sees the last batch of each window "
            "only"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        yield f"precision={trainer.precision!r}, where Lightning's loss scaler gives it no closure"
    searches = request_of(optimizer) == "loss_and_gradient"
    if trainer.gradient_clip_val and (searches or trainer.gradient_clip_algorithm == "value"):
        yield f"gradient_clip_val={trainer.gradient_clip_val!r}, which clips the gradients of every evaluation"
    if searches and trainer.world_size > 1:
        yield f"{trainer.world_size} processes, each of which would search along its own part of the loss"
