"""``lightning-optim list``: the registry, for people and for programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from lightning_optim import registry
from lightning_optim.cli.names import exported_names


def main(arguments: Sequence[str] = ()) -> int:
    """Print the optimizers and schedules; ``--json`` for programs."""
    parser = argparse.ArgumentParser(prog="lightning-optim list", description="Show the optimizers and schedules.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    if parser.parse_args(list(arguments)).json:
        print(json.dumps(catalogue(), indent=2))
        return 0
    known = catalogue()
    columns = {
        "optimizers": ("name", "class", "kind", "summary", "paper"),
        "schedulers": ("name", "class", "summary"),
    }
    for what, keys in columns.items():
        print(table([[key.upper() for key in keys], *([entry[key] for key in keys] for entry in known[what])]) + "\n")
    print("Use: --optimizer NAME, --lr_scheduler NAME (`lightning-optim fit --optimizer.help NAME` shows the options),")
    print('or in Python: lightning_optim.create_optimizer("lion", model, lr=1e-4)')
    return 0


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """What the registry holds, in primitives."""
    optimizers = [registry.optimizer_info(name) for name in registry.list_optimizers()]
    schedulers = [registry.scheduler_info(name) for name in registry.list_schedulers()]
    return {
        "optimizers": [
            {
                "name": info.name,
                "class": exported_names(info.cls)[0],
                "kind": info.kind,
                "summary": _plain(info.summary),
                "paper": info.paper,
                "same_as": info.torch_equivalent and f"torch.optim.{info.torch_equivalent.__name__}",
                "options": list(info.options),
            }
            for info in optimizers
        ],
        "schedulers": [
            {"name": info.name, "class": exported_names(info.cls)[0], "summary": _plain(info.summary)}
            for info in schedulers
        ],
    }


def _plain(text: str) -> str:
    """A text without the marks of code, which a terminal would show as they are."""
    return text.replace("``", "")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned columns.

    >>> print(table([["a", "bcd"], ["efgh", "i"]]))
    a     bcd
    efgh  i
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
