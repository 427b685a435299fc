"""Cases for test_memory, in a process of their own, since a fault here may end it.

``python -m fuzz.memory_cases FIRST COUNT`` runs the cases of these seeds, and says which one it begins.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

from .memory_world import World

ENGINES = ("host", "foreach", "auto")
STEPS = 6


def attempt(world: World) -> str | None:
    """One step; what it was refused with, if it was."""
    if world.engine is None:
        world.stepper()._plans.clear()
    before, wanted = world.contents(), world.wanted()
    refused = None
    try:
        world.step()
    except (RuntimeError, ValueError) as error:
        refused = str(error)
    if refused is not None:
        assert "parameter" in refused, f"a message that names nothing: {refused}"
        assert all(map(equal, before, world.contents())), f"refused ({refused}), and yet something was written"
        return refused
    for p, value in wanted:
        assert close(p.detach(), value), f"{p} is not {value}"
    return None


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def close(a: Tensor, b: Tensor) -> bool:
    tolerance = 0.02 if torch.bfloat16 in (a.dtype, b.dtype) else 1e-4
    return a.shape == b.shape and torch.allclose(a.to(b.dtype), b, rtol=tolerance, atol=tolerance, equal_nan=True)


def case(seed: int) -> str | None:
    """One case; what it was refused with in the end, if it was.

    Raises:
        AssertionError: The engine does otherwise than the eager one that plans every step anew.
    """
    worlds = World(seed, ENGINES[seed % len(ENGINES)]), World(seed, None)
    for number in range(STEPS):
        for world in worlds:
            world.give_gradients()
            for _ in range(world.random.randrange(4) if number else 0):
                if not world.broken:
                    world.mutate()
        refused, also = map(attempt, worlds)
        where = f"seed {seed}, {worlds[0].name} by {worlds[0].engine}, step {number}, after {worlds[0].names}"
        assert worlds[0].names == worlds[1].names, where
        assert (refused is None) == (also is None), f"{where}: refused: {refused}; the eager engine: {also}"
        for a, b in zip(worlds[0].contents(), worlds[1].contents(), strict=True):
            assert close(a, b), f"{where}: {a} is not {b}"
        if refused is not None or worlds[0].broken:
            return refused
    return None


def main(first: int, count: int) -> None:
    """Run cases, with the end of each on a line of its own."""
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    for seed in range(first, first + count):
        print(seed, end=" ", flush=True)
        try:
            print(case(seed) or "stepped", flush=True)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
