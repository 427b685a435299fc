"""L-BFGS: limited-memory quasi-Newton steps, with the history in host memory."""

from lightning_optim.optimizers.lbfgs.optimizer import LBFGSOptim

LBFGS = LBFGSOptim

__all__ = ["LBFGS", "LBFGSOptim"]
