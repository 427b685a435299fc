"""Tests in ``interpreted`` need ``TRITON_INTERPRET=1`` before the first import of Triton: a process of their own."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
