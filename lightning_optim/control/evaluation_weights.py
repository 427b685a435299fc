"""Evaluating a model with its optimizer's evaluation weights, and training on with the training weights."""

from __future__ import annotations

from typing import Any

from lightning_optim.stepping.evaluation import EvaluatesElsewhere
from lightning_optim.warnings import warn_user


class WeightsInTheirPlaces:
    """Puts the evaluation weights of optimizers such as Schedule-Free in place while a model is evaluated.

    The methods are Lightning's hooks. Other training loops call the optimizer's ``eval()`` and ``train()`` at the same
    places.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the training weights in place: a checkpoint may have been saved during an evaluation."""
        self._train(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the evaluation weights in place before a validation."""
        self._evaluate(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the training weights back after a validation, before checkpoints are saved with them."""
        self._train(trainer)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the evaluation weights in place before a test."""
        self._evaluate(trainer)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the training weights back after a test."""
        self._train(trainer)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the evaluation weights in place before predictions."""
        self._evaluate(trainer)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the training weights back after predictions."""
        self._train(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the training weights back: after a failed evaluation, training may go on, or a checkpoint be saved."""
        self._train(trainer)

    @staticmethod
    def _evaluate(trainer: Any) -> None:
        if not (optimizers := evaluating_elsewhere(trainer)):
            return
        if str(trainer.state.fn) != "fit" and trainer.ckpt_path is not None:
            # Lightning has loaded the weights of a checkpoint, but not the state that belongs to them.
            saved = trainer.strategy.load_checkpoint(trainer.ckpt_path)
            if len(saved.get("optimizer_states", ())) != len(trainer.optimizers):
                warn_user(
                    f"{trainer.ckpt_path} has weights of training and no state of {type(optimizers[0]).__name__}, by "
                    "which those of evaluation could be found: the model is evaluated as it was saved"
                )
                return
            trainer.strategy.load_optimizer_state_dict(saved)
        for optimizer in optimizers:
            optimizer.eval()

    @staticmethod
    def _train(trainer: Any) -> None:
        for optimizer in evaluating_elsewhere(trainer):
            optimizer.train()


def evaluating_elsewhere(trainer: Any) -> list[EvaluatesElsewhere]:
    """The optimizers of a Lightning ``Trainer``, also those in wrappers, that have other weights for evaluation."""
    found = [one for outer in trainer.optimizers for one in (outer, getattr(outer, "base", None))]
    return [optimizer for optimizer in found if isinstance(optimizer, EvaluatesElsewhere)]
