"""A small regression under ZeRO-Offload, with the optimizer's step done by our host engine.

    pip install 'lightning-optim[deepspeed,accelerate]' transformers
    accelerate launch --config_file examples/deepspeed/accelerate.yaml examples/deepspeed/train.py

It runs on CPUs as well; DeepSpeed then compiles its operators at the first start, for a minute or two.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs  # type: ignore[import-untyped]
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim
from lightning_optim.control.deepspeed import deepspeed_config


def data(samples: int) -> TensorDataset:
    """Points and the sum of their sines."""
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sin().sum(dim=1, keepdim=True))


def main() -> None:
    """Train, and print the loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="adamw", choices=lightning_optim.list_optimizers())
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()

    # Without a GPU Accelerate must be told how processes talk, or it takes each for the only one: all would get the
    # same samples, and the means over processes would be each one's own.
    launched_on_cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if launched_on_cpu else None)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        raise SystemExit("DeepSpeed is not in use: start this by `accelerate launch --config_file ...`, see above")
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))
    loader = DataLoader(data(1024), batch_size=plugin.deepspeed_config["train_micro_batch_size_per_gpu"], shuffle=True)
    optimizer = lightning_optim.create_optimizer(arguments.optimizer, model, lr=arguments.lr)
    plugin.deepspeed_config.update(deepspeed_config(plugin.deepspeed_config, optimizer))  # before `prepare`

    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    # Not prepared: Accelerate would have it step once for every process. It moves the options of our optimizer, whose
    # param groups DeepSpeed has left in their place.
    steps = arguments.epochs * len(loader) // accelerator.gradient_accumulation_steps
    schedule = lightning_optim.Cosine(optimizer, warmup_steps=steps // 10, total_steps=steps)
    for epoch in range(arguments.epochs):
        losses = []
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)  # DeepSpeed clips and steps in here, at the end of each window
                prepared.step()
                prepared.zero_grad()
            if accelerator.sync_gradients:
                schedule.step()
            losses.append(loss.detach())
        mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        accelerator.print(f"epoch {epoch}: loss {mean:.4f}, lr {optimizer.param_groups[0]['lr']:.2e}")
    accelerator.print(f"{accelerator.num_processes} processes; {optimizer.engine_report()}")


if __name__ == "__main__":
    main()
