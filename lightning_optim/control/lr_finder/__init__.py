"""Learning rate range tests: the learning rate rises step by step, and the curve of the losses suggests one."""

from lightning_optim.control.lr_finder.find import find_lr as find_lr
from lightning_optim.control.lr_finder.result import RangeTest as RangeTest
from lightning_optim.control.lr_finder.suggestions import Suggestion as Suggestion
