"""lightning-optim: choose what optimizes a model, and where the step runs, by configuration.

>>> import torch, lightning_optim
>>> model = torch.nn.Linear(4, 2)
>>> optimizer = lightning_optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
>>> schedule = lightning_optim.Cosine(optimizer, warmup_steps=10, total_steps=100)
"""

import sys as _sys
from typing import TYPE_CHECKING

from lightning_optim._commands import only_usage_is_wanted as _only_usage_is_wanted
from lightning_optim._version import __version__ as __version__
from lightning_optim.callbacks.joining import join_trainings as _join_trainings
from lightning_optim.strategy_names import register as _register_strategies

# `lightning-optim --help` answers at once: all below needs torch.
if not _only_usage_is_wanted(_sys.argv, _sys.orig_argv):
    from lightning_optim.adopt import adopt as adopt
    from lightning_optim.optimizers import *  # noqa: F403 # each named there, and nowhere else
    from lightning_optim.param_groups import param_groups as param_groups
    from lightning_optim.registry import create_optimizer as create_optimizer
    from lightning_optim.registry import list_optimizers as list_optimizers
    from lightning_optim.registry import list_schedulers as list_schedulers
    from lightning_optim.registry import optimizer_info as optimizer_info
    from lightning_optim.registry import scheduler_info as scheduler_info
    from lightning_optim.schedulers import *  # noqa: F403 # likewise
    from lightning_optim.warnings import LightningOptimWarning as LightningOptimWarning

    if not TYPE_CHECKING:  # type checkers read the imports
        __all__ = ["__version__", *(name for name, value in globals().items() if callable(value) and name[0] != "_")]

# Both act on Lightning if it is imported, now or later; neither imports anything itself.
_register_strategies()
_join_trainings()
