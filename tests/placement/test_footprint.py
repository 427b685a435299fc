"""Bytes: by hand, and against what optimizers really allocate."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import Tensor, nn
from torch.optim import Optimizer

import lightning_optim
from lightning_optim import AdamW, Lion, RuleOptimizer, optimizer_info
from lightning_optim.adopt import ADOPTABLE
from lightning_optim.placement.footprint import Footprint, Maker, footprint
from lightning_optim.registry import OPTIMIZERS

from .common import weights

known_warnings = pytest.mark.filterwarnings(
    "ignore:.*the host engine cannot be used .no C compiler:lightning_optim.warnings.LightningOptimWarning"
)

N = 10**6


@pytest.mark.parametrize(
    ("make", "dtype", "each"),
    [
        # weights, gradients, state, masters, state beside masters; bytes for each weight
        (AdamW, torch.float32, (4, 4, 8, 4, 8)),
        (AdamW, torch.bfloat16, (2, 2, 8, 4, 8)),
        (AdamW, torch.float64, (8, 8, 16, 8, 16)),
        (Lion, torch.float32, (4, 4, 4, 4, 4)),
        (Lion, torch.bfloat16, (2, 2, 4, 4, 4)),
        (partial(AdamW, amsgrad=True), torch.float32, (4, 4, 12, 4, 12)),
        (partial(AdamW, state_dtype="bfloat16"), torch.bfloat16, (2, 2, 4, 4, 4)),
        (partial(AdamW, rounding="kahan"), torch.bfloat16, (2, 2, 10, 4, 8)),  # masters lose nothing
        (partial(AdamW, rounding="kahan"), torch.float32, (4, 4, 8, 4, 8)),
        (lightning_optim.SGD, torch.float32, (4, 4, 0, 4, 0)),
        (partial(lightning_optim.SGD, momentum=0.9), torch.float32, (4, 4, 4, 4, 4)),
        # Torch's has its state in the type of what it steps.
        (torch.optim.AdamW, torch.bfloat16, (2, 2, 4, 4, 8)),
        (Foreign, torch.bfloat16, (2, 2, 2, 4, 4)),
    ],
)
def test_by_hand(make: Maker, dtype: torch.dtype, each: tuple[int, ...]) -> None:
    found = footprint(weights(N, dtype), make)
    counter = 4 if "AdamW" in found.optimizer or "Foreign" in found.optimizer else 0
    sizes = (found.weights, found.gradients, found.state.bytes - counter, found.masters)
    assert (*sizes, found.master_state.bytes - counter) == tuple(N * size for size in each)
    assert found.copies == (0 if found.trained == found.masters else found.trained)
    assert found.state.exact
    assert found.parameters == N


@pytest.mark.parametrize(
    ("make", "dtype", "in_place", "detached"),
    [
        # what is read, and what is written, of weights, gradients, slots, and copies
        (AdamW, torch.float32, 4 + 4 + 8 + 4 + 8, 28),
        (AdamW, torch.bfloat16, 2 + 2 + 8 + 2 + 8, 2 + 4 + 8 + 4 + 8 + 2),
        (Lion, torch.float32, 4 + 4 + 4 + 4 + 4, 20),
        (partial(AdamW, rounding="kahan"), torch.bfloat16, 2 + 2 + 8 + 2 + 2 + 8 + 2, 28),
        (lightning_optim.LAMB, torch.float32, 2 * (4 + 4 + 8) + 4 + 8, 44),  # its norms are a pass of their own
    ],
)
def test_traffic_by_hand(make: Maker, dtype: torch.dtype, in_place: int, detached: int) -> None:
    found = footprint(weights(N, dtype), make)
    assert (found.traffic, found.master_traffic) == (in_place * N, detached * N)


def test_float64_masters() -> None:
    found = footprint(weights(N, torch.bfloat16), AdamW, master_dtype=torch.float64)
    assert (found.masters, found.master_state.bytes, found.state.bytes) == (8 * N, 16 * N + 4, 8 * N + 4)
    assert found.master_traffic == (2 + 8 + 16 + 8 + 16 + 2) * N  # the 52 bytes of the host engine's benchmark


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, dtype=dtype)
        self.hidden = nn.Linear(6, 6, dtype=dtype)
        self.kernel = nn.Conv1d(6, 6, 3, dtype=dtype)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6, dtype=dtype).requires_grad_(False)


def allocated(tensors: Iterable[Any]) -> int:
    """Bytes of the memory under tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if isinstance(t, Tensor)}
    return sum(storage.nbytes() for storage in storages.values())


def stepped(params: Sequence[Tensor], make: Callable[[list[Tensor]], Optimizer]) -> Optimizer:
    optimizer = make([p for p in params if p.requires_grad])
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
    return optimizer


def state_of(optimizer: Optimizer) -> int:
    return allocated(value for state in optimizer.state.values() for value in state.values())


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16_state": {"state_dtype": "bfloat16"},
    "kahan": {"rounding": "kahan"},
    "stochastic": {"rounding": "stochastic"},
    "amsgrad": {"amsgrad": True},
    "momentum": {"momentum": 0.9},
}
RULES = [name for name, info in OPTIMIZERS.items() if issubclass(info.cls, RuleOptimizer)]


@known_warnings
@pytest.mark.filterwarnings("ignore:.*the parameters have no names")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in RULES
        for case, options in CASES.items()
        if options.keys() <= {*OPTIMIZERS[name].options}
    ],
)
def test_what_is_predicted_is_what_is_allocated(name: str, case: str, dtype: torch.dtype) -> None:
    def make(params: Iterable[Tensor]) -> RuleOptimizer:
        return optimizer_info(name).create(list(params), lr=0.01, engine="eager", **CASES[case])

    model = Net(dtype)
    params = list(model.parameters())
    predicted = footprint(model, make)
    optimizer = stepped(params, make)
    assert predicted.state.exact
    assert predicted.state.bytes == state_of(optimizer)
    assert predicted.weights == allocated([*params, *model.buffers()])
    assert predicted.gradients == allocated(p.grad for p in params)
    assert footprint(model, optimizer).state == predicted.state, "an instance, and what makes one"

    masters = [nn.Parameter(p.detach().float()) for p in params if p.requires_grad]
    assert predicted.masters == allocated(masters)
    assert predicted.master_state.bytes == state_of(stepped(masters, make))


OTHERS = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"]
NOT_ADOPTED = [cls for cls in (getattr(torch.optim, name) for name in OTHERS) if cls not in ADOPTABLE]


@pytest.mark.parametrize("make", [Foreign, *NOT_ADOPTED])
def test_others_are_stepped_on_the_meta_device(make: Any) -> None:
    model = Net()
    optimizer = make(p for p in model.parameters() if p.requires_grad)
    predicted = footprint(model, optimizer)
    assert "dry step on the meta device" in predicted.state.known_by
    assert not any(value.is_meta for state in optimizer.state.values() for value in state.values()), "untouched"
    real = stepped([p for p in model.parameters() if p.requires_grad], make)
    assert predicted.state.bytes == state_of(real)
    again = footprint(model, real)
    assert again.state.bytes == state_of(real)
    assert ("measured" in again.state.known_by) == ("stopped" in predicted.state.known_by)


def test_measured_state_grows_with_its_masters() -> None:
    model = Net(torch.bfloat16)
    real = stepped([p for p in model.parameters() if p.requires_grad], torch.optim.ASGD)
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters() if p.requires_grad]
    found = footprint(model, real)
    assert found.state.known_by == "measured: the state that it has"
    assert found.master_state.bytes == state_of(stepped(masters, torch.optim.ASGD))


class Strange(Optimizer):
    """Cannot be made from its defaults alone, nor stepped without data."""

    def __init__(self, params: Any, teacher: str) -> None:
        self.teacher = teacher
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


class Says(Strange):
    def state_bytes(self, params: Sequence[Tensor]) -> int:
        return sum(3 * p.numel() * p.element_size() for p in params)


def test_an_estimate_says_so() -> None:
    found = footprint(weights(N, torch.bfloat16), Strange(weights(N, torch.bfloat16), "me"))
    assert not found.state.exact
    assert "estimate" in found.state.known_by
    assert "teacher" in found.state.known_by
    assert (found.state.bytes, found.master_state.bytes) == (4 * N, 8 * N)


def test_an_optimizer_may_say_how_large_its_state_is() -> None:
    found = footprint(weights(N, torch.bfloat16), Says(weights(N, torch.bfloat16), "me"))
    assert (found.state.bytes, found.master_state.bytes) == (6 * N, 12 * N)
    assert found.state.known_by == "Says.state_bytes"


def test_a_history_is_counted_by_its_size() -> None:
    found = footprint(weights(N), partial(torch.optim.LBFGS, history_size=20))
    assert found.history == 20
    assert found.master_state.bytes == (2 * 20 + 8) * 4 * N
    assert found.needs_host is not None
    assert "20 past steps" in found.needs_host


def test_what_needs_a_closure_must_be_on_the_host() -> None:
    class Searches(torch.optim.SGD):
        needs_closure = True

    found = footprint(weights(N), Searches)
    assert found.needs_host is not None
    assert "line search" in found.needs_host
    assert footprint(weights(N), torch.optim.SGD).needs_host is None


class Wraps(Optimizer):
    """Shares everything with the optimizer in it, and keeps the weights while they are elsewhere."""

    def __init__(self, params: Any, base: Callable[[Any], Optimizer]) -> None:
        self.base = base(params)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.state, self.param_groups = self.base.state, self.base.param_groups

    def perturb(self) -> None: ...


def test_a_wrapper_has_the_state_of_what_is_in_it() -> None:
    found = footprint(weights(N), partial(Wraps, base=AdamW))
    assert found.optimizer == "Wraps(AdamW)"
    assert found.state == footprint(weights(N), AdamW).state
    assert found.workspace == found.detached_workspace == 4 * N


def test_names_decide_where_they_are_known() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(100, 10), "hidden": nn.Linear(10, 10, bias=False)})
    found = footprint(model, lightning_optim.Muon)
    assert found.state.bytes == 4 * (2 * 1000 + 100) + 4, "the embedding has two averages, the matrix one"
    assert found.workspace == 2 * 100


def test_the_optimizers_own_clipping_is_known() -> None:
    assert footprint(weights(N), partial(AdamW, max_grad_norm=1.0)).clips
    assert not footprint(weights(N), AdamW).clips


def test_nothing_is_allocated_for_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**6)  # four terabytes
    found = footprint(model, AdamW)
    assert found.weights == 4 * (10**12 + 10**6)
    assert found.state.bytes == 2 * found.weights + 8


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"master_dtype=torch.bfloat16; valid: torch.float32, torch.float64"):
        footprint(weights(N), AdamW, master_dtype=torch.bfloat16)
    frozen = [nn.Parameter(torch.ones(2), requires_grad=False)]
    for optimizer in (AdamW, AdamW(frozen)):
        with pytest.raises(ValueError, match="no parameter requires a gradient"):
            footprint(frozen, optimizer)


def test_shards_are_one_process_s_part() -> None:
    """Two processes of FSDP2, of which this is one and the other is not there."""
    code = """
        import torch
        import torch.distributed as dist
        from torch import nn
        from torch.distributed.fsdp import fully_shard
        from torch.testing._internal.distributed.fake_pg import FakeStore
        from lightning_optim import AdamW
        from lightning_optim.placement.footprint import footprint
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        model = nn.Linear(10, 10, bias=False)
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
        found = footprint(model, AdamW(model.parameters()))
        assert found.divided
        print(found.weights, found.gradients, found.state.bytes, found.masters, found.parameters, found.traffic)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["200", "200", "404", "200", "50", "1400"], done.stderr


def test_a_footprint_is_data() -> None:
    assert footprint(weights(N), AdamW) == footprint(weights(N), AdamW)
    assert isinstance(hash(footprint(weights(N), AdamW)), int)
    assert isinstance(footprint(weights(N), AdamW), Footprint)


@known_warnings
def test_sam_has_the_state_of_its_base_and_copies_of_the_weights() -> None:
    from lightning_optim.optimizers.sam import SAM

    model = Net()
    make = partial(SAM, base=partial(AdamW, engine="eager"))
    predicted = footprint(model, make)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.perturb()
    optimizer.restore()
    optimizer.step()
    assert predicted.optimizer == "SAM(AdamW)"
    assert predicted.state.exact
    assert predicted.state.bytes == state_of(optimizer)
    assert predicted.workspace == allocated(params)
    assert predicted.needs_host is None


def test_our_l_bfgs_needs_what_it_checks_for() -> None:
    """It refuses a budget that is smaller than its arithmetic."""
    params = weights(N)
    predicted = footprint(params, partial(lightning_optim.LBFGS, history_size=7))
    assert predicted.history == 7
    assert predicted.needs_closure
    real = [nn.Parameter(torch.ones(N // 2, 2))]
    lightning_optim.LBFGS(real, history_size=7, memory_budget=predicted.master_state.bytes)
    with pytest.raises(ValueError, match="history_size=7"):
        lightning_optim.LBFGS(real, history_size=7, memory_budget=predicted.master_state.bytes - 1)
