"""What a run leaves behind: curves, a sample of generated text, and one line that says how it went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from examples.char_lm.data import SourceText
from examples.char_lm.module import CharLM
from examples.char_lm.plots import Step, Validation, plot_curves


class Report(Callback):
    """Record the curves, and at the end of training draw them, generate text and print the result.

    The curve begins before the first step: with ``num_sanity_val_steps: -1`` Lightning's sanity check is a
    whole validation of the untrained model, whose result it would throw away; it is kept here as step 0. The
    record is part of the checkpoint, so a resumed run draws the whole curve.

    Args:
        prompt: What the generated text begins with.
        length: Bytes to generate.
        temperature: Of the sampling; smaller is more conservative.
        every_n_steps: Training steps between two points of the curve.
    """

    def __init__(
        self,
        prompt: str = "def ",
        length: int = 400,
        temperature: float = 0.8,
        every_n_steps: int = 5,
    ) -> None:
        self.prompt = prompt
        self.length = length
        self.temperature = temperature
        self.every_n_steps = every_n_steps
        self.train: list[Step] = []
        self.val: list[Validation] = []
        self._lr = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The curves so far, in primitives: checkpoints must load with ``weights_only=True``."""
        return {"train": [list(point) for point in self.train], "val": [list(point) for point in self.val]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's curves."""
        self.train = [Step(*point) for point in state_dict["train"]]
        self.val = [Validation(*point) for point in state_dict["val"]]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is trained on what."""
        data = getattr(trainer, "datamodule", None)
        if trainer.is_global_zero and isinstance(data, SourceText) and data.split is not None:
            parameters = sum(parameter.numel() for parameter in pl_module.parameters())
            train, val = (len(part) / 1e6 for part in data.split)
            print(f"A model of {parameters:,} parameters reads {data.path}:")
            print(f"{train:.2f} MB to train on, {val:.2f} MB held out", flush=True)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step 0: the untrained model."""
        self._record_validation(trainer)
        if self.val and trainer.logger is not None:
            trainer.logger.log_metrics({"val_bpb": self.val[-1].bpb}, step=0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A point of the validation curve."""
        if not trainer.sanity_checking:
            self._record_validation(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The learning rate of this step; by the end of the batch the schedule has moved on."""
        self._lr = max(float(group["lr"]) for group in optimizer.param_groups)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A point of the training curve."""
        if trainer.global_step % self.every_n_steps == 0:
            self.train.append(Step(trainer.global_step, float(trainer.callback_metrics["train_bpb"]), self._lr))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the artifacts and print the result."""
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False) or not isinstance(pl_module, CharLM):
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        sample = pl_module.model.generate(self.prompt.encode(), self.length, temperature=self.temperature)
        text = sample.decode("utf-8", errors="replace")
        (folder / "sample.txt").write_text(text, encoding="utf-8")
        plot_curves(self.train, self.val, folder / "curves.png")
        rule = "-" * 72
        print(f"\nText the model wrote after the prompt {self.prompt!r}:\n{rule}\n{text}\n{rule}")
        print(f"curves       {folder / 'curves.png'}")
        print(f"numbers      {folder / 'metrics.csv'}")
        print(f"sample       {folder / 'sample.txt'}")
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if best:
            print(f"checkpoint   {_relative(Path(best))}")
        if self.val:
            print(f"validation bits per byte: {self.val[0].bpb:.2f} -> {self.val[-1].bpb:.2f}", flush=True)

    def _record_validation(self, trainer: Trainer) -> None:
        value = trainer.callback_metrics.get("val_bpb")
        if value is not None:
            self.val.append(Validation(trainer.global_step, float(value)))


def _relative(path: Path) -> Path:
    """As seen from the current folder, when it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
