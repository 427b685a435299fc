"""Every optimizer again, from its paper or torch's documentation, in plain float64: what the engines are held against.

Nothing here uses the package's rules. A new optimizer needs a function in :data:`RULES`, and its variants in
:data:`VARIANTS`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.registry import OPTIMIZERS

Options = Mapping[str, Any]
State = dict[str, Tensor]


def _average(s: State, name: str, x: Tensor, beta: float) -> Tensor:
    s[name] = beta * s.get(name, torch.zeros_like(x)) + (1 - beta) * x
    return s[name]


def _count(s: State) -> int:
    s["step"] = s.get("step", torch.zeros((), dtype=torch.float64)) + 1
    return int(s["step"])


def sgd(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    """The pseudocode of torch.optim.SGD's documentation."""
    lr, mu = float(o["lr"]), o["momentum"]
    if mu == 0:
        return lr * g
    s["momentum_buffer"] = mu * s["momentum_buffer"] + (1 - o["dampening"]) * g if "momentum_buffer" in s else g
    return lr * (g + mu * s["momentum_buffer"]) if o["nesterov"] else lr * s["momentum_buffer"]


def _adam_direction(g: Tensor, s: State, o: Options) -> Tensor:
    t, (beta1, beta2) = _count(s), o["betas"]
    m_hat = _average(s, "exp_avg", g, beta1) / (1 - beta1**t)
    v = _average(s, "exp_avg_sq", g * g, beta2)
    if o.get("amsgrad"):
        v = s["max_exp_avg_sq"] = torch.maximum(s.get("max_exp_avg_sq", torch.zeros_like(v)), v)
    return m_hat / ((v / (1 - beta2**t)).sqrt() + o["eps"])


def adam(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    """Algorithm 1 of arXiv:1412.6980; AMSGrad as torch has it (the maximum of the uncorrected average)."""
    return float(o["lr"]) * _adam_direction(g, s, o)


def lion(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    """Algorithm 2 of arXiv:2302.06675."""
    beta1, beta2 = o["betas"]
    c = beta1 * s.get("exp_avg", torch.zeros_like(g)) + (1 - beta1) * g
    _average(s, "exp_avg", g, beta2)
    return float(o["lr"]) * torch.where(c > 0, 1.0, torch.where(c < 0, -1.0, 0.0)).double()


def lamb(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    """Algorithm 2 of arXiv:1904.00962, phi the identity with an optional upper bound."""
    r = _adam_direction(g, s, o)
    if p.ndim <= 1 and not o["adapt_1d"]:
        return float(o["lr"]) * r
    r = r + o["weight_decay"] * p
    size, step = math.sqrt(float((p * p).sum())), math.sqrt(float((r * r).sum()))
    ratio = min(size, o["max_weight_norm"] or math.inf) / step if size > 0 and step > 0 else 1.0
    return float(o["lr"]) * min(ratio, o["max_trust_ratio"] or math.inf) * r


#: The first six steps of Algorithm 1 of arXiv:2505.16932 (its authors' published numbers); all but the last of the
#: algorithm's eight are evaluated at 1 / 1.01 of their argument.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)


def newton_schulz(m: Tensor, o: Options) -> Tensor:
    """Of https://kellerjordan.github.io/posts/muon, in float64, on the side on which the Gram matrix is small."""
    if m.shape[0] > m.shape[1]:
        return newton_schulz(m.T, o).T
    x = m / max(math.sqrt(float((m * m).sum())), 1e-7)
    for step in range(o["ns_steps"]):
        if o["ns_coefficients"] == "muon":
            a, b, c = 3.4445, -4.7750, 2.0315
        else:
            a, b, c = (k / 1.01**power for k, power in zip(POLAR_EXPRESS[step], (1, 3, 5), strict=True))
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def muon(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    """Keller Jordan's Muon, or AdamW; the size of the update as in torch.optim.Muon's ``adjust_lr_fn``."""
    if not o["use_muon"]:
        return adam(p, g, s, o)
    mu = o["momentum"]
    m = _average(s, "momentum_buffer", g, mu)
    m = (1 - mu) * g + mu * m if o["nesterov"] else m
    stack = m if p.ndim == 3 and o["stacked"] else m.reshape(1, len(m), -1)
    rows, columns = stack.shape[1:]
    size = math.sqrt(max(1.0, rows / columns)) if o["adjust_lr"] == "original" else 0.2 * math.sqrt(max(rows, columns))
    direction = torch.stack([newton_schulz(matrix, o) for matrix in stack]).reshape(p.shape)
    return float(o["lr"]) * size * direction


RULES: dict[str, Callable[[Tensor, Tensor, State, Options], Tensor]] = {
    "adam": adam,
    "adamw": adam,
    "lamb": lamb,
    "lion": lion,
    "muon": muon,
    "sgd": sgd,
}

#: How ``weight_decay`` is applied unless the option ``decoupled_weight_decay`` says otherwise.
DECAY = {"adam": "l2", "adamw": "decoupled", "lamb": "none", "lion": "decoupled", "muon": "decoupled", "sgd": "l2"}

#: Options of every case of an optimizer but the first, whose options are the class's own defaults.
BASE: dict[str, dict[str, Any]] = {
    "adam": {"lr": 0.02},
    "adamw": {"lr": 0.02},
    "lamb": {"lr": 0.02},
    "lion": {"lr": 0.02},
    "muon": {"lr": 0.03},
    "sgd": {"lr": 0.02, "momentum": 0.9},
}

#: Cases of one optimizer, beside those that all have.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "adam": {
        "amsgrad": {"amsgrad": True, "betas": (0.8, 0.7)},
        "amsgrad_l2": {"amsgrad": True, "weight_decay": 0.1},
        "betas_eps": {"betas": (0.3, 0.6), "eps": 0.1},
        "no_averages": {"betas": (0.0, 0.0)},
    },
    "adamw": {
        "amsgrad": {"amsgrad": True, "betas": (0.8, 0.7)},
        "betas_eps": {"betas": (0.3, 0.6), "eps": 0.1},
        "no_decay": {"weight_decay": 0.0},
    },
    "lamb": {
        "betas_eps": {"betas": (0.3, 0.6), "eps": 0.1},
        "max_weight_norm": {"max_weight_norm": 0.5, "weight_decay": 0.1},
        "max_trust_ratio": {"max_trust_ratio": 0.3},
        "adapt_1d": {"adapt_1d": True, "weight_decay": 0.1},
    },
    "lion": {"betas": {"betas": (0.3, 0.8)}},
    "muon": {
        "no_nesterov": {"nesterov": False, "momentum": 0.7},
        "few_steps": {"ns_steps": 3},
        "polar_express": {"ns_coefficients": "polar_express", "ns_steps": 6},
        "match_rms_adamw": {"adjust_lr": "match_rms_adamw", "weight_decay": 0.0},
        "one_matrix": {"stacked": False},
        "adamw": {"adamw_lr": 0.01, "betas": (0.3, 0.6), "eps": 0.1, "adamw_patterns": ["*"]},
    },
    "sgd": {
        "plain": {"momentum": 0.0},
        "plain_l2": {"momentum": 0.0, "weight_decay": 0.1},
        "dampening": {"dampening": 0.4},
        "dampening_l2": {"dampening": 0.4, "weight_decay": 0.1, "maximize": True},
        "nesterov": {"nesterov": True},
        "nesterov_l2": {"nesterov": True, "weight_decay": 0.1},
    },
}

#: Cases of every optimizer that has the options; ``decoupled_weight_decay`` is the other way round from its default.
SHARED: dict[str, dict[str, Any]] = {
    "weight_decay": {"weight_decay": 0.1},
    "other_decay": {"weight_decay": 0.1, "decoupled_weight_decay": None},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "cautious": {"cautious": True, "weight_decay": 0.1},
    "clip": {"max_grad_norm": 0.5, "weight_decay": 0.1},
    "clip_cautious": {"max_grad_norm": 0.5, "cautious": True, "maximize": True},
    "bfloat16_state": {"state_dtype": "bfloat16"},
}


def cases(name: str) -> dict[str, dict[str, Any]]:
    """The option sets with which an optimizer is tested, by name."""
    signature = inspect.signature(OPTIMIZERS[name].cls).parameters
    table: dict[str, dict[str, Any]] = {"default": {}}
    for case, options in {**SHARED, **VARIANTS[name]}.items():
        if set(options) <= set(signature):
            table[case] = {**BASE[name], **options}
            if "decoupled_weight_decay" in options:
                table[case]["decoupled_weight_decay"] = not signature["decoupled_weight_decay"].default
    return table


def decay_of(name: str, o: Options) -> str:
    """How an optimizer with these options decays its weights."""
    decoupled = o.get("decoupled_weight_decay")
    if name == "adamw" or decoupled is None:  # AdamW stays AdamW, whatever torch.optim.Adam's state says
        return DECAY[name]
    return "decoupled" if decoupled else "l2"


def decay(kind: str, p: Tensor, g: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """The weight and the gradient that the rule sees: L2 and decoupled decay act before it."""
    lr, wd = float(o["lr"]), o["weight_decay"]
    if kind == "l2":
        return p, g + wd * p
    return (p - lr * wd * p, g) if kind == "decoupled" else (p, g)


def cautious(update: Tensor, g: Tensor) -> Tensor:
    """The mask of arXiv:2411.16085, as its authors' code has it."""
    mask = (update * g > 0).to(update.dtype)
    return update * mask / mask.mean().clamp(min=1e-3) if mask.numel() else update


def step(name: str, p: Tensor, g: Tensor, s: State, o: Options, *, kind: str | None = None) -> tuple[Tensor, State]:
    """One step in float64.

    Args:
        name: The optimizer.
        p: The weight.
        g: Its gradient, clipped.
        s: Its state: empty before the first step; the keys of the ``state_dict``.
        o: The options of its param group.
        kind: The kind of weight decay; default: the optimizer's own.

    Returns:
        The new weight and the new state.
    """
    kind = decay_of(name, o) if kind is None else kind
    s = dict(s)
    g = -g if o.get("maximize") else g
    base, g = decay(kind, p, g, o)
    update = RULES[name](base, g, s, o)
    if o.get("cautious"):
        update = cautious(update, g)
    p = base - update
    if kind == "proximal":
        p = p / (1 + float(o["lr"]) * o["weight_decay"])
    return p, s


def clip_coefficient(gradients: Sequence[Tensor], max_norm: float | None) -> float:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies all gradients by."""
    if max_norm is None:
        return 1.0
    total = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    return min(1.0, max_norm / (total + 1e-6))
