"""How many cases a fuzzer tries, and which."""

from __future__ import annotations

import os


def seeds(sample: int) -> range:
    """The seeds of the cases to try: ``sample`` of them, or ``$FUZZ_CASES``, from ``$FUZZ_SEED`` on.

    A case is made from its seed alone, so that a failure is repeated by ``FUZZ_CASES=1 FUZZ_SEED=<seed>``.
    """
    first = int(os.environ.get("FUZZ_SEED", "0"))
    return range(first, first + int(os.environ.get("FUZZ_CASES", sample)))
