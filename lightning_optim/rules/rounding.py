"""Rounding of float32 math to a storage type: nearest, and stochastic with reproducible noise.

The noise is a pure function of (seed, tensor number, step, element index): a 32-bit integer hash, so every
engine, thread count and block size gives the same bits, and a resumed run goes on with the same noise. The
hash is Wellons' ``lowbias32`` (public domain; avalanche bias 0.17, better than murmur3's finalizer at the same
cost): two multiplications, which compilers vectorize, where Philox needs twenty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.rules.counting import step_word

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


def hash32(x: int) -> int:
    """``lowbias32`` of an unsigned 32-bit integer."""
    x &= _MASK
    x ^= x >> 16
    x = (x * _MULTIPLIERS[0]) & _MASK
    x ^= x >> 15
    x = (x * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> 16)


def _hash32_tensor(x: Tensor) -> Tensor:
    # int64 holds the 32-bit values; products wrap modulo 2^64, whose low 32 bits are the ones wanted.
    x = x ^ (x >> 16)
    x = (x * _MULTIPLIERS[0]) & _MASK
    x = x ^ (x >> 15)
    x = (x * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> 16)


def noise_key(seed: float, tensor_id: float, step: float, salt: float) -> float:
    """Mix the four numbers into one 32-bit key (exact in a float64, so that it can travel as a scalar)."""
    key = 0
    for part in (int(seed), int(tensor_id), step_word(step), int(salt)):
        key = hash32(key ^ part)
    return float(key)


def noise(x: Tensor, key: float) -> Tensor:
    """32 random bits (as int64) for each element of ``x``, by its place in memory."""
    index = torch.arange(x.numel(), device=x.device)
    try:
        index = index.as_strided(x.size(), x.stride())  # dense tensors: memory order, whatever the strides
    except RuntimeError:
        index = index.view(x.shape)
    high = _hash32_tensor((index >> 32) + int(key) & _MASK)
    return _hash32_tensor((index & _MASK) ^ high)


def stochastic_round(x: Tensor, key: float) -> Tensor:
    """Round float32 ``x`` to bfloat16-representable float32 values without bias.

    Raises:
        TypeError: ``x`` is not float32: the noise is added to float32's bits.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"stochastic rounding works on float32 math, not {x.dtype}")
    rounded = (x.view(torch.int32) + (noise(x, key) & 0xFFFF).to(torch.int32)) & -0x10000
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)


def round_to(x: Tensor, dtype: str) -> Tensor:
    """``x`` rounded to the nearest value of the storage type named ``dtype``, in ``x``'s own type."""
    return x.to(getattr(torch, dtype)).to(x.dtype)
