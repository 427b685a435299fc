"""The options that every optimizer has, and what a class declares of its own: one home, seen from everywhere."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Unpack

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import Lion
from lightning_optim.checks import FRACTION, POSITIVE_OR_NONE, Range
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules.ops import sign
from lightning_optim.rules.rule import Rule
from lightning_optim.stepping.common import COMMON_DEFAULTS, Common
from lightning_optim.stepping.options import REAL, known_options


def _floored(p: Any, g: Any, *, lr: Any, floor_a: Any, floor_b: Any) -> Any:
    return lr * sign(g) * floor_a * floor_b


class Floored(RuleOptimizer):
    """A class with a range, a pair of numbers, a choice, a need and a key that groups have, and no more."""

    rule = Rule(_floored)
    ranges: ClassVar[dict[str, Range]] = {"floors": FRACTION, "bound_of_floored": POSITIVE_OR_NONE}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"form_of_floored": ("a", "b")}
    needs = (REAL,)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        floors: tuple[float, float] = (0.5, 0.5),
        bound_of_floored: float | None = None,
        form_of_floored: str = "a",
        **common: Unpack[Common],
    ) -> None:
        own = {"floors": floors, "bound_of_floored": bound_of_floored, "form_of_floored": form_of_floored}
        super().__init__(params, {"lr": lr, **own}, **common)

    @classmethod
    def scalars(cls, group: dict[str, Any]) -> dict[str, Any]:
        return {"lr": group["lr"], "floor_a": group["floors"][0], "floor_b": group["floors"][1]}


def weight(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=dtype))


def test_every_common_option_has_a_default_and_documentation() -> None:
    assert Common.__annotations__.keys() == COMMON_DEFAULTS.keys()
    for option in COMMON_DEFAULTS:
        assert f"        {option}: " in (Common.__doc__ or "")


@pytest.mark.parametrize("cls", [Floored, *(info.cls for info in OPTIMIZERS.values())])
def test_signatures_show_every_option(cls: type[RuleOptimizer]) -> None:
    shown = inspect.signature(cls).parameters
    assert next(iter(shown)) == "params"
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in shown.values())
    for option, default in COMMON_DEFAULTS.items():
        if option in shown:
            assert shown[option].default == default
            assert shown[option].kind is inspect.Parameter.KEYWORD_ONLY
    assert set(COMMON_DEFAULTS) - set(shown) <= {"cautious"}  # which has no meaning for whole matrices


def test_common_options_come_with_the_class() -> None:
    optimizer = Floored([weight()], cautious=True, engine="eager", max_grad_norm=2)
    assert optimizer.param_groups[0]["cautious"] is True
    assert optimizer.param_groups[0]["maximize"] is False
    assert (optimizer.options.engine, optimizer.options.max_grad_norm) == ("eager", 2)


def test_a_class_that_passes_everything_on_has_all_of_its_bases() -> None:
    class Passing(Lion):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    assert Passing([weight()], cautious=True).param_groups[0].keys() == Lion([weight()]).param_groups[0].keys()
    with pytest.raises(TypeError, match="cautious=1 is not a bool"):
        Passing([weight()], cautious=1)


def test_whole_matrices_cannot_be_cautious() -> None:
    with pytest.raises(TypeError, match="Muon has no option 'cautious'; valid: lr, momentum"):
        OPTIMIZERS["muon"].create([weight()], cautious=True)


def test_another_keyword_is_named() -> None:
    cases: list[tuple[Any, str, str]] = [(Floored, "cautios", "cautious"), (Lion, "weight_deacy", "weight_decay")]
    for cls, wrong, meant in cases:
        with pytest.raises(TypeError, match=rf"{cls.__name__} has no option '{wrong}' \(did you mean '{meant}'\?\)"):
            cls([weight()], **{wrong: 1})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"floors": (0.5, 1.0)}, ValueError, r"Floored: floors\[1\]=1\.0; valid: a number in \[0, 1\)"),
        ({"floors": (0.5,)}, ValueError, r"Floored: floors=\(0\.5,\); valid: 2 numbers in \[0, 1\)"),
        ({"bound_of_floored": 0}, ValueError, "Floored: bound_of_floored=0; valid: a number > 0, None"),
        ({"form_of_floored": "c"}, ValueError, "Floored: form_of_floored='c'; valid: a, b"),
    ],
)
def test_ranges_and_choices_are_the_classs(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Floored([weight()], **options)
    with pytest.raises(error, match=message):
        Floored([{"params": [weight()], **options}])
    state = Floored([weight()]).state_dict()
    state["param_groups"][0].update(options)
    with pytest.raises(error, match=message):
        Floored([weight()]).load_state_dict(state)


def test_declared_options_are_known_as_anothers() -> None:
    assert {"floors", "bound_of_floored", "form_of_floored", "amsgrad", "ns_steps", "use_muon"} <= known_options()
    assert not known_options() & {*COMMON_DEFAULTS.keys() - {"max_grad_norm"}, "foreach", "rho", "beta"}
    with pytest.raises(ValueError, match=r"bound_of_floored=1\.0 in a param group is not an option of Lion"):
        Lion([{"params": [weight()], "bound_of_floored": 1.0}])


def test_needs_of_parameters_are_checked_where_they_come_in() -> None:
    with pytest.raises(ValueError, match=r"parameter 0 of the group has shape \(2,\) and torch.complex64.*real"):
        Floored([weight(torch.complex64)])
    optimizer = Floored([("a", weight())])
    with pytest.raises(ValueError, match=r"parameter 0 of the group, 'b', has shape .*valid: real weights"):
        optimizer.add_param_group({"params": [("b", weight(torch.complex64))]})
    assert len(optimizer.param_groups) == 1
