"""``python -m tests.kills --kills 30``: kill, resume to the end, and compare with the run that nobody killed."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from .comparing import differences
from .killing import WHERE, Kill, end_of, last_good_checkpoint, run
from .training import CONFIGURATIONS


def main() -> int:
    """Kill so many times; 1 if a resumed run differs from the uninterrupted one."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--only", choices=CONFIGURATIONS, nargs="+", default=list(CONFIGURATIONS))
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.kills):
            name = options.only[number % len(options.only)]
            found = killed_and_resumed(name, Path(folder), number, random.Random(f"{options.seed} {number}"))  # noqa: S311
            failed += bool(found)
            for line in found:
                print(f"    {line}")
    print(f"{options.kills} runs killed; {failed} did not end as the run that nobody killed")
    return 1 if failed else 0


def killed_and_resumed(name: str, base: Path, number: int, rng: random.Random) -> list[str]:
    """Kill a training, once or twice, resume it to its end, and compare.

    Args:
        name: The configuration.
        base: The folder in which all runs have theirs; the uninterrupted run of a configuration is made once.
        number: Of this run; it decides how the first process dies.
        rng: Decides when it dies, and whether the process that resumes it is killed, too.

    Returns:
        The differences from the uninterrupted run.
    """
    whole, resumed = base / name.replace(", ", "-"), base / f"killed-{number}"
    if not whole.exists():
        run(name, whole)
    told = []
    for where in [WHERE[number % len(WHERE)], *(["moment"] if rng.random() < 0.3 else [])]:
        kill = Kill.drawn(where, rng)  # type: ignore[arg-type]
        lived = run(name, resumed, kill)
        last = last_good_checkpoint(resumed)
        told.append(f"{kill.where} {kill.count}+{kill.share:.2f} {'(lived)' if lived else ''}-> {last and last.name}")
        if lived:
            break
    run(name, resumed)
    found = list(differences(end_of(whole), end_of(resumed), (whole, resumed)))
    print(f"{number:3}  {name:26}{'; '.join(told)}: {'differs' if found else 'the same bits'}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
