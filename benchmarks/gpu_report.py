"""What ``gpu_step.py`` writes: the machine, and the table of its results."""

from __future__ import annotations

import time
from typing import Any

import torch

import lightning_optim


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: Triton's interpreter"
    return {
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "lightning_optim": lightning_optim.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    about = result["machine"]
    lines = [
        f"{about['gpu']}, CUDA {about['cuda']}, torch {about['torch']}, Triton {about['triton']}; {about['date']}. "
        f"`python benchmarks/gpu_step.py`, {result['weights']:,} weights.",
        "",
        "| case | target | contender | device ms | host ms | of copy bandwidth | ours is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        for index, row in enumerate(case["rows"]):
            share, host = row["share_of_copy_bandwidth"], row["host_ms"]
            cells = [
                case["title"] if index == 0 else "",
                case["target"] if index == 0 else "",
                row["name"],
                f"{row['device_ms']:.3f}",
                "" if host is None else f"{host:.3f}",
                "" if share is None else f"{share:.0%}",
                "" if index == 0 else f"{row['ours_is_faster_by']:.2f}×",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
