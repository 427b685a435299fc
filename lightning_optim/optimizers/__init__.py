"""Optimizers: one file each, and one line each here, from which the registry and ``lightning_optim`` take them.

Names are imported as themselves so that type checkers take them for this package's own.
"""

from typing import TYPE_CHECKING

from lightning_optim.optimizers.adafactor import AdafactorOptim as AdafactorOptim
from lightning_optim.optimizers.adam import AdamOptim as AdamOptim
from lightning_optim.optimizers.adamw import AdamWOptim as AdamWOptim
from lightning_optim.optimizers.base import RuleOptimizer as RuleOptimizer
from lightning_optim.optimizers.lamb import LAMB as LAMB
from lightning_optim.optimizers.lbfgs.optimizer import LBFGSOptim as LBFGSOptim
from lightning_optim.optimizers.lion import Lion as Lion
from lightning_optim.optimizers.muon import MuonOptim as MuonOptim
from lightning_optim.optimizers.prodigy import Prodigy as Prodigy
from lightning_optim.optimizers.radam import RAdamOptim as RAdamOptim
from lightning_optim.optimizers.rmsprop import RMSpropOptim as RMSpropOptim
from lightning_optim.optimizers.sam import SAM as SAM
from lightning_optim.optimizers.schedulefreeadamw import ScheduleFreeAdamW as ScheduleFreeAdamW
from lightning_optim.optimizers.sgd import SGDOptim as SGDOptim
from lightning_optim.optimizers.soap import SOAP as SOAP
from lightning_optim.optimizers.sophia import Sophia as Sophia

# The familiar names of the classes that torch.optim has too. Their own names differ because a second subclass of
# Optimizer called AdamW would make `--optimizer AdamW` ambiguous for every LightningCLI of the process.
Adafactor = AdafactorOptim
Adam = AdamOptim
AdamW = AdamWOptim
LBFGS = LBFGSOptim
Muon = MuonOptim
RAdam = RAdamOptim
RMSprop = RMSpropOptim
SGD = SGDOptim

#: The classes by the names of this module.
EXPORTED = {name: value for name, value in globals().items() if isinstance(value, type)}

if not TYPE_CHECKING:  # type checkers read the imports
    __all__ = list(EXPORTED)
