"""Rounding and its noise: a hash of places in memory, its own for each tensor that is rounded."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules import Policy, Update
from lightning_optim.rules.rounding import hash32, noise, noise_key, round_to, stochastic_round

from .common import INF, NAN


def test_the_hash_is_lowbias32() -> None:
    assert [hash32(x) for x in (0, 1, 0xFFFFFFFF)] == [0, 1753845952, 1734902346]
    assert hash32(1 << 32) == hash32(0)
    assert len({hash32(x) for x in range(100_000)}) == 100_000  # a bijection


def test_noise_belongs_to_places_in_memory() -> None:
    """The bits of an element depend on where it lies, not on the shape or strides it is seen with."""
    key = noise_key(0.0, 1.0, 2.0, 3.0)
    flat = noise(torch.empty(24), key)
    assert [int(x) for x in flat[:3]] == [hash32(i ^ hash32(int(key))) for i in range(3)]
    assert torch.equal(noise(torch.empty(4, 6), key).flatten(), flat)
    assert torch.equal(noise(torch.empty(4, 6).t(), key), flat.view(4, 6).t())
    last = torch.empty(2, 3, 2, 2).to(memory_format=torch.channels_last)
    assert torch.equal(noise(last, key).permute(0, 2, 3, 1).flatten(), flat)
    assert noise(torch.empty(()), key).shape == ()
    assert noise(torch.empty(0, 3), key).shape == (0, 3)
    assert noise(torch.empty(6, 8)[:, ::2], key).shape == (6, 4)


def test_noise_keys_differ_in_each_part() -> None:
    parts = list(itertools.product(range(4), range(4), range(1, 5), range(3)))
    assert len({noise_key(*map(float, p)) for p in parts}) == len(parts)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_rounded_tensor_has_noise_of_its_own(name: str) -> None:
    """A slot and the weight must not be rounded up together."""
    rule = OPTIMIZERS[name].cls.rule
    flags = dict.fromkeys(rule.flags, True)
    slots = tuple(slot for slot in rule.slots_under(flags) if not rule.slots[slot].is_scalar and slot != "p0")
    policy = Policy(rounding="stochastic", weight_dtype="bfloat16", low_precision_slots=slots)
    nodes = Update(rule, policy, tuple(sorted(flags.items()))).program.nodes
    assert sum(node.op == "stochastic_round" for node in nodes) == 1 + len(slots)
    assert sum(node.op == "noise_key" for node in nodes) == 1 + len(slots)


def test_stochastic_rounding_goes_to_a_neighbour_and_leaves_what_is_exact() -> None:
    random = torch.Generator().manual_seed(2)
    x = torch.cat([torch.randn(5000, generator=random), torch.randn(500, generator=random) * 1e-39])
    rounded = stochastic_round(x, noise_key(0.0, 0.0, 1.0, 0.0))
    towards_zero = (x.view(torch.int32) & -0x10000).view(torch.float32)
    away = (towards_zero.view(torch.int32) + 0x10000).view(torch.float32)
    assert ((rounded == towards_zero) | (rounded == away)).all()
    exact = x.to(torch.bfloat16).float()
    assert torch.equal(stochastic_round(exact, 77.0), exact)
    special = torch.tensor([NAN, INF, -INF, 0.0])
    assert torch.equal(stochastic_round(special, 5.0).nan_to_num(9.0, 8.0, 7.0), special.nan_to_num(9.0, 8.0, 7.0))
    with pytest.raises(TypeError, match=r"float32 math, not torch\.float64"):
        stochastic_round(x.double(), 1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_to_keeps_the_math_type(dtype: str) -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert torch.equal(round_to(x, dtype), x.to(getattr(torch, dtype)).double())
    assert round_to(x, dtype).dtype == torch.float64
