"""The error that engines raise."""

from __future__ import annotations


class EngineError(RuntimeError):
    """An engine should run a bucket, but cannot here: its build failed, say."""
