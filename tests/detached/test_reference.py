"""Detached steps are those of an optimizer of torch that has float32 masters for its parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import lightning_optim
from lightning_optim.offload import Detached

from .common import (
    OURS,
    PAIRS,
    UNDOABLE,
    Plan,
    Run,
    assert_close_to,
    known_warnings,
    link,
    loss_of,
    reference,
    run,
    small,
    weights,
)

pytestmark = known_warnings

PLANS: dict[str, Plan] = {
    "plain": Plan(),
    "clip": Plan(clip=20.0),
    "4 micro-batches": Plan(micro=4),
    "4 micro-batches, clip": Plan(micro=4, clip=40.0),
    "loss scale, clip": Plan(scale=64.0, clip=20.0),
    "gradients missing": Plan(absent=lambda step: [(), (0, 1), (4,), (0, 1, 2, 3, 4, 5), (2, 3), ()][step]),
    "one never has a gradient": Plan(absent=lambda step: (1, 4)),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def modes(name: str) -> list[str]:
    return ["exact"] + (["speculative"] if name in UNDOABLE else [])


def compare(name: str, plan: Plan, dtype: torch.dtype, **options: Any) -> Run:
    ours, theirs = PAIRS[name]
    found = run(weights(dtype), ours, plan, small(**options))
    wide = torch.float64 if dtype == torch.float64 or "master_dtype" in options else torch.float32
    # Newton–Schulz steps multiply differences of products by up to 8 each: 5 of them.
    tolerance = 1e-12 if wide == torch.float64 else (3e-4 if name == "muon" else 1e-6)
    assert_close_to(found, reference(weights(dtype), theirs, plan, wide), tolerance)
    return found


@pytest.mark.matrix(unless=lambda name, case: case == "4 micro-batches, clip" or name in ("adamw, amsgrad", "foreign"))
@pytest.mark.parametrize("case", PLANS)
@pytest.mark.parametrize("name", PAIRS)
def test_every_optimizer(name: str, case: str) -> None:
    for mode in modes(name):
        compare(name, PLANS[case], torch.bfloat16, clip=mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PLANS)
@pytest.mark.parametrize("name", ["adamw, amsgrad", "torch SGD", "foreign"])
def test_every_type_of_weight(name: str, case: str, dtype: torch.dtype) -> None:
    compare(name, PLANS[case], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["adamw, amsgrad", "sgd, dampening", "torch AdamW", "foreign"])
def test_float64_masters(name: str, dtype: torch.dtype) -> None:
    for mode in modes(name):
        found = compare(name, PLANS["4 micro-batches, clip"], dtype, clip=mode, master_dtype="float64")
        assert {master.dtype for master in found.masters} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["4 micro-batches", "4 micro-batches, clip"])
@pytest.mark.parametrize("mode", ["exact", "speculative"])
def test_nobody_says_which_micro_batch_is_the_last(mode: str, case: str, dtype: torch.dtype) -> None:
    """Sums are the masters' all the same: what one pass leaves in its place is taken when it ends."""
    ours, theirs = PAIRS["torch AdamW"]
    found = run(weights(dtype), ours, PLANS[case], small(clip=mode), last=False)
    assert_close_to(found, reference(weights(dtype), theirs, PLANS[case]))


@pytest.mark.parametrize("last", [True, False])
def test_micro_batches_with_gradients_missing_are_summed_in_the_masters_type(last: bool) -> None:
    plan = Plan(micro=4, absent=lambda step: (1, 4) if step != 2 else (0,))
    ours, theirs = PAIRS["torch AdamW"]
    for bucket_mb in (1e-5, 1.0):
        found = run(weights(), ours, plan, small(bucket_mb=bucket_mb), last=last)
        assert_close_to(found, reference(weights(), theirs, plan))


def two_groups(params: list[Any]) -> list[dict[str, Any]]:
    return [
        {"params": params[::2], "lr": 0.05, "weight_decay": 0.0},
        {"params": params[1::2], "betas": (0.5, 0.9), "weight_decay": 0.3},
    ]


@pytest.mark.parametrize("mode", ["exact", "speculative"])
@pytest.mark.parametrize("name", ["adam", "torch AdamW"])
def test_param_groups_with_options_of_their_own(name: str, mode: str) -> None:
    plan = Plan(clip=8.0, groups=two_groups)
    ours, theirs = PAIRS[name]
    found = run(weights(), ours, plan, small(clip=mode, bucket_mb=1.0))
    assert_close_to(found, reference(weights(), theirs, plan))


@pytest.mark.parametrize("mode", ["exact", "speculative"])
@pytest.mark.parametrize("cls", [lightning_optim.AdamW, torch.optim.AdamW])
def test_a_learning_rate_that_is_a_tensor(cls: Any, mode: str) -> None:
    runs = []
    for lr in (torch.tensor(0.02), 0.02):
        runs.append(run(weights(), partial(cls, lr=lr), Plan(clip=20.0), small(clip=mode)))
    # A schedule multiplies a tensor in float32, a number in float64.
    assert_close_to(runs[0], runs[1], 1e-6)


@pytest.mark.parametrize("mode", ["exact", "speculative"])
@pytest.mark.parametrize("name", ["sgd, dampening", "torch AdamW", "foreign"])
def test_parameters_that_are_frozen_unfrozen_and_added(name: str, mode: str) -> None:
    if mode not in modes(name):
        pytest.skip("it runs its own step")
    ours, theirs = PAIRS[name]
    ends = []
    for detach in (True, False):
        params = weights(torch.float32)
        params[1].requires_grad_(False)
        optimizer = (ours if detach else theirs)(params[:4])
        pipeline = Detached(optimizer, small(clip=mode)) if detach else None
        for step in range(8):
            if step == 2:
                params[1].requires_grad_(True)
                params[2].requires_grad_(False)
            if step == 4:
                optimizer.add_param_group({"params": params[4:], "lr": 0.01})
                params[2].requires_grad_(True)
            active = params if step >= 4 else params[:4]
            loss_of(active, step).backward()
            if pipeline is not None:
                pipeline.step()
                pipeline.zero_grad()
            else:
                optimizer.step()
                optimizer.zero_grad()
        if pipeline is not None:
            pipeline.close()
        ends.append(params)
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_the_optimizer_knows_its_gradients_norm(name: str) -> None:
    ours, _ = PAIRS[name]
    found = run(weights(), ours, Plan(clip=20.0), small())
    assert len(found.norms) == 6
    if isinstance(found.optimizer, lightning_optim.optimizers.RuleOptimizer):
        assert found.optimizer.grad_norm is not None
        assert found.optimizer.grad_norm.item() == found.norms[-1]


@pytest.mark.parametrize("mode", ["exact", "speculative"])
def test_the_optimizers_own_limit_of_the_norm(mode: str) -> None:
    make = partial(lightning_optim.AdamW, lr=0.02, max_grad_norm=20.0)
    found = run(weights(), make, Plan(), small(clip=mode))
    expected = run(weights(), partial(lightning_optim.AdamW, lr=0.02), Plan(clip=20.0), small())
    assert_close_to(found, expected, 0.0)
    if mode == "speculative":
        bites = sum(norm > 20.0 for norm in found.norms[1:])  # the first window shows what is usual
        buckets = {event.label for event in found.trace.of("update")}
        assert 0 < bites < 5
        assert len(found.trace.of("undo")) == bites * len(buckets)


@pytest.mark.parametrize("overlap", [True, False])
def test_stochastic_rounding_of_the_state_is_that_of_one_piece(overlap: bool) -> None:
    """The noise is a parameter's, by its number, whatever bucket it is in."""
    make = partial(lightning_optim.AdamW, lr=0.02, state_dtype="bfloat16", rounding="stochastic")

    def groups(params: list[Any]) -> Any:
        return [{"params": params[3:]}, {"params": params[:3], "lr": 0.01}]

    plan = Plan(groups=groups)
    whole = reference(weights(), make, plan)
    for bucket_mb in (1e-5, 1e-4, 1.0):
        found = run(weights(), make, plan, small(bucket_mb=bucket_mb), overlap=overlap)
        for a, b in zip(found.masters, whole.masters, strict=True):
            assert torch.equal(a, b)
        for key, values in whole.state.items():
            for slot, value in values.items():
                assert torch.equal(found.state[key][slot], value)
                assert value.dtype == (torch.float32 if slot == "step" else torch.bfloat16)


@pytest.mark.parametrize("name", ["torch AdamW", "lamb", "foreign"])
def test_over_a_link_that_poisons_what_is_read_too_early(name: str) -> None:
    for mode in modes(name):
        for case in ("4 micro-batches, clip", "gradients missing"):
            ours, theirs = PAIRS[name]
            found = run(weights(), ours, PLANS[case], small(clip=mode), transport=link())
            assert_close_to(found, reference(weights(), theirs, PLANS[case]))


class Net(torch.nn.Sequential):
    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        super().__init__(torch.nn.Linear(6, 16), torch.nn.LayerNorm(16), torch.nn.GELU(), torch.nn.Linear(16, 3))
        self.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("mode", ["exact", "speculative"])
def test_a_model(mode: str, dtype: torch.dtype, tolerance: float) -> None:
    """Under bfloat16 one weight that rounds the other way moves all gradients by their rounding, at every step."""
    net, twin = Net(dtype), Net(dtype)
    masters = [torch.nn.Parameter(p.detach().float()) for p in twin.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    stock = torch.optim.AdamW(masters, lr=0.02)
    pipeline = Detached(optimizer, small(clip=mode))
    pipeline.expects = (None, 0.5)
    losses = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        x = torch.randn(8, 6, generator=generator).to(dtype)
        both = [module(x).float().sub(x[:, :3].float()).square().mean() for module in (net, twin)]
        losses.append([loss.item() for loss in both])
        for loss in both:
            loss.backward()
        pipeline.step(max_grad_norm=0.5)
        pipeline.zero_grad()
        for p, master in zip(twin.parameters(), masters, strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 0.5)
        stock.step()
        with torch.no_grad():
            for p, master in zip(twin.parameters(), masters, strict=True):
                p.copy_(master)
    pipeline.close()
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=tolerance)
    assert losses[-1][0] < 0.8 * losses[0][0]
