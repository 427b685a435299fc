"""The language: update rules as pure mathematics, and the Programs that engines run."""

from lightning_optim.rules.policy import Policy, Update
from lightning_optim.rules.rule import Rule
from lightning_optim.rules.trace import Program, trace

__all__ = ["Policy", "Program", "Rule", "Update", "trace"]
