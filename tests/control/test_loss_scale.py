"""``LossScaler`` in plain loops: as torch's own scaler within its bounds, and an end with a reason beyond them."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_optim
from lightning_optim.control import loss_scale, overflow
from lightning_optim.control.loss_scale import LossScaler, TooManySkippedStepsError, loss_scaler_like

pytestmark = pytest.mark.usefixtures("one_thread")

Scaler = torch.amp.GradScaler
#: Which batches overflow, out of twelve.
SOME = {3, 4, 9}
ALL = set(range(100))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 1))


def overflow_in(parameter: Tensor, *at: int) -> Callable[[int], None]:
    """A hook that makes a gradient infinite in some batches."""
    now = [0]

    def hook(gradient: Tensor) -> Tensor:
        return gradient * math.inf if now[0] in at else gradient

    parameter.register_hook(hook)
    return lambda batch: now.__setitem__(0, batch)


def train(
    scaler: Scaler, steps: int = 12, overflows: set[int] = SOME, net: nn.Module | None = None, make: Any = torch.optim.AdamW
) -> Iterator[tuple[float, list[Tensor]]]:
    """A plain loop, as torch's documentation has it; gives the scale and the weights after each step."""
    net = network() if net is None else net
    optimizer = make(net.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        loss = net(torch.randn(5, 3, generator=generator)).square().mean()
        scaler.scale(loss * (math.nan if step in overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        yield scaler.get_scale(), [p.detach().clone() for p in net.parameters()]


def scales(scaler: Scaler, steps: int = 12, overflows: set[int] = SOME) -> list[float]:
    return [scale for scale, _ in train(scaler, steps, overflows)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


# -- the scale ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_within_its_bounds_it_is_torchs_own(fused: bool) -> None:
    settings: dict[str, Any] = {"init_scale": 64.0, "growth_interval": 2, "growth_factor": 4.0}

    def make(params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=lr, fused=fused)

    ours, theirs = LossScaler("cpu", **settings, min_scale=None), Scaler("cpu", **settings)
    for found, expected in zip(train(ours, make=make), train(theirs, make=make), strict=True):
        assert found[0] == expected[0]
        assert equal(found[1], expected[1])
    assert {**ours.state_dict(), **theirs.state_dict()} == ours.state_dict()
    assert int(ours.skipped_steps) == len(SOME)


def test_the_floor() -> None:
    """Bad batches again and again bring torch's scale down to where every gradient vanishes."""
    settings: dict[str, Any] = {"init_scale": 4.0, "backoff_factor": 2.0**-40}
    assert scales(Scaler("cpu", **settings), 8, ALL)[-1] == 0.0
    assert scales(LossScaler("cpu", **settings, min_scale=2.0), 8, ALL) == [2.0] * 8
    assert scales(LossScaler("cpu", init_scale=4.0), 4, ALL) == [2.0, 1.0, 1.0, 1.0]
    assert scales(LossScaler("cpu", init_scale=4.0, min_scale=None), 4, ALL) == [2.0, 1.0, 0.5, 0.25]


def test_the_ceiling() -> None:
    assert scales(Scaler("cpu", 4.0, growth_interval=1), 4, set()) == [8.0, 16.0, 32.0, 64.0]
    assert scales(LossScaler("cpu", 4.0, growth_interval=1, max_scale=10.0), 4, {2}) == [8.0, 10.0, 5.0, 10.0]


def test_a_static_scale() -> None:
    scaler = LossScaler("cpu", init_scale=8.0, growth_interval=1, dynamic=False)
    weights = [weights for _, weights in train(scaler)]
    assert scaler.get_scale() == 8.0
    assert [step for step in range(1, 12) if equal(weights[step], weights[step - 1])] == sorted(SOME)
    assert int(scaler.skipped_steps) == len(SOME)


def test_a_scale_that_is_given_is_kept_within_bounds() -> None:
    scaler = LossScaler("cpu", init_scale=8.0, max_scale=64.0)
    scaler.scale(torch.ones(()))
    for given, found in ((100.0, 64.0), (0.1, 1.0), (torch.tensor(16.0), 16.0)):
        scaler.update(given)
        assert scaler.get_scale() == found


def test_a_scaler_that_is_disabled_does_nothing() -> None:
    scaler = LossScaler("cpu", enabled=False)
    for found, expected in zip(train(scaler, overflows=set()), train(Scaler("cpu", enabled=False), overflows=set()), strict=True):
        assert equal(found[1], expected[1])
    assert scaler.state_dict() == {}
    scaler.load_state_dict({})
    assert int(scaler.skipped_steps) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_scale": 0.0}, "LossScaler: init_scale=0.0; valid: a finite number > 0"),
        ({"init_scale": math.inf}, "init_scale=inf"),
        ({"growth_factor": 1.0}, "growth_factor=1.0; valid: a finite number > 1"),
        ({"backoff_factor": 1.0}, r"backoff_factor=1.0; valid: a number in \(0, 1\)"),
        ({"growth_interval": 0}, "growth_interval=0; valid: a whole number >= 1"),
        ({"growth_interval": 2.5}, "growth_interval=2.5 is a float"),
        ({"min_scale": -1.0}, "min_scale=-1.0; valid: a finite number > 0, None"),
        ({"max_scale": "high"}, "max_scale='high' is a str"),
        ({"max_skipped_steps": 0}, "max_skipped_steps=0; valid: a whole number >= 1, None"),
        ({"dynamic": "no"}, "dynamic='no' is not a bool"),
        ({"init_scale": 0.5}, "init_scale=0.5 with min_scale=1.0 and max_scale=None; valid: min_scale <= init_scale"),
        ({"max_scale": 8.0}, "init_scale=65536.0 with min_scale=1.0 and max_scale=8.0"),
    ],
)
def test_settings_that_are_not_valid(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossScaler("cpu", **arguments)


# -- giving up ------------------------------------------------------------------------------------------------------


class Crossed(nn.Module):
    """Its layers are registered in another order than they are run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first, self.middle = nn.Linear(4, 1), nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)).tanh())


@pytest.fixture(params=[False, True], ids=["at once", "one step late"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host knows of the device: on the CPU all, and on CUDA what was one step before."""
    if not request.param:
        return

    class Late(loss_scale.LateReader):
        def __init__(self) -> None:
            super().__init__()
            self.before: list[Any] = []

        def read(self, tensor: Tensor, about: Any = None) -> list[Any]:
            before, self.before = self.before, [(tensor.clone(), about)]
            return before

    monkeypatch.setattr(loss_scale, "LateReader", Late)


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_it_gives_up_at_that_very_step(most: int, late: None) -> None:
    """Whatever the host has seen before; a step in between that was made begins a new row."""
    good = 3 if most > 3 else 0
    scaler = LossScaler("cpu", max_skipped_steps=most)
    weights = []
    with pytest.raises(TooManySkippedStepsError, match=f"LossScaler: {most} steps in a row were skipped"):
        for _, now in train(scaler, 20, ALL - {good}):
            weights.append(now)
    assert len(weights) == good + most
    assert equal(weights[good], weights[-1])  # the error has changed none


def test_it_names_the_gradient_that_was_first_in_the_backward_pass(late: None) -> None:
    """Here of a layer that the module has before the others."""
    net = Crossed()
    hooks = [overflow_in(p, *range(1, 9)) for p in (net.middle.bias, net.last.weight, net.first.weight)]
    scaler = LossScaler("cpu", init_scale=16.0, max_skipped_steps=5, module=net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TooManySkippedStepsError) as caught:
        for batch in range(9):
            for at in hooks:
                at(batch)
            optimizer.zero_grad()
            for _ in range(2):  # a window of two
                scaler.scale(net(torch.ones(2, 3)).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert str(caught.value) == (
        "LossScaler: 5 steps in a row were skipped, since gradients were inf or NaN, the last one with a scale of 1. "
        "The first such gradient in the backward pass was that of last.weight; 3 of 6 parameters had one. "
        "What to do: valid: a smaller loss, min_scale=None, or bfloat16 (precision='bf16-mixed')"
    )
    assert batch == 5
    assert not any(p._backward_hooks and len(p._backward_hooks) > 1 for p in net.parameters())  # ours are removed


def test_a_gradient_that_spreads_is_told_from_where_it_comes() -> None:
    """From ``last`` on all are infinite or NaN; by the order of the module the first would be ``middle``'s."""
    net = Crossed()

    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 1e38 * 1e38

    scaler = LossScaler("cpu", max_skipped_steps=3, module=net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TooManySkippedStepsError, match=r"that of last\.\w+; 6 of 6 parameters had one"):
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(Exploding.apply(net(torch.ones(2, 3))).mean()).backward()
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("loss", "The loss itself was inf or NaN. .*What to do: no scale can mend that: look at the data"),
        ("weight", "Weights are inf or NaN as well, such as 2.weight. What to do: no scale can mend that"),
    ],
)
def test_what_no_scale_can_mend_is_said(spoil: str, message: str) -> None:
    net = network()
    scaler = LossScaler("cpu", max_skipped_steps=4, module=net)
    if spoil == "weight":
        net[2].weight.data[0, 0] = math.inf
    with pytest.raises(TooManySkippedStepsError, match=message):
        list(train(scaler, 8, ALL if spoil == "loss" else set(), net))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dynamic": False}, "valid: dynamic=True, an init_scale below 8, or bfloat16"),
        ({"min_scale": None}, "valid: a larger max_skipped_steps, a smaller init_scale, or bfloat16"),
        ({}, "with a scale of 2. .*valid: a larger max_skipped_steps"),
    ],
)
def test_it_says_what_to_do(settings: dict[str, Any], message: str) -> None:
    net = network()
    overflow_in(net[0].weight, 0)
    scaler = LossScaler("cpu", init_scale=8.0, max_skipped_steps=3, **settings)
    with pytest.raises(TooManySkippedStepsError, match=message):
        list(train(scaler, 8, set(), net))


@pytest.mark.parametrize("names", ["module", "optimizer", None])
def test_where_names_come_from(names: str | None) -> None:
    net = nn.Sequential(network())
    overflow_in(net[0][2].weight, 0)
    groups: Any = [{"params": list(net[0][0].parameters())}, {"params": list(net[0][2].parameters())}]
    optimizer = torch.optim.SGD(net.named_parameters() if names == "optimizer" else groups, lr=0.1)
    scaler = LossScaler("cpu", max_skipped_steps=1, module=net if names == "module" else None)
    scaler.scale(net(torch.ones(2, 3)).mean()).backward()
    wanted = r"parameter 0 \(shape \(2, 4\)\) of param group 1" if names is None else r"0\.2\.weight"
    with pytest.raises(TooManySkippedStepsError, match=f"was that of {wanted}; 1 of"):
        scaler.step(optimizer)


def test_who_catches_the_error_can_go_on() -> None:
    scaler = LossScaler("cpu", init_scale=2.0, max_skipped_steps=2)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    raised = []
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 3)).mean() * (math.inf if step < 5 else 1.0)).backward()
        try:
            scaler.step(optimizer)
            scaler.update()
        except TooManySkippedStepsError:
            raised.append(step)
    assert raised == [1, 3]
    assert scaler.state_dict()["consecutive_skips"] == [0]
    assert scaler.state_dict()["skipped_steps"] == [5]


def test_sparse_gradients() -> None:
    net = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1))
    scaler = LossScaler("cpu", max_skipped_steps=3, module=net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TooManySkippedStepsError, match=r"that of 1\.\w+; 3 of 3 parameters had one"):
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(net(torch.tensor([1, 2])).mean() * math.nan).backward()
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("apart", [False, True])
def test_each_optimizer_has_its_own_row(apart: bool) -> None:
    """One that is fine does not hide that another is never stepped; updates after each, or after both."""
    nets = [network(), network()]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets]
    scaler = LossScaler("cpu", max_skipped_steps=4, module=nets[1])

    def step(which: int) -> None:
        optimizers[which].zero_grad()
        scaler.scale(nets[which](torch.ones(2, 3)).mean() * (math.nan if which else 1.0)).backward()
        scaler.step(optimizers[which])
        if apart or which:
            scaler.update()

    for _ in range(3):
        step(0)
        step(1)
    assert [scaler.step_was_skipped(optimizer) for optimizer in optimizers] == [False, True]
    assert scaler.state_dict()["consecutive_skips"] == [0, 3]
    step(0)
    with pytest.raises(TooManySkippedStepsError, match="that of 3"):
        step(1)


# -- state ----------------------------------------------------------------------------------------------------------


def saved(scaler: Scaler) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(scaler.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def test_a_run_resumes_bit_for_bit() -> None:
    settings: dict[str, Any] = {"init_scale": 64.0, "growth_interval": 3, "max_skipped_steps": 4}
    bad = {1, 4, 5, 6, 7}
    straight = LossScaler("cpu", **settings)
    with pytest.raises(TooManySkippedStepsError):
        list(train(straight, 12, bad))
    for cut in range(1, 8):
        before, after = LossScaler("cpu", **settings), LossScaler("cpu", **settings)
        net = network()
        first = [scale for scale, _ in train(before, cut, bad, net)]
        after.load_state_dict(saved(before))
        rest: list[float] = []
        with pytest.raises(TooManySkippedStepsError):
            rest.extend(scale for scale, _ in train(after, 12, {step - cut for step in bad}, net))
        assert first == scales(LossScaler("cpu", **settings), cut, bad)
        assert after.state_dict() == straight.state_dict()


def test_states_are_interchangeable_with_torchs() -> None:
    ours, theirs = LossScaler("cpu", 64.0, growth_interval=5), Scaler("cpu", 64.0, growth_interval=5)
    list(train(ours))
    list(train(theirs))
    found, expected = Scaler("cpu"), LossScaler("cpu", growth_interval=5)
    found.load_state_dict(saved(ours))
    expected.load_state_dict(saved(theirs))
    assert found.state_dict() == theirs.state_dict()
    assert {**ours.state_dict(), "consecutive_skips": [], "skipped_steps": []} == expected.state_dict()


def test_settings_are_not_loaded() -> None:
    theirs = Scaler("cpu", 4096.0, growth_interval=2000)
    list(train(theirs, 12, set()))
    scaler = LossScaler("cpu", growth_interval=3, max_scale=2.0**20, min_scale=8192.0)
    scaler.load_state_dict(saved(theirs))
    assert (scaler.get_scale(), scaler.get_growth_interval()) == (8192.0, 3)
    # Twelve good steps are more than three, which torch's own scaler would never notice.
    assert scales(scaler, 4, set()) == [16384.0, 16384.0, 16384.0, 32768.0]
    static = LossScaler("cpu", 16.0, dynamic=False)
    static.load_state_dict(saved(theirs))
    assert static.get_scale() == 16.0


def test_copies_belong_to_no_training() -> None:
    net = network()
    scaler = LossScaler("cpu", module=net, max_skipped_steps=9)
    list(train(scaler, 6, {4, 5}, net))
    for other in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):  # noqa: S301
        assert other.state_dict() == scaler.state_dict()
        assert other.module is None
        list(train(other, 3, set()))


# -- what hooks do --------------------------------------------------------------------------------------------------


def test_gradients_that_were_dropped() -> None:
    """torch's error, as the backward pass may have been forgotten, unless it is known that it was not."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for scaler in (Scaler("cpu"), LossScaler("cpu")):
        scaler.scale(torch.ones(()))
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            scaler.step(optimizer)
    ours = LossScaler("cpu", growth_interval=1)
    ours.gradients_may_be_dropped = True
    for _ in range(2):  # before a loss was scaled, and after it
        ours.unscale_(optimizer)
        ours.step(optimizer)
        ours.update()
        ours.scale(torch.ones(()))
    assert ours.get_scale() == 65536.0
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        ours.step(optimizer)
        ours.step(optimizer)


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("late", [True], indirect=True, ids=["one step late"])
def test_nothing_is_read_that_torchs_own_scaler_does_not_read(late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fused optimizer, torch reads nothing. (What is late was copied when the device got to it.)"""
    waited: list[int] = []
    read = loss_scale._Skips.read
    monkeypatch.setattr(loss_scale._Skips, "read", lambda self: (waited.append(1), read(self))[1])
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    scaler = LossScaler("cpu", max_scale=2.0**20, growth_interval=2)
    x = torch.ones(2, 3)
    with Reads() as reads:
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(net(x).mean() * (math.inf if step == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            scaler.skipped_steps  # noqa: B018 # a tensor
    assert reads.found == 0
    assert not waited
    assert int(scaler.skipped_steps) == 1


# -- FSDP 1 ---------------------------------------------------------------------------------------------------------


def test_which_scalers_it_can_stand_in_for() -> None:
    class Own(Scaler):
        pass

    assert loss_scaler_like(Scaler("cpu")) is LossScaler
    assert loss_scaler_like(Own("cpu")) is None
    assert loss_scaler_like(None) is None


def test_the_scaler_of_fsdp_1(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        settings: dict[str, Any] = {"init_scale": 64.0, "growth_interval": 2}
        cls = loss_scaler_like(ShardedGradScaler("cpu"))
        assert cls is not None
        assert issubclass(cls, ShardedGradScaler)
        theirs = ShardedGradScaler("cpu", **settings)
        for found, expected in zip(train(cls("cpu", **settings)), train(theirs), strict=True):
            assert found[0] == expected[0]
            assert equal(found[1], expected[1])
        with pytest.raises(TooManySkippedStepsError, match="3 steps in a row"):
            list(train(cls("cpu", max_skipped_steps=3), 5, ALL))
    finally:
        dist.destroy_process_group()


def test_our_optimizers_too() -> None:
    found = list(train(LossScaler("cpu"), make=lightning_optim.AdamW))
    expected = list(train(Scaler("cpu"), make=lightning_optim.AdamW))
    assert all(a[0] == b[0] and equal(a[1], b[1]) for a, b in zip(found, expected, strict=True))


def test_a_gradient_that_never_was_is_no_overflow() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)], lr=0.1)
    found = overflow.find_overflow(optimizer, None, overflow.BackwardWatch(overflow.parameters_of(optimizer)))
    assert (found.parameters, found.weights, found.is_beyond_scaling) == ([], [], False)
    assert str(found) == "No gradient that this process still has was such a one; the errors of others may say more."
