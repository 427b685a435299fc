"""Keys in param groups: strangers travel along, slips and what would be ignored are refused."""

from __future__ import annotations

import re
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim import LBFGS, SAM, SGD, AdamW, optimizer_info

from .common import assert_same, contents, each, known_warnings, make, one_group, parameters, train

pytestmark = known_warnings

#: What timm, BEiT, DINOv2, detectron2, MMEngine, fairseq, transformers, apex, schedule-free, prodigy, GaLore, LARS,
#: lightly, mup and the SAM implementations keep in groups.
STRANGERS = """
    lr_scale lr_mult lr_multiplier lr_ratio base_lr lr_max warmup_lr layer_decay wd_mult wd_multiplier decay_mult
    no_weight_decay weight_decay_scale apply_decay layer_id layer_name is_last_layer fix_step param_group_name no_prox
    group_names name initial_lr max_lr min_lr swa_lr max_momentum base_momentum norm_type override constraints beta
    bias_correction grad_averaging step k d d0 r weight_sum weight_lr_power train_mode scheduled_lr rank scale
    update_proj_gap proj_type trust_coefficient trust_coef lars_exclude eta width_mult rho adaptive old_p schedule
"""

#: Slips, by the option that was meant.
SLIPS = {
    "weight_deacy": "weight_decay",
    "weightdecay": "weight_decay",
    "weight-decay": "weight_decay",
    "Weight_Decay": "weight_decay",
    "wieght_decay": "weight_decay",
    "weight_decays": "weight_decay",
    "weight_decay_rate": "weight_decay",
    "Lr": "lr",
    "LR": "lr",
    "l_r": "lr",
    "rl": "lr",
    "learning_rate": "lr",
    "maximise": "maximize",
    "maximze": "maximize",
}


@each
def test_strangers_travel_along(name: str) -> None:
    values: dict[str, Any] = {key: number for number, key in enumerate(STRANGERS.split())}
    own = make(name, parameters()).defaults
    values = {key: value for key, value in values.items() if key not in own}
    optimizer = make(name, [{"params": parameters(shapes=[(3, 3)]), **values}])
    optimizer.add_param_group({"params": parameters(shapes=[(2, 2)]), **values})
    train(optimizer, range(2))
    fresh = make(name, [{"params": parameters(shapes=[shape])} for shape in ((3, 3), (2, 2))])
    fresh.load_state_dict(contents(optimizer))
    train(fresh, [2])
    for one in (optimizer, fresh):
        for group in one.param_groups:
            assert {key: group[key] for key in values} == values


def test_strangers_travel_through_lbfgs_and_sam() -> None:
    for optimizer in (
        LBFGS([{"params": parameters(), "lr_scale": 2}]),
        SAM([{"params": parameters(), "lr_scale": 2}], AdamW),
    ):
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr_scale"] == saved["param_groups"][0]["lr_scale"] == 2


@each
@pytest.mark.parametrize(("slip", "meant"), SLIPS.items())
def test_slips_are_refused(name: str, slip: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"{slip}=0.5 in a param group.*did you mean '{meant}'.*valid: .*lr"):
        make(name, [{"params": parameters(), slip: 0.5}])


@pytest.mark.parametrize(
    ("key", "name", "meant"),
    [("beta1", "adamw", "betas"), ("Betas", "lion", "betas"), ("momentun", "sgd", "momentum"), ("esp", "adam", "eps"),
     ("epsilon", "lamb", "eps"), ("amsgard", "adamw", "amsgrad"), ("nestrov", "sgd", "nesterov"),
     ("adjust_lr_fn", "muon", "adjust_lr"), ("use_moun", "muon", "use_muon")],
)  # fmt: skip
def test_slips_of_single_optimizers(key: str, name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=.*did you mean '{meant}'"):
        make(name, [{"params": parameters(), key: 0.5}])


@pytest.mark.parametrize(("key", "name"), [("momentum", "AdamW"), ("betas", "SGD"), ("amsgrad", "Lion")])
def test_options_of_other_optimizers_would_be_ignored(key: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: {key}=0.5 in a param group is not an option of {name}; valid: "):
        make(name, [{"params": parameters(), key: 0.5}])


@each
def test_options_of_the_constructor_may_be_repeated_and_not_contradicted(name: str) -> None:
    """Wrappers hand the constructor's keywords on in the groups as well."""
    given: dict[str, Any] = {"engine": "eager", "max_grad_norm": 1.0, "state_dtype": "float32"}
    optimizer, kind = one_group(name, parameters(), **given), {"use_muon": False} if name == "muon" else {}
    optimizer.add_param_group({"params": parameters(shapes=[(2,)]), **kind, **given})
    for key, value in {"engine": "foreach", "max_grad_norm": 2.0, "state_dtype": None, "rounding": "kahan"}.items():
        with pytest.raises(ValueError, match=rf"{key}=.* is not an option; valid: .*constructor has one for all"):
            optimizer.add_param_group({"params": parameters(shapes=[(2,)]), key: value})
    assert len(optimizer.param_groups) == 2
    loaded = one_group(name, parameters(), **given)
    loaded.add_param_group({"params": parameters(shapes=[(2,)]), **kind})
    loaded.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("group", [{}, {"lr": 0.1}], ids=str)
def test_a_group_without_parameters(group: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=rf"AdamW: a param group without 'params'; it has {re.escape(str(list(group)))}"
    ):
        AdamW([group])


def test_keys_that_are_no_strings() -> None:
    with pytest.raises(TypeError, match="a param group has the key 3, a int; valid: strings"):
        AdamW([{"params": parameters(), 3: 1}])  # type: ignore[arg-type]


class DavdasSAM(torch.optim.Optimizer):
    """How the implementation of SAM in wide use is built (davda54/sam)."""

    def __init__(
        self, params: Any, base_optimizer: Any, rho: float = 0.05, adaptive: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def ascend(self) -> None:
        self.old = [(p, p.clone()) for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p, _ in self.old if p.grad is not None]).norm()
        for p, _ in self.old:
            assert p.grad is not None
            p.add_(p.grad * (self.param_groups[0]["rho"] / norm))
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p, old in self.old:
            p.data = old
        self.base_optimizer.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "engine": "eager"}], ids=["plain", "own options"])
def test_a_third_partys_sam_around_ours(options: dict[str, Any]) -> None:
    def run(cls: Any, **options: Any) -> Tensor:
        torch.manual_seed(0)
        layer, x = nn.Linear(3, 3), torch.ones(4, 3)
        optimizer = DavdasSAM(layer.parameters(), cls, rho=0.1, lr=0.1, **options)
        for number in range(4):
            layer(x).square().sum().backward()
            optimizer.ascend()
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == 1:
                optimizer.load_state_dict(optimizer.state_dict())
            assert optimizer.param_groups[0]["rho"] == 0.1
        return layer.weight.detach()

    ours = run(AdamW, **options)
    if not options:
        torch.testing.assert_close(ours, run(torch.optim.AdamW))


# -- numbers of other libraries ---------------------------------------------------------------------------------


def kinds(value: Any) -> set[type]:
    """The types of all that is in a state_dict."""
    if isinstance(value, dict | list | tuple):
        return {kind for item in (value.values() if isinstance(value, dict) else value) for kind in kinds(item)}
    return {type(value)}


NUMPYS: list[dict[str, Any]] = [
    {"lr": numpy.float64(0.1)},
    {"lr": numpy.array(0.1)},
    {"weight_decay": numpy.float32(0.5), "maximize": numpy.bool_(True)},
    {"betas": (numpy.float64(0.9), numpy.float32(0.5))},
    {"betas": [numpy.float64(0.9), 0.99]},
    {"momentum": numpy.float64(0.5)},
    {"max_grad_norm": numpy.float32(1)},
    {"adamw_lr": numpy.float64(0.1), "ns_steps": numpy.int64(4)},
    {"lr": torch.tensor(0.1)},
]


@each
@pytest.mark.parametrize("options", NUMPYS, ids=lambda options: "+".join(options))
def test_numpys_numbers_become_pythons(name: str, options: dict[str, Any]) -> None:
    """At the door, in a group, and where somebody writes them later: a checkpoint loads with ``weights_only``."""
    if not set(options) <= set(optimizer_info(name).options):
        pytest.skip("does not have the option")
    optimizer = make(name, parameters(), **options)
    plain = {Tensor, int, float, bool, str, type(None)}
    assert kinds(optimizer.state_dict()) <= plain
    assert kinds(optimizer.defaults) <= plain
    in_group = {key: value for key, value in options.items() if key in optimizer.defaults}
    optimizer.add_param_group({"params": parameters(shapes=[(2,)]), **in_group})
    optimizer.param_groups[0].update(in_group, lr_scale=numpy.float64(0.5))
    train(optimizer, range(2))
    assert kinds(optimizer.state_dict()) <= plain
    assert optimizer.state_dict()["param_groups"][0]["lr_scale"] == 0.5


@each
def test_a_saved_state_of_numpys_numbers_loads_as_pythons(name: str) -> None:
    optimizer = make(name, parameters())
    train(optimizer, range(2))
    saved = contents(optimizer)
    for group in saved["param_groups"]:
        group["lr"] = numpy.float64(group["lr"])
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = numpy.int64(float(state["step"]))
    other = make(name, parameters())
    other.load_state_dict(saved)
    assert_same(contents(other), contents(optimizer))


def test_numpys_numbers_in_lbfgs_and_sam() -> None:
    plain = {Tensor, int, float, bool, str, type(None)}
    optimizer = SAM(parameters(), SGD, rho=numpy.float64(0.1), adaptive=numpy.bool_(False))  # type: ignore[arg-type]
    optimizer.add_param_group({"params": parameters(shapes=[(2,)]), "sam_rho": numpy.float32(0.5)})
    optimizer.param_groups[0]["sam_rho"] = numpy.float64(0.2)
    assert kinds(optimizer.state_dict()) <= plain
    given: Any = [{"params": parameters(shapes=[(2,)]), "sam_rho": numpy.float32(0.5)}]
    assert type(SAM(given, SGD).param_groups[0]["sam_rho"]) is float
    lbfgs = LBFGS(parameters(), lr=numpy.float64(0.1), weight_decay=numpy.float64(0.5))
    lbfgs.param_groups[0]["lr"] = numpy.float64(0.2)
    assert kinds(lbfgs.state_dict()) <= plain
    schedule = lightning_optim.Cosine(AdamW(parameters(), lr=numpy.float64(0.1)), total_steps=5)
    assert kinds(schedule.state_dict()) <= plain


def test_slips_of_sams_options() -> None:
    with pytest.raises(ValueError, match=r"sam_roh=0.1 in a param group.*did you mean 'sam_rho'"):
        SAM([{"params": parameters(), "sam_roh": 0.1}], AdamW)
