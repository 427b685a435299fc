"""The language: update rules as pure mathematics, and the Programs that engines run."""

from lightning_optim.rules.policy import Policy, Update
from lightning_optim.rules.program import Program
from lightning_optim.rules.rule import Rule, Step
from lightning_optim.rules.slots import Slot
from lightning_optim.rules.trace import trace

__all__ = ["Policy", "Program", "Rule", "Slot", "Step", "Update", "trace"]
