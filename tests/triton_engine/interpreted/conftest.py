"""Nothing here may pass because another engine has stepped in."""

from __future__ import annotations

from lightning_optim.engines.triton.build import interpreted

assert interpreted(), "set TRITON_INTERPRET=1 before the first import of Triton"
