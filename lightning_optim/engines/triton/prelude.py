"""The beginning of every generated Triton module: operations that Triton lacks, or defines differently.

It is text, so that importing this package does not import Triton, and so that a generated module is complete.
"""

from __future__ import annotations

PRELUDE = """\
import triton
import triton.language as tl


@triton.jit
def sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def lerp(a, b, w):
    # The two branches of torch.lerp: exact at both ends.
    return tl.where(tl.abs(w) < 0.5, a + w * (b - a), b - (b - a) * (1 - w))


@triton.jit
def maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def minimum(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def power(x, y):
    # pow() by exp and log, which Triton has for every type: for a scalar in float64 within 1e-12 of it.
    size = tl.exp(y * tl.log(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = tl.floor(y * 0.5) * 2 != y
    signed = tl.where(whole, tl.where(odd, -size, size), tl.where(x == float("-inf"), size, float("nan")))
    one = (y == 0) | (x == 1) | ((x == -1) & (tl.abs(y) == float("inf")))
    return tl.where(one, 1.0, tl.where(x < 0, signed, size)).to(size.dtype)


@triton.jit
def tanh(x):
    # Triton has none for every type. Near 0, where 1 - exp(-2x) loses digits, a series: to 1e-14 of it.
    s = x * x
    small = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 - s * (1382 / 155925))))))
    e = tl.exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.1, small, tl.where(x < 0, -large, large))


@triton.jit
def halved(t):
    # The tangent of half an angle, from its own.
    return t / (1 + tl.sqrt(1 + t * t))


@triton.jit
def atan2(y, x):
    # Triton has none for every type. The angle from the nearer axis is at most pi/4; of a quarter of it, whose tangent
    # is at most 0.2, the series has 1e-16 of the last place.
    near = minimum(tl.abs(x), tl.abs(y))
    far = maximum(tl.abs(x), tl.abs(y))
    ratio = tl.where(far == 0, far, tl.where(near == float("inf"), 1.0, near / far).to(far.dtype))
    t = halved(halved(ratio))
    s = t * t
    series = 1 / 13 - s * (1 / 15 - s * (1 / 17 - s * (1 / 19 - s / 21)))
    series = 1 - s * (1 / 3 - s * (1 / 5 - s * (1 / 7 - s * (1 / 9 - s * (1 / 11 - s * series)))))
    angle = 4 * t * series
    angle = tl.where(tl.abs(y) > tl.abs(x), 1.5707963267948966 - angle, angle)
    angle = tl.where((x < 0) | ((x == 0) & (1 / x < 0)), 3.141592653589793 - angle, angle)
    return tl.where((y < 0) | ((y == 0) & (1 / y < 0)), -angle, angle)


@triton.jit
def hash32(x):
    # The rounding noise of lightning_optim/rules/rounding.py, bit for bit.
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D).to(tl.uint32)
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B).to(tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def next_step(step):
    # As lightning_optim/rules/counting.py has it.
    further = (step.to(tl.float32).to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    return tl.where((step < 16777216.0) | (step - step != 0), step + 1, further.to(tl.float64))


@triton.jit
def step_word(step):
    bits = step.to(tl.float32).to(tl.uint32, bitcast=True)
    return tl.where(step < 16777216.0, step.to(tl.int64).to(tl.uint32), bits)


@triton.jit
def noise_key(seed, tensor_id, step, salt):
    # By way of int64: a cast to uint32 of what does not fit into int32 is not the same everywhere.
    key = hash32((seed + tensor_id * 0).to(tl.int64).to(tl.uint32))
    key = hash32(key ^ tensor_id.to(tl.int64).to(tl.uint32))
    key = hash32(key ^ step_word(step))
    return hash32(key ^ salt.to(tl.int64).to(tl.uint32)).to(tl.int64).to(tl.float64)


@triton.jit
def stochastic_round(x, key, index):
    noise = hash32(index.to(tl.uint32) ^ hash32((index >> 32).to(tl.uint32) + key))
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = (bits + (noise & 0xFFFF)) & 0xFFFF0000
    return tl.where(finite, rounded.to(tl.uint32), bits).to(tl.float32, bitcast=True)


@triton.jit
def round_bfloat16(x):
    # To nearest even; a NaN stays one. Triton's interpreter would truncate instead.
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x != x, x, rounded.to(tl.uint32).to(tl.float32, bitcast=True))


@triton.jit
def round_float16(x):
    return x.to(tl.float16).to(x.dtype)


@triton.jit
def round_float32(x):
    return x.to(tl.float32).to(x.dtype)


@triton.jit
def round_float64(x):
    return x
"""

#: Unscaling, clipping and leaving a step out, decided on the device: the start of a step's first kernel.
CONTROL = '''\
@triton.jit
def control(squares, parts, loss_scale, found_inf, max_norm, CLIP: tl.constexpr, UNSCALE: tl.constexpr,
            CHECK: tl.constexpr, SKIP: tl.constexpr, LANES: tl.constexpr):
    """What gradients are multiplied by, and whether the step is left out."""
    factor = tl.full((), 1.0, tl.float64)
    if UNSCALE:
        factor = 1.0 / tl.load(loss_scale).to(tl.float64)
    total = tl.full((), 0.0, tl.float64)
    if CLIP or CHECK:
        sums = tl.zeros((LANES,), tl.float64)
        for start in range(0, parts, LANES):
            lanes = start + tl.arange(0, LANES)
            sums += tl.load(squares + lanes, mask=lanes < parts, other=0.0)
        total = tl.sum(sums, axis=0)
    leave = tl.full((), 0, tl.int32)
    if SKIP:
        found = tl.load(found_inf)
        if CHECK:
            found = tl.where(total - total == 0, found, 1.0)
            tl.store(found_inf, found)
        leave = (found != 0).to(tl.int32)
    if CLIP:
        norm = tl.sqrt(total) * factor
        factor = factor * minimum(tl.load(max_norm) / (norm + 1e-6), tl.full((), 1.0, tl.float64))
    return factor, leave
'''
