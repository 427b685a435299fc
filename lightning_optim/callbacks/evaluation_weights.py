"""Evaluates with the weights that an optimizer has for that; a fit with such an optimizer gets it by itself."""

from lightning_optim.callbacks.roots import Callback
from lightning_optim.control.evaluation_weights import WeightsInTheirPlaces


class EvaluationWeights(WeightsInTheirPlaces, Callback):
    """Validate, test and predict with the averages of Schedule-Free optimizers, and train with their own weights.

    A Trainer gets this callback when a fit with one starts (see :mod:`lightning_optim.callbacks.joining`), before its
    others, so that what these save after a validation has the weights of training: resumed runs go on bit for bit.
    A test of a checkpoint in the Trainer that trained it finds the averages by the state that is saved beside. To
    export them, or to test in a process that has not trained, put them into the model first::

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
