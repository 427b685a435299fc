"""Detached steps: the host's pass against others, the time that is exposed on a simulated link, and a GPU's figures.

    python benchmarks/offload.py [--parts host link copied] [--sizes 1M 10M 124M] [--docs]
    python benchmarks/offload.py --parts gpu                # on a GPU
    python benchmarks/offload.py --parts gpu --rehearse     # anywhere, without figures

What is predicted stands in the source, and beside what was measured in the results. DeepSpeed and torchao take part
where they are installed. Each part's results say on which machine they were measured.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import offload_gpu
import offload_host
import offload_link
import torch
from common import RESULTS, put_between, size, weights
from offload_report import markdown, summary
from offload_ways import MODELS

PARTS = ("host", "link", "copied", "gpu")


def main() -> None:
    """Measure, print, and write ``offload.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:3]))
    parser.add_argument("--sizes", nargs="+", type=size, default=["1M", "10M", "124M"], help="of the host's pass")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="about how long each group of the host's pass takes"
    )
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way over the link")
    parser.add_argument("--steps", type=int, default=3, help="of each turn")
    parser.add_argument("--link-weights", type=size, default="124M")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backward", type=float, default=0.4, help="seconds")
    parser.add_argument("--forward", type=float, default=0.2, help="seconds")
    parser.add_argument("--bandwidth", type=float, default=12e9, help="bytes per second")
    parser.add_argument("--rehearse", action="store_true", help="run the part for a GPU on the CPU, without figures")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the Markdown")
    parser.add_argument("--docs", action="store_true", help="also put the tables into docs/offload.md")
    args = parser.parse_args()
    gc.freeze()  # collections between the runs, of which there are many, need not look at what is imported
    if "gpu" in args.parts and not args.rehearse and not torch.cuda.is_available():
        parser.error("--parts gpu: no CUDA device; valid: --rehearse, which gives no figures")

    args.output.mkdir(parents=True, exist_ok=True)
    stored = args.output / "offload.json"
    result: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    if "host" in args.parts:
        sizes = {label: weights(label) for label in args.sizes}
        result["host"] = offload_host.run(sizes, rounds=100, seconds=args.seconds)
    for part in {"link", "copied"} & {*args.parts}:
        setting = offload_link.Setting(
            weights(args.link_weights), args.backward, args.forward, args.bandwidth, copies=part == "copied"
        )
        result[part] = offload_link.run(setting, models=args.models, rounds=args.rounds, steps=args.steps)
    if "gpu" in args.parts:
        measured = offload_gpu.REHEARSAL if args.rehearse else offload_gpu.Size()
        found = offload_gpu.run(measured, rehearse=args.rehearse)
        if args.rehearse:
            print("a rehearsal on the CPU: these are no figures, and nothing is written")
            print(json.dumps(found, indent=1))
        else:
            result["gpu"] = found
    if args.rehearse and args.parts == ["gpu"]:
        return
    stored.write_text(json.dumps(result, indent=1) + "\n")
    (args.output / "offload.md").write_text(markdown(result))
    print(markdown(result))
    if args.docs:
        put_between(Path(__file__).parent.parent / "docs" / "offload.md", "offload", summary(result))


if __name__ == "__main__":
    main()
