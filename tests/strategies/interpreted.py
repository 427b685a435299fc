"""Trainings whose steps are done by Triton's interpreter; ``test_triton.py`` runs this in a process of its own.

The interpreter must be chosen before Triton is first imported.
"""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial
from typing import Any

import torch

import lightning_optim
from lightning_optim.strategies import InGraphStrategy

from .common import Model, fit, scaled

CLIP = {"gradient_clip_val": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and accumulate": CLIP | {"accumulate_grad_batches": 2},
    "16-mixed": CLIP,
}


def main() -> None:
    """Print the greatest difference from Lightning's own strategy, and the report, of each training."""
    warnings.filterwarnings("ignore")
    adamw: Any = {"lr": 0.05, "weight_decay": 0.1}
    runs: dict[str, tuple[Any, Any]] = {
        "ours": (partial(lightning_optim.AdamW, engine="triton", **adamw), lambda: "in_graph"),
        "adopted": (partial(torch.optim.AdamW, **adamw), lambda: InGraphStrategy(engine="triton")),
    }
    results = {}
    for name, (make, strategy) in runs.items():
        for case, options in CASES.items():
            notes = []
            for chosen in (strategy, lambda: "auto"):
                reference = chosen is not strategy and name == "ours"
                model = Model(partial(torch.optim.AdamW, **adamw) if reference else make)
                model.overflows = {2} if "16" in case else set()
                run, noted = fit(model, chosen(), plugins=[scaled()] if "16" in case else None, max_steps=4, **options)
                notes.append((run, noted))
            (ours, found), (stock, expected) = notes
            steps = slice(3) if "16" in case else slice(None)  # before Lightning's schedule counts a step left out
            differences = [
                float((value - other[key]).abs().max())
                for one, other in zip(found.weights[steps], expected.weights[steps], strict=True)
                for key, value in one.items()
            ]
            results[f"{name}: {case}"] = {
                "difference": max(differences),
                "moved": float((found.weights[-1]["net.0.weight"] - found.weights[0]["net.0.weight"]).abs().max()),
                "report": ours.strategy.report(),
                "scalers": [run.precision_plugin.state_dict() for run in (ours, stock)],
                "lrs": found.lrs,
            }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
