"""The engines that there are, and the choice of one for a bucket."""

from __future__ import annotations

import os

from lightning_optim.engines.base import Bucket, Decision, Engine
from lightning_optim.engines.eager import EagerEngine
from lightning_optim.engines.errors import EngineError
from lightning_optim.engines.foreach import ForeachEngine
from lightning_optim.engines.host.engine import HostEngine
from lightning_optim.engines.host.threads import requested_threads
from lightning_optim.engines.triton.engine import TritonEngine
from lightning_optim.warnings import warn_once

ENGINE_VARIABLE = "LIGHTNING_OPTIM_ENGINE"

ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (EagerEngine(), ForeachEngine(), HostEngine(), TritonEngine())
}

#: The order in which ``engine="auto"`` tries the engines, by device type: fastest first.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("host", "foreach", "eager"),
    "cuda": ("triton", "foreach", "eager"),
    "default": ("foreach", "eager"),
}


def available_engines() -> dict[str, str | None]:
    """For each engine, None if it can be used on this machine, else why not."""
    return {name: engine.unavailable() for name, engine in ENGINES.items()}


def requested_engine(argument: str) -> str:
    """The engine asked for: the environment variable if set, else the argument.

    Raises:
        ValueError: The name is neither an engine's nor ``"auto"``; or the environment variable for the number of
            threads has no valid number, which is reported here rather than in a step.
    """
    requested_threads()
    override = os.environ.get(ENGINE_VARIABLE)
    names = {"engine": argument} | ({f"the environment variable {ENGINE_VARIABLE}": override} if override else {})
    for source, name in names.items():
        if name != "auto" and name not in ENGINES:
            raise ValueError(f"{source}={name!r} is not an engine; valid: auto, {', '.join(ENGINES)}")
    return override or argument


def choose(bucket: Bucket, requested: str) -> tuple[Engine, Decision]:
    """The engine for a bucket: the one requested, or the fastest that can run it.

    An engine that was requested by name, or that is broken on this machine (no compiler, a failed build), is passed
    over with one warning; one that does not support the bucket only leaves its reason in the Decision.

    Args:
        bucket: What is to be run.
        requested: ``"auto"`` or the name of an engine.
    """
    preference = PREFERENCE.get(bucket.device.type, PREFERENCE["default"])
    order = list(preference) if requested == "auto" else [requested, *(n for n in preference if n != requested)]
    rejected: dict[str, str] = {}
    unexpected: dict[str, str] = {}  # engine -> the key of its warning, which is given once per process
    for name in order:
        engine = ENGINES[name]
        broken = engine.unavailable()
        try:
            reason = broken or engine.rejects(bucket)
        except EngineError as error:
            broken = reason = str(error)
        if reason is None:
            for other in unexpected:
                warn_once(
                    f"lightning-optim: the {other} engine cannot be used ({rejected[other]}); stepping with {name} "
                    "instead, with the same results",
                    key=f"{other} engine: {unexpected[other]}",
                )
            why = "the fastest that supports it" if requested == "auto" else "requested"
            return engine, Decision(
                bucket.label, name, why if requested in ("auto", name) else f"in place of {requested}", rejected
            )
        rejected[name] = reason
        if broken or name == requested:
            unexpected[name] = "broken" if broken else reason  # the message of a failed build differs by kernel
    raise RuntimeError(f"no engine can run {bucket.label}: {rejected}")
