"""``LossScaler`` in plain loops: as torch's own scaler within its bounds, in its state, and beside hooks."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_optim
from lightning_optim.control import skipped_steps
from lightning_optim.control.loss_scale import LossScaler, TooManySkippedStepsError, loss_scaler_like

from .scaling import ALL, SOME, KnownLate, Scaler, equal, network, scales, train

pytestmark = pytest.mark.usefixtures("one_thread")


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
    for found, expected in zip(
        train(scaler, overflows=set()), train(Scaler("cpu", enabled=False), overflows=set()), strict=True
    ):
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


def test_in_which_order_optimizers_are_counted() -> None:
    """In that of their first steps, or in one that is given; a new one never gets the number of another."""
    net = network()
    first, second = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    for given, counts in (((), [1]), ((first, second), [0, 1])):
        scaler = LossScaler("cpu")
        scaler.number(given)
        scaler.scale(net(torch.ones(2, 3)).mean() * math.nan).backward()
        scaler.step(second)
        scaler.update()
        assert scaler.state_dict()["skipped_steps"] == counts
    del first, given
    scaler.scale(net(torch.ones(2, 3)).mean() * math.nan).backward()
    scaler.step(torch.optim.SGD(net.parameters(), lr=0.1))
    assert scaler.state_dict()["skipped_steps"] == [0, 1, 1]


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
    ours.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        ours.step(optimizer)


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_that_torchs_own_scaler_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fused optimizer torch reads nothing, and here nothing is but what has arrived, as on CUDA."""
    monkeypatch.setattr(skipped_steps, "LateReader", KnownLate)
    waited: list[Any] = []
    monkeypatch.setattr(skipped_steps.SkippedSteps, "read", waited.append)
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
