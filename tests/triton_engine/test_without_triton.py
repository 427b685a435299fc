"""A machine without Triton, or with a broken one, steps by the next engine, and says so once."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CODE = """
import sys, warnings
{hide}
import torch, lightning_optim
from lightning_optim.engines import ENGINES, available_engines
print(available_engines()["triton"])
ends = []
for engine in ("triton", "foreach"):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = lightning_optim.AdamW([weight], lr=0.1, engine=engine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            weight.grad = torch.arange(3.0)
            optimizer.step()
    caught = [str(w.message) for w in caught if "the triton engine" in str(w.message)]  # not that there is no compiler
    print(len(caught), *caught)
    ends.append(weight.detach())
torch.testing.assert_close(*ends)
optimizer = lightning_optim.AdamW([torch.nn.Parameter(torch.ones(3))], engine="triton")
print(optimizer.engine_report().splitlines()[1])
"""

HIDDEN = 'sys.modules["triton"] = None'
BROKEN = """
import importlib.abc, importlib.machinery
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "triton" else None
    def create_module(self, spec): return None
    def exec_module(self, module): raise ImportError("libtriton.so: undefined symbol")
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize(("hide", "reason"), [(HIDDEN, "not installed"), (BROKEN, "does not import: libtriton.so")])
def test_the_next_engine_steps(hide: str, reason: str) -> None:
    done = subprocess.run([sys.executable, "-c", _CODE.format(hide=hide)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Triton ")
    assert reason in lines[0]
    assert lines[1].startswith("1 lightning-optim: the triton engine cannot be used (Triton ")
    assert lines[2] == "0"
    assert reason in lines[3]
