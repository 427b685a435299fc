"""Random lives of schedules: steps, checkpoints in any order, groups, totals and copies, against the definitions.

Beside the schedule goes a model of it: a position, a total, a base learning rate for each group, and what the rates are
in force. After everything that is done, the optimizer has the model's learning rates, and the schedule tells them.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import lightning_optim
from lightning_optim.schedulers import WSD, Cosine, Linear, Schedule

from .common import seeds

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.. before .optimizer.step"),
    pytest.mark.filterwarnings(
        "ignore:.*optimizer.step.. has been overridden"
    ),  # of copies, which torch has not wrapped
    pytest.mark.filterwarnings("ignore:.*the checkpoint's options are in force:lightning_optim.LightningOptimWarning"),
]

KINDS: dict[str, Any] = {"Linear": Linear, "Cosine": Cosine, "WSD": WSD}


@dataclass
class Expected:
    """What a schedule is to be."""

    kind: str
    warmup: int
    total: int
    floor: float
    start: float | None
    bases: list[float]
    position: int = 0
    rates: list[float] = field(default_factory=list)

    def factor(self) -> float:
        step, warmup, total = self.position, self.warmup, self.total
        if step < warmup:
            return (step + 1) / (warmup + 1) if self.start is None else self.start + (1 - self.start) * step / warmup
        done = 1.0 if step >= total else (step - warmup) / (total - warmup)
        if self.kind == "Linear":
            shape = 1 - done
        elif self.kind == "Cosine":
            shape = (1 + math.cos(math.pi * done)) / 2
        else:
            begin = max(warmup, total - round(0.2 * total))
            if step < begin:
                return 1.0
            shape = 1 - math.sqrt(1.0 if step >= total else (step - begin) / (total - begin))
        return self.floor + (1 - self.floor) * shape

    def settle(self) -> None:
        self.rates = [base * self.factor() for base in self.bases]


class Life:
    """A schedule with its optimizer, and what they are to be."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311
        pick = self.random
        warmup = pick.choice([0, 1, 3])
        self.ours, self.tensors = pick.random() < 0.3, pick.random() < 0.3
        self.expected = Expected(
            kind=pick.choice(list(KINDS)),
            warmup=warmup,
            total=pick.randint(max(4, warmup + 2), 14),
            floor=pick.choice([0.0, 0.1]),
            start=pick.choice([None, None, 0.25]),
            bases=[pick.choice([1.0, 0.3, 0.07]) for _ in range(pick.randint(1, 3))],
        )
        self.optimizer, self.schedule = self.make()
        self.expected.settle()
        self.saved: list[tuple[Any, Any, Expected]] = []

    def make_optimizer(self) -> Optimizer:
        groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": self.rate(lr)} for lr in self.expected.bases]
        return lightning_optim.AdamW(groups) if self.ours else torch.optim.SGD(groups, lr=0.5)

    def rate(self, lr: float) -> Any:
        return torch.tensor(lr, dtype=torch.float64) if self.tensors else lr

    def make_schedule(self, optimizer: Optimizer) -> Schedule:
        one = self.expected
        options = {"min_lr_ratio": one.floor, "warmup_start": one.start, "total_steps": one.total}
        schedule: Schedule = KINDS[one.kind](optimizer, warmup_steps=one.warmup, **options)
        return schedule

    def make(self) -> tuple[Optimizer, Schedule]:
        optimizer = self.make_optimizer()
        return optimizer, self.make_schedule(optimizer)

    # -- what may happen ----------------------------------------------------------------------------------------

    def step(self) -> None:
        self.optimizer.step()
        self.schedule.step()
        self.expected.position += 1
        self.expected.settle()

    def save(self) -> None:
        file = io.BytesIO()
        torch.save((self.optimizer.state_dict(), self.schedule.state_dict()), file)
        file.seek(0)
        self.saved.append((*torch.load(file, weights_only=True), copy.deepcopy(self.expected)))

    def resume(self) -> None:
        """Make all anew, and load what was saved, in one of the orders that there are."""
        if not self.saved:
            return
        *states, self.expected = copy.deepcopy(self.random.choice(self.saved))
        order = self.random.choice(["o s O S", "o O s S", "o s S O", "o s S"])
        for what in order.split():
            if what == "o":
                self.optimizer = self.make_optimizer()
            elif what == "s":
                self.schedule = self.make_schedule(self.optimizer)
            elif what == "O":
                self.optimizer.load_state_dict(states[0])
            else:
                self.schedule.load_state_dict(states[1])

    def go_back(self) -> None:
        """Load what was saved into what is there, if it has as many groups."""
        fitting = [saved for saved in self.saved if len(saved[2].bases) == len(self.optimizer.param_groups)]
        if fitting:
            *states, self.expected = copy.deepcopy(self.random.choice(fitting))
            loads = [
                lambda: self.optimizer.load_state_dict(states[0]),
                lambda: self.schedule.load_state_dict(states[1]),
            ]
            self.random.shuffle(loads)
            for load in loads:
                load()

    def begin_anew(self) -> None:
        """Another schedule on the same optimizer, whose state may then be loaded: it stands at its own first rate."""
        self.schedule = self.make_schedule(self.optimizer)
        if self.random.random() < 0.5:
            self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        self.expected.position = 0
        self.expected.bases = self.expected.bases[: len(self.optimizer.param_groups)]
        self.expected.settle()

    def add_a_group(self) -> None:
        if len(self.optimizer.param_groups) < 5:
            lr = self.random.choice([0.9, 0.2])
            group = {"params": [torch.zeros(1, requires_grad=True)], "lr": self.rate(lr)}
            self.optimizer.add_param_group(group)
            self.expected.bases.append(lr)
            self.expected.rates.append(lr)  # until the next step
            # Joined at once, so that a change of the total finds it there.
            self.step()

    def change_the_total(self) -> None:
        self.expected.total = self.random.randint(max(4, self.expected.warmup + 2), 20)
        before = self.expected.rates
        self.schedule.set_total_steps(self.expected.total)
        self.expected.settle()
        if self.expected.rates != before and self.random.random() < 0.2:
            self.schedule.set_total_steps(self.expected.total)  # twice is once

    def copy_both(self) -> None:
        both: Any = (self.optimizer, self.schedule)
        how = self.random.choice([copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])  # noqa: S301
        self.optimizer, self.schedule = how(both)

    def check(self, after: str) -> None:
        groups = [float(group["lr"]) for group in self.optimizer.param_groups]
        assert groups == pytest.approx(self.expected.rates, rel=1e-12, abs=1e-15), after
        assert self.schedule.optimizer is self.optimizer, after
        assert self.schedule.get_last_lr() == [group["lr"] for group in self.optimizer.param_groups], after
        assert all(isinstance(group["lr"], torch.Tensor) == self.tensors for group in self.optimizer.param_groups), (
            after
        )


@pytest.mark.parametrize("seed", seeds(40))
def test_random_lives(seed: int) -> None:
    life = Life(seed)
    acts = ["step"] * 6 + ["save"] * 3 + ["resume"] * 2
    acts += ["go_back", "begin_anew", "add_a_group", "change_the_total", "copy_both"]
    done = ["made"]
    life.check("made")
    for _ in range(25):
        done.append(life.random.choice(acts))
        getattr(life, done[-1])()
        life.check(" ".join(done))
