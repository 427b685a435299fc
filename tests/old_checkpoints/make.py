"""Writes checkpoints of the version of the package that is imported, and where they go on to."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from .cases import AFTER, BEFORE, CASES, TRAININGS, fit, made, steps


def main(folder: Path) -> None:
    """Write one file for the plain loops, and two for each training."""
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        net, optimizer, schedule = made(case)
        params = list(net.parameters())
        steps(optimizer, params, schedule, range(BEFORE))
        found[case] = {
            "weights": [p.detach().clone() for p in params],
            "optimizer": optimizer.state_dict(),
            "schedule": None if schedule is None else schedule.state_dict(),
        }
        torch.save(found[case], folder / "copy.pt")  # which `state_dict` is not
        found[case] = torch.load(folder / "copy.pt", weights_only=True)
        steps(optimizer, params, schedule, range(BEFORE, BEFORE + AFTER))
        found[case]["after"] = [p.detach().clone() for p in params]
    (folder / "copy.pt").unlink()
    torch.save(found, folder / "loops.pt")
    ends = {}
    for training in TRAININGS:
        fit(training, stop_at=BEFORE).save_checkpoint(folder / f"{training}.ckpt")
        trainer = fit(training, str(folder / f"{training}.ckpt"))
        ends[training] = {name: p.detach().clone() for name, p in trainer.lightning_module.named_parameters()}
    torch.save(ends, folder / "trained.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
