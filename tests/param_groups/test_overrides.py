"""Overrides: what wins, and what is left alone."""

from __future__ import annotations

from lightning_optim.param_groups import param_groups

from .common import GPT, by_name


def test_overrides_are_final_and_later_ones_win() -> None:
    model = GPT(2)
    groups = param_groups(
        model,
        lr=1.0,
        weight_decay=0.1,
        layer_decay=0.5,
        overrides={
            "blocks.*": {"lr": 3.0, "eps": 1e-6},
            "blocks.0.*": {"lr": 4.0},
            "*.bias": {"weight_decay": 0.2},
        },
    )
    lrs, eps = by_name(model, groups, "lr"), by_name(model, groups, "eps")
    assert (lrs["blocks.0.mlp.0.weight"], lrs["blocks.1.mlp.0.weight"]) == (4.0, 3.0)
    assert (eps["blocks.0.mlp.0.weight"], eps["head.weight"]) == (1e-6, None)
    assert by_name(model, groups, "weight_decay")["norm.bias"] == 0.2
    assert by_name(model, groups, "name")["norm.bias"] == "layer_3.decay[*.bias]"
    assert lrs["norm.bias"] == 1.0


def test_overrides_are_copied() -> None:
    option = {"lr": 1.0}
    groups = param_groups(GPT(), lr=0.1, overrides={"head.*": option})
    groups[-1]["lr"] = 5.0
    assert option == {"lr": 1.0}
