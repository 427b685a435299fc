"""Optimizers, one file each."""

from lightning_optim.adopt import adopt
from lightning_optim.optimizers.adam import AdamOptim
from lightning_optim.optimizers.adamw import AdamWOptim
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.optimizers.lamb import LAMB
from lightning_optim.optimizers.lbfgs.optimizer import LBFGSOptim
from lightning_optim.optimizers.lion import Lion
from lightning_optim.optimizers.muon import MuonOptim
from lightning_optim.optimizers.sam import SAM
from lightning_optim.optimizers.sgd import SGDOptim

# The familiar names of the classes that torch.optim has too. Their own names differ because a second subclass of
# Optimizer called AdamW would make `--optimizer AdamW` ambiguous for every LightningCLI of the process.
Adam = AdamOptim
AdamW = AdamWOptim
LBFGS = LBFGSOptim
Muon = MuonOptim
SGD = SGDOptim

__all__ = [
    "LAMB",
    "LBFGS",
    "SAM",
    "SGD",
    "Adam",
    "AdamOptim",
    "AdamW",
    "AdamWOptim",
    "LBFGSOptim",
    "Lion",
    "Muon",
    "MuonOptim",
    "RuleOptimizer",
    "SGDOptim",
    "adopt",
]
