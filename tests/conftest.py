"""Settings for all tests."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Keep the kernels that tests compile out of the user's own cache, and from one run to the next."""
    if config.cache is not None:
        os.environ.setdefault("LIGHTNING_OPTIM_CACHE", str(config.cache.mkdir("kernels")))
        os.environ.setdefault("TRITON_CACHE_DIR", str(config.cache.mkdir("triton")))
