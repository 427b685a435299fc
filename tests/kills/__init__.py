"""Trainings that are killed, resumed, and compared with one that nobody killed: ``python -m tests.kills``."""

import pytest

pytest.importorskip("lightning")
