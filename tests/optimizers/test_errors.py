"""Wrong input is refused, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim import optimizer_info
from lightning_optim.registry import OPTIMIZERS

from .common import each, known_warnings, make, parameters

pytestmark = known_warnings


def _bad_options() -> list[tuple[str, Any, Any, str]]:
    nan, inf = float("nan"), float("inf")
    no_number = [(value, ValueError) for value in (-1.0, nan, inf)] + [
        (value, TypeError) for value in (True, "1", None)
    ]
    return [
        *(
            (option, value, error, rf"{option}={value!r}.*valid: a (finite )?number")
            for option in ("lr", "eps", "weight_decay", "momentum")
            for value, error in no_number
        ),
        ("lr", torch.tensor([0.1, 0.2]), ValueError, r"lr has shape \(2,\).*valid"),
        ("lr", torch.tensor(-0.1), ValueError, r"lr=-0\.1.*valid"),
        ("betas", "first", ValueError, "betas='first'.*valid: 2 numbers"),
        ("betas", (0.9,), ValueError, r"betas=\(0\.9,\).*valid: 2 numbers"),
        ("betas", (0.9, 0.9, 0.9), ValueError, r"betas=.*valid: 2 numbers"),
        ("betas", 0.9, ValueError, r"betas=0\.9.*valid: 2 numbers"),
        ("betas", (1.0, 0.9), ValueError, r"betas\[0\]=1\.0.*valid: a number in \[0, 1\)"),
        ("betas", (0.9, 1.2), ValueError, r"betas\[1\]=1\.2.*valid: a number in \[0, 1\)"),
        ("betas", (-0.1, 0.9), ValueError, r"betas\[0\]=-0\.1"),
        ("betas", (nan, 0.9), ValueError, r"betas\[0\]=nan"),
        ("betas", (True, 0.9), TypeError, r"betas\[0\]=True is a bool"),
        ("dampening", nan, ValueError, "dampening=nan"),
        ("max_weight_norm", 0.0, ValueError, r"max_weight_norm=0\.0.*> 0"),
        ("max_trust_ratio", -1.0, ValueError, r"max_trust_ratio=-1\.0.*> 0"),
        ("max_grad_norm", 0.0, ValueError, r"max_grad_norm=0\.0.*> 0"),
        ("max_grad_norm", nan, ValueError, "max_grad_norm=nan"),
        ("max_grad_norm", True, TypeError, "max_grad_norm=True"),
        ("max_grad_norm", "1", TypeError, "max_grad_norm='1'"),
        ("maximize", 1, TypeError, "maximize=1 is not a bool.*valid: True, False"),
        ("cautious", "yes", TypeError, "cautious='yes' is not a bool"),
        ("amsgrad", None, TypeError, "amsgrad=None is not a bool"),
        ("nesterov", 0, TypeError, "nesterov=0 is not a bool"),
        ("engine", "warp", ValueError, "engine='warp'.*valid: auto, .*eager.*foreach.*host"),
        ("engine", None, ValueError, "engine=None.*valid: auto"),
        ("rounding", "up", ValueError, "rounding='up'; valid: nearest, stochastic, kahan"),
        ("state_dtype", "int8", ValueError, "state_dtype='int8'.*valid: None, float32"),
        ("state_dtype", torch.int64, ValueError, "state_dtype=torch.int64.*valid: None, float32"),
    ]


@pytest.mark.parametrize(
    ("name", "option", "value", "error", "message"),
    [
        (name, *bad)
        for name, info in OPTIMIZERS.items()
        for bad in _bad_options()
        if bad[0] in info.options and not (name == "adafactor" and bad[0] == "eps")  # two numbers: see below
    ],
)
def test_wrong_options_are_refused(name: str, option: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(name, parameters(), **{option: value})
    (p,) = parameters(shapes=[(2,)])
    if option in make(name, [p]).defaults:
        with pytest.raises(error, match=message):
            make(name, [{"params": [p], option: value}])


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        (1e-3, r"eps=0\.001; valid: 2 finite numbers"),
        ((None, -1.0), r"eps\[1\]=-1\.0"),
        ((float("nan"), 1e-3), r"eps\[0\]=nan"),
        ((1e-30, None), r"eps=\(1e-30, None\); valid: a finite number >= 0 as the second"),
    ],
)
def test_adafactors_eps_are_two(eps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("adafactor", parameters(), eps=eps)


@each
def test_every_number_among_the_options_is_checked(name: str) -> None:
    """A new optimizer cannot leave an option out of the checks: each number refuses NaN, each flag a number."""
    optimizer = make(name, parameters())
    for option, default in optimizer.defaults.items():
        wrong: Any = float("nan")
        if isinstance(default, tuple):
            wrong = tuple(wrong for _ in default)
        elif isinstance(default, bool):
            wrong = 1
        with pytest.raises((ValueError, TypeError), match=option):
            make(name, parameters(), **{option: wrong})


@each
def test_wrong_parameters_are_refused(name: str) -> None:
    (p,) = parameters(shapes=[(2,)])
    with pytest.raises(TypeError, match=r"parameter 1 of the group has dtype torch\.int64; valid: floating"):
        make(name, [p, torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="non-leaf"):
        make(name, [p * 2])
    with pytest.raises(TypeError, match="params argument"):
        make(name, p)
    with pytest.raises(TypeError):
        make(name, ["weight"])


@each
def test_misspelled_options_are_refused(name: str) -> None:
    info = optimizer_info(name)
    with pytest.raises(TypeError, match="weight_deacy"):
        info.create(parameters(), weight_deacy=0.1)
    with pytest.raises(
        ValueError, match=r"weight_deacy=0.1 in a param group.*did you mean 'weight_decay'.*valid: .*lr"
    ):
        make(name, [{"params": parameters(), "weight_deacy": 0.1}])


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.1), (0.0, 0.1)])
def test_nesterov_needs_undamped_momentum(momentum: float, dampening: float) -> None:
    bad = {"nesterov": True, "momentum": momentum, "dampening": dampening}
    with pytest.raises(ValueError, match=rf"nesterov=True with momentum={momentum}, dampening={dampening}; valid"):
        make("sgd", parameters(), **bad)
