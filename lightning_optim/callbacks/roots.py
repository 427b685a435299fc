"""Our callbacks for both roots of Lightning, ``lightning.pytorch`` and ``pytorch_lightning``, made in one place.

The two packages have the same code, but two classes ``Callback``: each Trainer calls only its own, and either package
may be missing. So a file of this folder defines a callback once, and this module makes its class for each root.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    #: The base class in a callback's file; for editors and type checkers it is Lightning's ``Callback``.
    Callback = object

#: Each root of Lightning -> the module in which our classes for it are found, by pickle for one.
ROOTS = {
    "lightning.pytorch": "lightning_optim.callbacks",
    "pytorch_lightning": "lightning_optim.callbacks._pytorch_lightning",
}

#: Each callback -> its file in this folder.
CALLBACKS = {
    "FillTotalSteps": "schedule_totals",
    "RefuseWithoutReplay": "replay_guard",
    "EvaluationWeights": "evaluation_weights",
    "SpikeRollback": "spike_rollback",
    "LossScaling": "loss_scaling",
    "LRFinder": "lr_finder",
    "GradientClipping": "gradient_clipping",
    "GradientAccumulation": "gradient_accumulation",
}


@cache
def callback_class(name: str, root: str) -> type[Any]:
    """The class of a callback for one root of Lightning, which is imported with it.

    Args:
        name: One of :data:`CALLBACKS`.
        root: One of :data:`ROOTS`.

    Raises:
        AttributeError: There is no such callback.
    """
    if name not in CALLBACKS:
        raise AttributeError(f"module {ROOTS[root]!r} has no attribute {name!r}; it has {', '.join(CALLBACKS)}")
    ours = getattr(import_module(f"lightning_optim.callbacks.{CALLBACKS[name]}"), name)
    theirs = import_module(root).Callback
    return type(name, (ours, theirs), {"__doc__": ours.__doc__, "__module__": ROOTS[root], "root": root})
    return type(name, (ours, theirs), {"__doc__": ours.__doc__, "__module__": ROOTS[root]})


def make_known(cli: ModuleType) -> None:
    """Make the classes of one root, as a LightningCLI finds by their bare names those callbacks that are there.

    Args:
        cli: The module ``cli`` of that root.
    """
    for name in CALLBACKS:
        callback_class(name, cli.__name__.removesuffix(".cli"))
