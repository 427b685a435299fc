"""Parameter groups: what is decayed, which layer has which learning rate, and what overrides do."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from lightning_optim.param_groups import param_groups

Groups = list[dict[str, Any]]


class OddRMSNorm(nn.Module):
    """A norm that no type of torch's reveals, with a two-dimensional gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4))


class Plain(nn.LayerNorm):
    """A norm that only its base reveals."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = OddRMSNorm()
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class GPT(nn.Module):
    def __init__(self, layers: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 8, 4))
        self.tokens = nn.Embedding(16, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 16, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


def by_name(model: nn.Module, groups: Groups, key: str) -> dict[str, Any]:
    """Parameter name -> a group option, with the check that each parameter is in exactly one group."""
    names = {id(p): name for name, p in model.named_parameters()}
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    return {names[id(p)]: group.get(key) for group in groups for p in group["params"]}


def decayed(model: nn.Module, **options: Any) -> set[str]:
    values = by_name(model, param_groups(model, weight_decay=0.1, **options), "weight_decay")
    assert set(values) == {name for name, _ in model.named_parameters()}
    assert set(values.values()) <= {0.0, 0.1}
    return {name for name, value in values.items() if value}


# ---------------------------------------------------------------- weight decay


def test_matrices_are_decayed_and_biases_and_norms_are_not() -> None:
    weights = ("attention.in_proj_weight", "attention.out_proj.weight", "mlp.0.weight", "mlp.2.weight")
    blocks = {f"blocks.{i}.{name}" for i in range(3) for name in weights}
    assert decayed(GPT()) == blocks | {"positions", "tokens.weight", "head.weight"}


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm((4, 4)),
        nn.RMSNorm((4, 4)),
        Plain((4, 4)),
        OddRMSNorm(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms(norm: nn.Module) -> None:
    assert next(norm.parameters(), None) is not None
    assert decayed(nn.Sequential(norm, nn.Linear(4, 4))) == {"1.weight"}


def test_embeddings_are_decayed_unless_asked_otherwise() -> None:
    assert decayed(GPT()) - decayed(GPT(), decay_embeddings=False) == {"tokens.weight"}


def test_no_decay_adds_to_the_standard_rules() -> None:
    assert decayed(GPT()) - decayed(GPT(), no_decay=["positions", "head.*"]) == {"positions", "head.weight"}


def test_no_weight_decay_of_a_submodule_is_honoured() -> None:
    class Backbone(GPT):
        def no_weight_decay(self) -> set[str]:
            return {"positions", "cls_token"}  # the second does not exist here, as is usual with timm

    model = nn.ModuleDict({"body": Backbone(), "other": GPT()})
    assert "body.positions" not in decayed(model)
    assert "other.positions" in decayed(model)


def test_weight_decay_zero_keeps_the_groups_apart() -> None:
    groups = param_groups(GPT())
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 0.0), ("no_decay", 0.0)]
    assert all("lr" not in group for group in groups)


# ---------------------------------------------------------------- names, ties, freezing


def test_tied_weight_appears_once_and_answers_to_each_name() -> None:
    model = GPT(tied=True)
    for pattern in ("head.weight", "tokens.weight"):
        lrs = by_name(model, param_groups(model, lr=1.0, overrides={pattern: {"lr": 3.0}}), "lr")
        assert lrs["tokens.weight"] == 3.0
    assert "tokens.weight" not in decayed(model, no_decay=["head.*"])


def test_shared_module_answers_to_each_name() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"encoder": shared, "decoder": shared})
    groups = param_groups(model, lr=1.0, overrides={"decoder.*": {"lr": 2.0}})
    assert [group["lr"] for group in groups] == [2.0, 2.0]


def test_partitioned_weight_is_judged_by_its_full_shape() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.empty(0))  # as DeepSpeed's ZeRO-3 leaves it
    assert decayed(model) == set()
    model.weight.ds_shape = torch.Size([2, 2])  # type: ignore[attr-defined]
    assert decayed(model) == {"weight"}


def test_frozen_parameters_are_left_out_unless_included() -> None:
    model = GPT()
    model.tokens.requires_grad_(False)
    assert "tokens.weight" not in by_name(model, param_groups(model), "name")
    assert "tokens.weight" in by_name(model, param_groups(model, include_frozen=True), "name")


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "compiled":
        return torch.compile(model)  # type: ignore[return-value]
    if how == "parallel":
        return DataParallel(model)
    if how == "parallel of compiled":
        return DataParallel(wrapped(model, "compiled"))
    if how == "compiled blocks":
        assert isinstance(model, GPT)
        model.blocks = nn.ModuleList(torch.compile(block) for block in model.blocks)  # type: ignore[misc]
        return model
    module = pl.LightningModule()
    module.model = model
    return module


@pytest.mark.parametrize("how", ["compiled", "parallel", "parallel of compiled", "compiled blocks", "lightning"])
def test_wrappers_change_nothing(how: str) -> None:
    def split(model: nn.Module, prefix: str = "") -> list[tuple[Any, ...]]:
        overrides: dict[str, dict[str, Any]] = {
            f"{prefix}blocks.1.*": {"lr": 7.0},
            "*head.weight": {"betas": (0.9, 0.95)},
        }
        groups = param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5, overrides=overrides)
        options = ("lr", "weight_decay", "betas")
        return [(*map(group.get, options), [id(p) for p in group["params"]]) for group in groups]

    class Exempt(GPT):
        def no_weight_decay(self) -> set[str]:
            return {"positions"}

    model = Exempt()
    plain = split(model)
    assert split(wrapped(model, how), "model." if how == "lightning" else "") == plain


def test_users_own_module_called_module_matches_by_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    lrs = by_name(model, param_groups(model, lr=1.0, overrides={"module.*": {"lr": 2.0}}), "lr")
    assert lrs == {"module.weight": 2.0, "module.bias": 2.0, "head.weight": 1.0, "head.bias": 1.0}


def test_names_are_unique_and_the_order_is_fixed() -> None:
    overrides = {"head.*": {"lr": 1e-3}, "*.bias": {"lr": 1e-4}, "blocks.0.mlp.*": {"lr": 1e-5}}

    def names() -> list[str]:
        return [group["name"] for group in param_groups(GPT(2), lr=1.0, layer_decay=0.5, overrides=overrides)]

    assert names() == names()
    assert len(set(names())) == len(names())
    assert names() == [
        "layer_0.decay",
        "layer_1.decay",
        "layer_1.no_decay",
        "layer_1.no_decay[*.bias]",
        "layer_1.no_decay[*.bias,blocks.0.mlp.*]",
        "layer_1.decay[blocks.0.mlp.*]",
        "layer_2.decay",
        "layer_2.no_decay",
        "layer_2.no_decay[*.bias]",
        "layer_3.no_decay",
        "layer_3.decay[head.*]",
        "layer_3.no_decay[*.bias]",
    ]


def test_groups_survive_a_checkpoint_and_train() -> None:
    model = GPT()
    groups = param_groups(model, lr=1e-3, weight_decay=0.1, layer_decay=0.5, overrides={"head.*": {"lr": 1.0}})
    optimizer = torch.optim.AdamW(groups)
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert [group["name"] for group in optimizer.param_groups] == [group["name"] for group in groups]


# ---------------------------------------------------------------- layer decay


def layers(model: nn.Module) -> dict[str, float]:
    """Parameter name -> steps down from the top."""
    lrs = by_name(model, param_groups(model, lr=1.0, layer_decay=0.5), "lr")
    steps = {1.0 * 0.5**n: n for n in range(64)}
    return {name: steps[lr] for name, lr in lrs.items()}


def under(values: dict[str, float], prefix: str) -> set[float]:
    return {value for name, value in values.items() if name.startswith(prefix)}


def test_transformer_layers() -> None:
    found = layers(GPT(3))
    assert found["positions"] == found["tokens.weight"] == 4
    assert [under(found, f"blocks.{i}.") for i in range(3)] == [{3}, {2}, {1}]
    assert found["norm.weight"] == found["head.weight"] == 0


def test_tied_embedding_is_at_the_bottom() -> None:
    assert layers(GPT(3, tied=True))["tokens.weight"] == 4


def test_embedding_defined_late_is_at_the_bottom() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(2))
    model.tokens = nn.Embedding(4, 4)
    model.head = nn.Linear(4, 4)
    assert (layers(model)["tokens.weight"], layers(model)["head.weight"]) == (3, 0)


def test_deep_head_is_not_taken_for_the_body() -> None:
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList([Block(), Block()]),
            "head": nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))),
        }
    )
    found = layers(model)
    assert [under(found, f"blocks.{i}.") for i in range(2)] == [{2}, {1}]
    assert under(found, "head.") == {0}


def test_lists_inside_a_block_are_not_layers() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(Block() for _ in range(5))}) for _ in range(2))
    model.head = nn.Linear(4, 4)
    found = layers(model)
    assert [under(found, f"blocks.{i}.") for i in range(2)] == [{2}, {1}]


def test_stages_of_like_blocks_count_on() -> None:
    model = nn.Module()
    model.stem = nn.Conv2d(3, 4, 1)
    model.stage1 = nn.Sequential(Block(), Block())
    model.between = nn.LayerNorm(4)
    model.stage2 = nn.Sequential(Block(), Block(), Block())
    model.head = nn.Linear(4, 4)
    found = layers(model)
    assert under(found, "stem.") == {6}
    assert [under(found, f"stage1.{i}.") for i in range(2)] == [{5}, {4}]
    assert under(found, "between.") == {4}
    assert [under(found, f"stage2.{i}.") for i in range(3)] == [{3}, {2}, {1}]
    assert under(found, "head.") == {0}


def test_plain_stacks() -> None:
    perceptron = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    assert [under(layers(perceptron), f"{i}.") for i in (0, 2, 4)] == [{2}, {1}, {0}]
    unlike = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    assert [under(layers(unlike), f"{i}.") for i in (0, 1, 3)] == [{2}, {1}, {0}]


class Timm(nn.Module):
    """A model with the names of timm's vision transformer and its ways of grouping."""

    def __init__(self, matcher: Any) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)  # defined first, so that the order of definition would mislead
        self.norm = nn.LayerNorm(4)
        self.blocks = nn.Sequential(Block(), Block())
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.group_matcher = lambda: matcher


def by_function(name: str) -> Sequence[float]:
    if name.startswith("blocks."):
        return (1, int(name.split(".")[1]))
    return (0,) if name == "cls_token" else (float("inf"),)


@pytest.mark.parametrize(
    ("matcher", "of_norm"),
    [
        ({"stem": r"^cls_token", "blocks": r"^blocks\.(\d+)"}, 0),
        ({"stem": r"^cls_token", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))], "x": None}, 1),
        (by_function, 0),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_group_matcher(matcher: Any, of_norm: int, inside: bool) -> None:
    model: nn.Module = Timm(matcher)
    prefix = ""
    if inside:
        # Around the backbone, and called as a part of it is.
        model, prefix = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2)), "net": model}), "net."
    found = layers(model)
    assert under(found, f"{prefix}cls_token") == {3}
    assert [under(found, f"{prefix}blocks.{i}.") for i in range(2)] == [{2}, {1}]
    assert under(found, f"{prefix}norm.") == {of_norm}
    assert under(found, f"{prefix}head.") == {0}
    if inside:
        assert under(found, "blocks.") == {0}


def test_layer_decay_of_one_is_none() -> None:
    model = GPT()
    assert param_groups(model, lr=0.1, layer_decay=1.0) == param_groups(model, lr=0.1)


# ---------------------------------------------------------------- overrides


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


# ---------------------------------------------------------------- errors


def frozen_head() -> nn.Module:
    model = GPT()
    model.head.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (GPT(), {"lr": -1.0}, ValueError, "lr=-1.0 must be finite and 0 or more"),
        (GPT(), {"lr": float("nan")}, ValueError, "lr=nan must be finite"),
        (GPT(), {"lr": "1e-3"}, TypeError, "lr='1e-3' must be a number"),
        (GPT(), {"lr": torch.tensor(0.1)}, TypeError, "must be a number"),
        (GPT(), {"weight_decay": -0.1}, ValueError, "weight_decay=-0.1 must be"),
        (GPT(), {"weight_decay": None}, TypeError, "weight_decay=None must be a number"),
        (GPT(), {"lr": 1.0, "layer_decay": 1.5}, ValueError, r"layer_decay=1.5 must be in \(0, 1\]"),
        (GPT(), {"lr": 1.0, "layer_decay": 0.0}, ValueError, "layer_decay=0.0 must be in"),
        (GPT(), {"layer_decay": 0.5}, ValueError, r"layer_decay=0.5 needs lr="),
        (nn.Linear(2, 2), {"lr": 1.0, "layer_decay": 0.5}, ValueError, "Linear has neither a ModuleList"),
        (GPT(), {"no_decay": "bias"}, TypeError, r"no_decay='bias' must be a list of patterns: \['bias'\]"),
        (GPT(), {"no_decay": [3]}, TypeError, "the pattern 3 must be a string"),
        (GPT(), {"no_decay": ["haed.*"]}, ValueError, r"'haed.\*' matches no parameter; the names are: pos"),
        (GPT(), {"overrides": {"haed.*": {}}}, ValueError, r"'haed.\*' matches no parameter"),
        (frozen_head(), {"overrides": {"head.*": {}}}, ValueError, "matches frozen parameters only"),
        (GPT(), {"overrides": {"head.*": 1e-3}}, TypeError, "=0.001 must be a mapping"),
        (GPT(), {"overrides": {"head.*": {"params": []}}}, ValueError, "sets 'params'"),
        (GPT(), {"overrides": {"head.*": {"name": "x"}}}, ValueError, "sets 'name'"),
        (GPT(), {"overrides": {"head.*": {"lr": torch.tensor(1.0)}}}, TypeError, "must be a number, string"),
        (GPT().requires_grad_(False), {}, ValueError, "parameters of GPT are frozen; include_frozen=True"),
        (nn.Identity(), {}, ValueError, r"Identity has no parameters; .* configure_model\(\)"),
    ],
)
def test_errors(model: nn.Module, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(model, **options)


def test_a_list_of_parameters_is_not_a_model() -> None:
    parameters: Iterable[Tensor] = GPT().parameters()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not generator"):
        param_groups(parameters)  # type: ignore[arg-type]
