"""``lightning-optim doctor``: what this machine can do, which engine steps what, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lightning_optim
from lightning_optim.engines.cache import CACHE_VARIABLE, cache_folder
from lightning_optim.engines.choice import ENGINE_VARIABLE, PREFERENCE, available_engines
from lightning_optim.engines.host.threads import THREADS_VARIABLE, thread_count
from lightning_optim.engines.host.toolchain import ToolchainError, find_toolchain
from lightning_optim.engines.private import not_private

PACKAGES = ("torch", "lightning", "pytorch-lightning", "jsonargparse", "accelerate", "triton", "deepspeed")

Facts = dict[str, dict[str, Any]]


def main(arguments: Sequence[str] = ()) -> int:
    """Print the facts; ``--json`` for programs."""
    parser = argparse.ArgumentParser(
        prog="lightning-optim doctor",
        description="Show what this machine can do, which engine steps what, and why.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(list(arguments)).json
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else render(facts))
    return 0


def collect() -> Facts:
    """All facts, in primitives, by section.

    The sections ``engines`` and ``auto`` are what the step itself would find: the second builds the kernels that
    it reports on, as the first step of a training would.
    """
    return {
        "versions": versions(),
        "processor": processor(),
        "threads": threads(),
        "compiler": compiler(),
        "accelerators": accelerators(),
        "engines": {name: reason or "usable" for name, reason in available_engines().items()},
        "auto": automatic_choices(),
        "kernel cache": kernel_cache(),  # after the choices, which may fill it
    }


def render(facts: Facts) -> str:
    """Facts as aligned text, one section after another."""
    width = max(len(name) for section in facts.values() for name in section)
    lines: list[str] = []
    for title, section in facts.items():
        lines.append(f"{title}:")
        for name, value in section.items():
            first, *rest = str("-" if value is None else value).splitlines() or [""]
            lines.append(f"  {name:<{width}}  {first}")
            lines.extend(f"  {'':<{width}}  {line}" for line in rest)
    return "\n".join(lines)


def versions() -> dict[str, Any]:
    """Versions by the installed metadata, so that nothing heavy is imported to learn them."""
    found: dict[str, Any] = {
        "lightning-optim": lightning_optim.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def processor() -> dict[str, Any]:
    """The processor and the vector instructions that torch uses on it."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (
        match := re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    ):
        model = match[1]
    return {"model": model, "vector level": torch.backends.cpu.get_cpu_capability()}


def threads() -> dict[str, Any]:
    """How many threads there are for a step, and who decided that."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processors": available,
        "torch": torch.get_num_threads(),
        "host engine": _or_error(thread_count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        THREADS_VARIABLE: os.environ.get(THREADS_VARIABLE),
        "OpenMP libraries loaded": "\n".join(_openmp_libraries()) or None,
    }


def compiler() -> dict[str, Any]:
    """What the host engine builds its kernels with, or why it cannot."""
    try:
        toolchain = find_toolchain()
    except ToolchainError as error:
        return {"found": None, "reason": str(error)}
    return {
        "path": shlex.join([toolchain.compiler, *toolchain.arguments]),
        "version": toolchain.version,
        "flags": " ".join(toolchain.flags),
        "OpenMP": " ".join(toolchain.libraries) or "by the system's name",
    }


def accelerators() -> dict[str, Any]:
    """Devices that torch can use."""
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cuda": "\n".join(cuda) or None,
        "mps": "available" if torch.backends.mps.is_available() else None,
        "xpu": "available" if torch.xpu.is_available() else None,
    }


def automatic_choices() -> dict[str, Any]:
    """What ``engine="auto"`` takes for three kinds of weights, and why it passed over the faster ones."""
    choices = {"asked for": os.environ.get(ENGINE_VARIABLE, "auto")}
    for title, device, dtype in (
        ("float32 on CPU", "cpu", torch.float32),
        ("bfloat16 on CPU", "cpu", torch.bfloat16),
        ("float32 on CUDA", "cuda", torch.float32),
    ):
        if device == "cuda" and not torch.cuda.is_available():
            choices[title] = f"{PREFERENCE.get('cuda', PREFERENCE['default'])[0]} (by preference: there is no device)"
            continue
        choices[title] = _or_error(partial(_engine_report, device, dtype))
    return choices


def _engine_report(device: str, dtype: torch.dtype) -> str:
    weight = torch.nn.Parameter(torch.zeros(64, device=device, dtype=dtype))
    threads = os.environ.pop(THREADS_VARIABLE, None)  # a bad value is reported elsewhere and must not matter here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says what the warning would
            return lightning_optim.AdamW([weight]).engine_report()
    finally:
        if threads is not None:
            os.environ[THREADS_VARIABLE] = threads


def kernel_cache() -> dict[str, Any]:
    """Where compiled kernels are kept, and in what state that folder is."""
    try:
        folder = cache_folder()
    except OSError as error:
        return {"folder": None, "state": f"{error}; kernels are built anew by each process"}
    source = f"${CACHE_VARIABLE}" if os.environ.get(CACHE_VARIABLE) else "default"
    return {"folder": str(folder), "chosen by": source, "state": _folder_state(folder)}


def _folder_state(folder: Path) -> str:
    try:
        folder.stat()
    except FileNotFoundError:
        return "not there yet; the first step makes it"
    except OSError as error:
        return f"cannot be read ({error}); kernels are built anew by each process"
    if (reason := not_private(folder)) is not None:
        return f"others can write to it ({reason}), so it is not used; kernels are built anew by each process"
    if not os.access(folder, os.W_OK):
        return "not writable; kernels are built anew by each process"
    kernels = list(folder.glob("*.so"))
    return f"{len(kernels)} kernels, {sum(kernel.stat().st_size for kernel in kernels) / 1024:.0f} KiB"


def _or_error(read: Callable[[], Any]) -> Any:
    """A fact, or what is wrong with the setting that it depends on: the doctor itself must not fail."""
    try:
        return read()
    except ValueError as error:
        return f"error: {error}"


def _openmp_libraries() -> list[str]:
    """The OpenMP runtimes in this process. Two of them are two pools of threads on the same cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    found = re.findall(r"\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps.read_text(errors="replace"))
    return sorted(set(found))
