"""``lightning-optim plan``: where the optimizer's step should run, with the reason in words and numbers."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import registry
from lightning_optim.cli.listing import table
from lightning_optim.hints import did_you_mean
from lightning_optim.placement.choice import PlacementError, Plan, choose
from lightning_optim.placement.footprint import Footprint, Maker, footprint
from lightning_optim.placement.machine import Machine
from lightning_optim.placement.needs import SHARDINGS, Conditions, gibibytes
from lightning_optim.placement.step_time import BUCKET_BYTES

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

_DESCRIPTION = """\
Choose between a step on the device (in_graph) and one in host memory (detached), for a training that is described
  by numbers:  --weights 7e9 --dtype bfloat16 --optimizer adamw --optimizer.state_dtype bfloat16
  or as for `lightning-optim fit`:  --config FILE, --model CLASS, --optimizer NAME, --trainer.precision ...
Nothing is trained or allocated: models are made on the meta device, where they can be."""

#: Suffixes of a number of weights.
_SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9}


class UsageError(ValueError):
    """The arguments are not valid, or do not go together."""


def main(arguments: Sequence[str] = ()) -> int:
    """Print the plan; ``--json`` for programs.

    Returns:
        0; 1 if no placement fits; 2 for arguments that are not valid.
    """
    parser = _parser()
    options, training = parser.parse_known_args(list(arguments))
    try:
        machine = _machine(options)
        needed, clips, accumulates, notes = _training(options, training)
        conditions = Conditions(
            ranks=options.ranks,
            local_ranks=options.local_ranks,
            sharding=options.sharding,
            clips=clips or options.clip,
            accumulates=accumulates or options.accumulate,
            activation_bytes=None if options.activation_gb is None else int(options.activation_gb * 1e9),
            backward_seconds=None if options.backward_ms is None else options.backward_ms / 1e3,
            bucket_bytes=int(options.bucket_mb * 1e6),
        )
    except (ValueError, TypeError, OSError) as error:  # about options, an optimizer, or a file
        parser.error(str(error))
    try:
        plan = choose(needed, machine, conditions)
    except PlacementError as error:
        print(json.dumps({"error": str(error)}, indent=2) if options.json else error, file=sys.stderr)
        return 1
    print(
        json.dumps({**plan.as_dict(), "notes": [*notes, *plan.notes]}, indent=2)
        if options.json
        else render(plan, notes)
    )
    return 0


def render(plan: Plan, notes: Sequence[str] = ()) -> str:
    """A plan as text: the reason, the table, the arithmetic, and what was assumed."""
    lines = [str(plan), "", table(plan.table()), ""]
    if plan.placement == "detached":
        lines += [f"clip mode: {plan.clip}", ""]
    lines += ["Memory, for each process:"]
    for row in plan.rows:
        for where, parts in (("device", row.device), ("host", row.host)):
            if parts:
                named = ", ".join(f"{name} {gibibytes(size)}" for name, size in parts.items() if size)
                lines.append(f"  {row.placement}, {where}: {named}")
    lines += ["Estimated times:", *(f"  {line}" for row in plan.rows for line in row.arithmetic)]
    lines += ["Notes:", *(f"  {note}" for note in (*notes, *plan.notes))]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-optim plan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # other flags are the training's
    )
    numbers = parser.add_argument_group("a training by numbers")
    numbers.add_argument("--weights", type=_count, metavar="N", help="how many, such as 7e9 or 7B")
    numbers.add_argument("--dtype", choices=DTYPES, help="type of the weights and gradients (float32)")
    numbers.add_argument("--clip", action="store_true", help="gradients are clipped, or a loss scale is used")
    numbers.add_argument("--accumulate", action="store_true", help="a step is for several backward passes")
    run = parser.add_argument_group("how it is run")
    run.add_argument("--ranks", type=int, default=1, metavar="N", help="number of processes, one for each device")
    run.add_argument("--local-ranks", type=int, metavar="N", help="how many share one host (its number of devices)")
    run.add_argument("--sharding", choices=SHARDINGS, default="ddp", help="what the ranks divide (%(default)s)")
    run.add_argument(
        "--activation-gb", type=float, metavar="GB", help="peak of activations, in 1e9 bytes; else there is a reserve"
    )
    run.add_argument("--backward-ms", type=float, metavar="MS", help="time of a backward pass, which may hide a step")
    run.add_argument(
        "--master-dtype", choices=("float32", "float64"), default="float32", help="of a detached step (%(default)s)"
    )
    run.add_argument(
        "--bucket-mb", type=float, default=BUCKET_BYTES / 1e6, metavar="MB", help="of gradients (%(default)g)"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--machine", type=Path, metavar="FILE", help="JSON of a machine; else this one is measured")
    where.add_argument("--save-machine", type=Path, metavar="FILE", help="write the machine's JSON there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _machine(options: argparse.Namespace) -> Machine:
    if options.machine is None:
        machine = Machine.measure()
    else:
        try:
            machine = Machine.from_json(options.machine.read_text())
        except ValueError as error:
            raise UsageError(f"--machine {options.machine}: {error}") from None
    if options.save_machine is not None:
        options.save_machine.write_text(machine.to_json() + "\n")
    return machine


def _training(options: argparse.Namespace, rest: list[str]) -> tuple[Footprint, bool, bool, tuple[str, ...]]:
    """The footprint, whether the Trainer clips and accumulates, and notes."""
    master = DTYPES[options.master_dtype]
    if options.weights is None:
        if not rest:
            raise UsageError("what is to be trained? --weights N, or --config FILE or --model CLASS as for `fit`")
        if options.dtype is not None:
            raise UsageError("--dtype goes with --weights; a model's is that of --trainer.precision")
        for flag in (word.partition("=")[0] for word in rest):
            # The cutoff is closer than `--weights_only` is to `--weights`: that is a flag of `fit`.
            if hint := did_you_mean(flag, _flags(), cutoff=0.85):
                raise UsageError(f"unknown argument {flag!r}{hint}")
        from lightning_optim.cli.with_lightning import can_use_lightning

        if not can_use_lightning("plan"):
            raise UsageError("without Lightning a training is described by numbers: --weights N --optimizer NAME")
        from lightning_optim.cli.planned import PlanCLI

        return PlanCLI.planned(rest, master)
    weights = _by_number(options.weights, DTYPES[options.dtype or "float32"])
    return footprint(weights, _optimizer(rest), master_dtype=master), False, False, ()


def _by_number(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Parameters with a given number of weights: a matrix, which any optimizer takes, and a vector for an odd one."""
    shapes = [(count // 2, 2), (count % 2,)]
    return [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes if 0 not in shape]


def _optimizer(arguments: Sequence[str]) -> Maker:
    """The maker of an optimizer from ``--optimizer NAME --optimizer.OPTION VALUE ...``."""
    values: dict[str, str] = {}
    waiting = list(arguments)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        if flag != "--optimizer" and not flag.startswith("--optimizer."):
            hint = did_you_mean(flag, _flags())
            raise UsageError(
                f"unknown argument {flag!r}{hint}; beside --weights: --optimizer NAME, --optimizer.OPTION VALUE"
            )
        if not equals and not waiting:
            raise UsageError(f"{flag} needs a value")
        values[flag.removeprefix("--optimizer").removeprefix(".")] = value if equals else waiting.pop(0)
    cls = _class(values.pop("", "adamw"))
    known = [name for name in inspect.signature(cls).parameters if name != "params"]
    for name in values:
        if name not in known:
            raise UsageError(
                f"{cls.__name__} has no option {name!r}{did_you_mean(name, known)}; valid: {', '.join(known)}"
            )
    # Wrappers have an optimizer in them: `--optimizer.base adamw`.
    given: dict[str, Any] = {name: _class(text) if name == "base" else _value(text) for name, text in values.items()}
    return partial(cls, **given)


def _flags() -> list[str]:
    """The flags of this command itself."""
    return [flag for action in _parser()._actions for flag in action.option_strings if flag.startswith("--")]


def _class(name: str) -> type[Optimizer]:
    module, _, attribute = name.rpartition(".")
    if not module:
        return registry.optimizer_info(name).cls
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--optimizer {name}: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise UsageError(f"--optimizer {name} is no torch.optim.Optimizer")
    return cls


def _value(text: str) -> Any:
    """A value, read nearly as in YAML: numbers, lists, true, false and null are themselves, all else is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _count(text: str) -> int:
    """A number of weights.

    >>> _count("7e9"), _count("124M"), _count("1.5b")
    (7000000000, 124000000, 1500000000)
    """
    factor = _SUFFIXES.get(text[-1:].lower(), 1)
    try:
        count = float(text[:-1] if factor != 1 else text) * factor
        if not 1 <= count < 2**62:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of weights; valid: such as 7e9, 7B, 124M") from None
    return round(count)
