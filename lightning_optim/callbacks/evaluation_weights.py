"""Evaluates with an optimizer's evaluation weights; a fit with such an optimizer gets this callback automatically."""

from lightning_optim.callbacks.roots import Callback
from lightning_optim.control.evaluation_weights import WeightsInTheirPlaces


class EvaluationWeights(WeightsInTheirPlaces, Callback):
    """Validate, test and predict with the averages of Schedule-Free optimizers, and train with their own weights.

    A Trainer gets this callback when a fit with such an optimizer starts (see
    :mod:`lightning_optim.callbacks.joining`). It runs before the other callbacks, so that checkpoints saved after a
    validation have the training weights, and resumed runs go on bit for bit. Testing a checkpoint in the Trainer that
    trained it computes the averages from the state in the checkpoint. To export them, or to test in a process that has
    not trained, put them into the model first::

        checkpoint = torch.load("last.ckpt", weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
        optimizer = model.configure_optimizers()
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        optimizer.eval()
        torch.save(model.state_dict(), "averages.pt")

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_optim.callbacks import EvaluationWeights
        >>> trainer = Trainer(callbacks=[EvaluationWeights()], logger=False, enable_checkpointing=False)
        >>> sum(isinstance(callback, EvaluationWeights) for callback in trainer.callbacks)
        1
    """
