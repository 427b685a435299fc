"""What every schedule shares, so that a schedule's own file holds only its formula."""

from lightning_optim.schedulers.base.schedule import Schedule

__all__ = ["Schedule"]
