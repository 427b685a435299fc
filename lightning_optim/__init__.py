"""lightning-optim: choose what optimizes a model, and where the step runs, by configuration.

>>> import torch, lightning_optim
>>> model = torch.nn.Linear(4, 2)
>>> optimizer = lightning_optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
>>> schedule = lightning_optim.Cosine(optimizer, warmup_steps=10, total_steps=100)
"""

import sys as _sys

from lightning_optim._commands import only_usage_is_wanted as _only_usage_is_wanted
from lightning_optim._version import __version__
from lightning_optim.callbacks.joining import join_trainings as _join_trainings
from lightning_optim.strategy_names import register as _register_strategies

# `lightning-optim --help` answers at once: all below needs torch.
if not _only_usage_is_wanted(_sys.argv, _sys.orig_argv):
    from lightning_optim.optimizers import (
        LAMB,
        LBFGS,
        SAM,
        SGD,
        Adam,
        AdamOptim,
        AdamW,
        AdamWOptim,
        LBFGSOptim,
        Lion,
        Muon,
        MuonOptim,
        RuleOptimizer,
        SGDOptim,
        adopt,
    )
    from lightning_optim.param_groups import param_groups
    from lightning_optim.registry import (
        create_optimizer,
        list_optimizers,
        list_schedulers,
        optimizer_info,
        scheduler_info,
    )
    from lightning_optim.schedulers import WSD, Cosine, Linear, Schedule
    from lightning_optim.warnings import LightningOptimWarning

__all__ = [
    "LAMB",
    "LBFGS",
    "SAM",
    "SGD",
    "WSD",
    "Adam",
    "AdamOptim",
    "AdamW",
    "AdamWOptim",
    "Cosine",
    "LBFGSOptim",
    "LightningOptimWarning",
    "Linear",
    "Lion",
    "Muon",
    "MuonOptim",
    "RuleOptimizer",
    "SGDOptim",
    "Schedule",
    "__version__",
    "adopt",
    "create_optimizer",
    "list_optimizers",
    "list_schedulers",
    "optimizer_info",
    "param_groups",
    "scheduler_info",
]

# With the Lightning that is imported already, or will be, if any; neither imports anything itself.
_register_strategies()
_join_trainings()
