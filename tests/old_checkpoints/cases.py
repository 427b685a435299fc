"""What was trained, by public names alone, so that versions long apart can run it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim import LAMB, LBFGS, SAM, SGD, WSD, Adam, AdamW, Cosine, Linear, Lion, Muon, create_optimizer

BEFORE, AFTER = 4, 3
BF16 = torch.bfloat16
SHORT = partial(Cosine, total_steps=9)


class Net(nn.Module):
    """Weights of several dimensions; nothing is done by them but to have names."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            for index, p in enumerate(self.parameters()):
                p.copy_(numbers(p, index, 100))
        self.to(dtype)


def numbers(p: Tensor, index: int, step: int) -> Tensor:
    """Without a rounding, so that they are the same everywhere."""
    n = torch.arange(p.numel(), dtype=torch.float64)
    return (((5 * n + 3 * index + 7 * step) % 11 - 5) / 8).reshape(p.shape).to(p.dtype)


def steps(optimizer: Any, params: list[nn.Parameter], schedule: Any, numbers_of_steps: range) -> None:
    for step in numbers_of_steps:

        def closure() -> Any:
            optimizer.zero_grad()
            loss = sum(((1 + i % 3) * (p - numbers(p, i, 200)).square()).sum() for i, p in enumerate(params))
            loss = loss + (params[0].sum() - params[1].sum()) ** 2
            loss.backward()
            return loss

        if isinstance(optimizer, SAM | LBFGS):
            optimizer.step(closure)
        else:
            for index, p in enumerate(params):
                # The norm's bias has none before the checkpoint, and its first afterwards.
                p.grad = None if index == 3 and step < BEFORE else numbers(p, index, step)
            optimizer.step()
        if schedule is not None:
            schedule.step()


def _groups(net: Net) -> list[dict[str, Any]]:
    named = list(net.named_parameters())
    return [
        {"params": named[:2], "name": "first", "weight_decay": 0.3, "lr": 0.02},
        {"params": named[2:4], "maximize": True},
        {"params": named[4:], "cautious": True, "betas": (0.7, 0.8)},
    ]


Make = Callable[[Net], Any]


def _of(cls: Any, **options: Any) -> Make:
    return lambda net: cls(net.parameters(), **options)


def _by_name(name: str, **options: Any) -> Make:
    return lambda net: create_optimizer(name, net, **options)


CASES: dict[str, tuple[Make, torch.dtype, Callable[[Any], Any] | None]] = {
    "adam": (_of(Adam, lr=0.02, weight_decay=0.1), torch.float32, partial(Linear, warmup_steps=2, total_steps=9)),
    "adam amsgrad float64": (_of(Adam, lr=0.02, amsgrad=True), torch.float64, None),
    "adam decoupled cautious": (
        _of(Adam, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True, cautious=True),
        torch.float32,
        None,
    ),
    "adamw": (_by_name("adamw", lr=0.02, overrides={"head*": {"lr": 0.01}}), torch.float32, SHORT),
    "adamw groups": (lambda net: AdamW(_groups(net), lr=0.03), torch.float32, None),
    "adamw amsgrad kahan": (_of(AdamW, lr=0.02, amsgrad=True, rounding="kahan"), BF16, None),
    "adamw stochastic": (_of(AdamW, lr=0.02, rounding="stochastic", state_dtype="bfloat16"), BF16, None),
    "adamw tensor lr": (lambda net: AdamW(net.parameters(), lr=torch.tensor(0.02)), torch.float16, None),
    "lamb": (_of(LAMB, lr=0.02, weight_decay=0.1, max_weight_norm=0.9, max_grad_norm=1.0), torch.float32, None),
    "lion": (_by_name("lion", lr=0.02, weight_decay=0.1), torch.float32, partial(WSD, decay_steps=4, total_steps=9)),
    "lion kahan": (_of(Lion, lr=0.02, rounding="kahan", state_dtype="bfloat16"), BF16, None),
    "sgd": (_of(SGD, lr=0.02, weight_decay=0.1), torch.float32, None),
    "sgd momentum": (_of(SGD, lr=0.02, momentum=0.9, nesterov=True, max_grad_norm=1.0), torch.float32, None),
    "sgd stochastic": (_of(SGD, lr=0.02, rounding="stochastic"), BF16, None),
    "muon": (_by_name("muon", lr=0.02), torch.float32, partial(Cosine, warmup_steps=2, total_steps=9)),
    "muon kahan": (
        lambda net: Muon(net.named_parameters(), lr=0.02, rounding="kahan", ns_coefficients="polar_express"),
        BF16,
        None,
    ),
    "lbfgs": (_of(LBFGS, history_size=3), torch.float64, None),
    "lbfgs armijo": (_of(LBFGS, lr=0.5, line_search="armijo", weight_decay=0.1), torch.float32, None),
    "sam": (
        lambda net: SAM(net.named_parameters(), partial(AdamW, lr=0.02)),
        torch.float32,
        partial(Cosine, total_steps=9),
    ),
    "sam adaptive": (
        lambda net: SAM(net.parameters(), partial(SGD, lr=0.02, momentum=0.9), rho=0.5, adaptive=True),
        torch.float64,
        None,
    ),
}


def made(case: str) -> tuple[Net, Any, Any]:
    make, dtype, scheduled = CASES[case]
    net = Net(dtype)
    optimizer = make(net)
    return net, optimizer, None if scheduled is None else scheduled(optimizer)


# ---------------------------------------------------------------- trainings

TRAININGS: dict[str, tuple[str, str, Make]] = {
    "in_graph": ("in_graph", "32-true", _by_name("adamw", lr=0.02)),
    "in_graph_sam": ("in_graph", "32-true", lambda net: SAM(net.named_parameters(), partial(AdamW, lr=0.02))),
    "detached": ("detached", "bf16-true", _by_name("lion", lr=0.01, weight_decay=0.1)),
}


def fit(training: str, checkpoint: str | None = None, stop_at: int = BEFORE + AFTER) -> Any:
    """Train, from a checkpoint if there is one; returns the Trainer. The run's planned length is always the same."""
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_optim.strategies  # noqa: F401 # after Lightning, which earlier versions needed
    from lightning_optim.callbacks import FillTotalSteps

    strategy, precision, make = TRAININGS[training]

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            hidden = self.net.norm(self.net.conv(batch[0].to(self.dtype)).transpose(1, 2))
            return self.net.head(hidden.tanh()).float().square().mean()

        def train_dataloader(self) -> Any:
            data = torch.stack([numbers(torch.empty(3, 6), 0, sample) for sample in range(16)])
            return DataLoader(TensorDataset(data), batch_size=2)

        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.should_stop = self.trainer.global_step >= stop_at

        def configure_optimizers(self) -> Any:
            optimizer = make(self.net)
            return [optimizer], [{"scheduler": Cosine(optimizer, warmup_steps=1), "interval": "step"}]

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        max_steps=BEFORE + AFTER,
        enable_checkpointing=False,
        callbacks=[FillTotalSteps()],
        gradient_clip_val=1.0,
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(Module(), ckpt_path=checkpoint, weights_only=True)
    return trainer
