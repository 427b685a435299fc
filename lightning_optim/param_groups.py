"""Parameter groups by standard practice: weight decay, layer-wise learning rates, and overrides by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_optim.checks import NONNEGATIVE, Range, check_number

#: A function that sorts parameters into kinds which an optimizer steps differently: it takes a parameter, its names and
#: the modules that own it, and returns the kind's name and its options.
Kinds = Callable[[nn.Parameter, Sequence[str], Sequence[nn.Module]], tuple[str, Mapping[str, Any]]]

# Names that wrappers (compile, FSDP, activation checkpointing) put between a user's own.
_WRAPPER_PARTS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# "module" may be a user's own name, so it is removed only in front, where DDP and DataParallel put it.
_WRAPPER_FRONT = re.compile(r"^(module\.)+")
# Class names of norms: all of torch's, and others such as LlamaRMSNorm, LayerNorm2d, BatchNormAct2d.
_NORM_NAME = re.compile(r"Norm(Act)?(\d+d)?$")
_EMBEDDING_TYPES = (nn.Embedding, nn.EmbeddingBag)
# "bias", "in_proj_bias", "bias_k", "relative_position_bias_table", but not the "weight" of a module named so.
_BIAS_NAME = re.compile(r"(^|_)bias(_|$)")
# timm's mark, in a model's group_matcher, for parameters that join the group before them.
_JOIN_PREVIOUS = 99999

_LAYER_DECAY = Range(lambda x: 0 < x <= 1, "a number in (0, 1], None", none=True)


@dataclass
class _Parameter:
    """One distinct parameter with all of its names (tied weights have several) and owners."""

    value: nn.Parameter
    names: list[str] = field(default_factory=list)
    owners: list[nn.Module] = field(default_factory=list)

    @property
    def ndim(self) -> int:
        # DeepSpeed's ZeRO-3 leaves an empty one-dimensional tensor in place of a partitioned weight.
        return len(getattr(self.value, "ds_shape", self.value.shape))

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches one of the names, with or without the parts that wrappers add."""
        return any(fnmatchcase(name, pattern) or fnmatchcase(own_name(name), pattern) for name in self.names)

    @property
    def own_names(self) -> list[str]:
        return [own_name(name) for name in self.names]

    def is_embedding(self) -> bool:
        """Whether it belongs to an embedding layer, perhaps among others."""
        return any(isinstance(owner, _EMBEDDING_TYPES) for owner in self.owners)

    def is_decayed(self, decay_embeddings: bool) -> bool:
        """Whether standard practice gives it weight decay."""
        if self.ndim <= 1 or _BIAS_NAME.search(self.names[0].rpartition(".")[2]):
            return False
        if any(_is_norm(owner) for owner in self.owners):
            return False
        return decay_embeddings or not self.is_embedding()


def _is_norm(module: nn.Module) -> bool:
    # The names of base classes count too, so that a subclass of nn.LayerNorm is a norm whatever it is called.
    return any(_NORM_NAME.search(base.__name__) for base in type(module).__mro__)


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    no_decay: Iterable[str] | None = None,
    decay_embeddings: bool = True,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    include_frozen: bool = False,
    kinds: Kinds | None = None,
) -> list[dict[str, Any]]:
    """Split a model's parameters into groups for an optimizer.

    **Weight decay** is zero for biases, for every parameter of at most one dimension, for the parameters of
    norm layers (classes, or subclasses of such, named ``...Norm``), and for what a submodule's own
    ``no_weight_decay()`` names (timm's convention). Embeddings are decayed, as in GPT-2 and its successors,
    unless ``decay_embeddings=False``. Exceptions go through ``overrides={"*.bias": {"weight_decay": 0.1}}``.

    **Layer decay** multiplies the learning rate by ``layer_decay`` once per layer of distance from the top,
    and writes the product into each group's ``lr``. Layers come from a ``group_matcher()`` of the model
    (timm's convention) if there is one. Otherwise the longest ``ModuleList`` or ``Sequential`` of like
    blocks, together with other lists of the same class of block (a ResNet's stages), gives layers 1 to N in
    order of definition; embeddings, and all that is defined before the blocks, are layer 0; all that is
    defined after them (final norm, head) is layer N + 1. The topmost layer has the full ``lr``.

    Patterns are globs of :mod:`fnmatch` over parameter names, where ``*`` also matches dots: ``"head.*"``,
    ``"*.bias"``. What DDP, ``torch.compile``, FSDP and checkpointing put into names may be left out. A tied
    weight appears once and answers to each of its names. A pattern that matches nothing is an error.

    Args:
        model: Any module; a ``LightningModule`` too.
        lr: Learning rate of the groups. ``None`` leaves it to the optimizer.
        weight_decay: Weight decay of the parameters that are decayed.
        layer_decay: Factor in (0, 1] per layer; ``None`` or 1 for none. Needs ``lr``.
        no_decay: Patterns of further parameters without weight decay, added to the standard ones.
        decay_embeddings: Whether the weights of ``nn.Embedding`` and ``nn.EmbeddingBag`` are decayed.
        overrides: Pattern to group options. They are final: an ``lr`` here is not multiplied by
            ``layer_decay``. Where several patterns match a parameter, later ones win, option by option.
        include_frozen: Whether parameters with ``requires_grad=False`` are included, for those who will
            unfreeze them; otherwise they are left out, and can be added later with
            ``optimizer.add_param_group``.
        kinds: For optimizers that step several kinds of parameters differently, such as ``Muon.kinds({})``: returns a
            parameter's kind and the options of the kind, which ``overrides`` may replace. An ``lr`` among these takes
            the place of ``lr``.

    Returns:
        Groups as torch optimizers take them, in a fixed order: by layer, decayed before not decayed,
        overridden last, kinds in the order in which they appear. Each has ``params``, a unique ``name`` (such as
        ``"layer_3.no_decay"``), ``weight_decay``, ``lr`` if given, and its overrides; all but ``params`` are
        primitives, so that checkpoints can hold them.

    Raises:
        TypeError: ``model`` is not a module, or a pattern, option or value has a type that cannot be used.
        ValueError: A number is outside its range, a pattern matches no parameter in use, ``layer_decay``
            lacks an ``lr`` or finds no layers, or the model has no parameters in use.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> groups = param_groups(model, lr=1e-3, weight_decay=0.1, overrides={"2.*": {"lr": 1e-2}})
        >>> for group in groups:
        ...     print(group["name"], len(group["params"]), group["lr"], group["weight_decay"])
        decay 1 0.001 0.1
        no_decay 2 0.001 0.0
        decay[2.*] 1 0.01 0.1
        no_decay[2.*] 1 0.01 0.0

    References:
        Clark et al., *ELECTRA*, https://arxiv.org/abs/2003.10555, and Bao et al., *BEiT*,
        https://arxiv.org/abs/2106.08254 (layer-wise decay of the learning rate).
    """
    _check_numbers(lr, weight_decay, layer_decay)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(no_decay, str):
        raise TypeError(f"no_decay={no_decay!r} must be a list of patterns: [{no_decay!r}]")
    undecayed = list(no_decay or ())
    options = dict(overrides or {})
    for pattern, given in options.items():
        _check_options(pattern, given)
    everything = _parameters_of(model)
    used = _in_use(model, everything, include_frozen)
    for pattern in (*undecayed, *options):
        _check_matches(pattern, used, everything)
    undecayed += _undecayed_by_the_model(model)
    depths = None if lr is None or layer_decay in (None, 1) else _depths(model, everything)

    groups: dict[tuple[int, tuple[int, ...], bool, int], dict[str, Any]] = {}
    known: list[tuple[str, Mapping[str, Any]]] = []
    for parameter in used:
        matching = [pattern for pattern in options if parameter.matches(pattern)]
        special = {key: value for pattern in matching for key, value in options[pattern].items()}
        decayed = bool(
            special["weight_decay"]
            if "weight_decay" in special
            else parameter.is_decayed(decay_embeddings) and not any(map(parameter.matches, undecayed))
        )
        depth = 0 if depths is None else depths[id(parameter.value)]
        kind = ("", {}) if kinds is None else kinds(parameter.value, parameter.own_names, parameter.owners)
        if kind not in known:
            known.append(kind)
        key = (depth, tuple(map(list(options).index, matching)), not decayed, known.index(kind))
        if key not in groups:
            layer = "" if depths is None else f"layer_{depth}."
            suffix = f"[{','.join(matching)}]" if matching else ""
            groups[key] = {
                "params": [],
                "name": f"{layer}{'decay' if decayed else 'no_decay'}{kind[0] and '.' + kind[0]}{suffix}",
                "weight_decay": float(weight_decay) if decayed else 0.0,
            }
            groups[key].update(kind[1])
            if lr is not None:
                steps_down = 0 if depths is None else max(depths.values()) - depth
                groups[key]["lr"] = float(kind[1].get("lr", lr)) * (layer_decay or 1.0) ** steps_down
            groups[key].update(special)
        groups[key]["params"].append(parameter.value)
    return [groups[key] for key in sorted(groups)]


def _parameters_of(model: nn.Module) -> list[_Parameter]:
    """Each distinct parameter once, in order of definition."""
    found: dict[int, _Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, value in module._parameters.items():
            if value is not None:
                parameter = found.setdefault(id(value), _Parameter(value))
                parameter.names.append(f"{prefix}.{name}" if prefix else name)
                parameter.owners.append(module)
    return list(found.values())


def _in_use(model: nn.Module, everything: list[_Parameter], include_frozen: bool) -> list[_Parameter]:
    """The parameters that go into groups; an error if there is none."""
    used = [parameter for parameter in everything if include_frozen or parameter.value.requires_grad]
    if used:
        return used
    if everything:
        raise ValueError(
            f"all {len(everything)} parameters of {type(model).__name__} are frozen; "
            "include_frozen=True takes them nevertheless"
        )
    raise ValueError(
        f"{type(model).__name__} has no parameters; layers that configure_model() builds do not exist yet "
        "when an optimizer is made before it"
    )


def own_name(name: str) -> str:
    """A dotted name without what wrappers put into it."""
    return _WRAPPER_FRONT.sub("", _WRAPPER_PARTS.sub("", name))


def _undecayed_by_the_model(model: nn.Module) -> list[str]:
    """Patterns of the parameters that modules exempt by ``no_weight_decay()``, which may also name missing ones."""
    return [
        own_name(f"{prefix}." if prefix else "") + name
        for prefix, module in model.named_modules()
        if callable(exempt := getattr(module, "no_weight_decay", None))
        for name in sorted(exempt())
    ]


def _depths(model: nn.Module, everything: list[_Parameter]) -> dict[int, int]:
    """The layer of each parameter, by the parameter's id; 0 is the bottom."""
    for prefix, module in model.named_modules():
        if callable(matcher := getattr(module, "group_matcher", None)):
            return _depths_by_matcher(own_name(f"{prefix}." if prefix else ""), matcher(), everything)
    blocks = _blocks(model)
    if not blocks:
        raise ValueError(
            f"layer_decay needs layers, but {type(model).__name__} has neither a ModuleList or Sequential of "
            "two or more blocks nor a group_matcher(); give it one, or set learning rates with overrides"
        )
    block_of: dict[int, int] = {}
    for number, block in enumerate(blocks, 1):
        for value in block.parameters():
            block_of.setdefault(id(value), number)
    depths: dict[int, int] = {}
    reached = 0
    for parameter in everything:
        key = id(parameter.value)
        reached = max(reached, block_of.get(key, 0))
        # What stands between two lists of blocks, as an encoder's final norm, goes with the block before it.
        outside = 0 if parameter.is_embedding() else (reached if reached < len(blocks) else len(blocks) + 1)
        depths[key] = block_of.get(key, outside)
    return depths


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model from bottom to top, or an empty list."""
    stacks = list(_stacks(model))
    # Blocks made of modules come before single layers, so that a deep head is not taken for the body; lists
    # of unlike modules are the last resort.
    longest = max(stacks, key=lambda stack: (_alike(stack), _composite(stack), len(stack)), default=[])
    if not _alike(longest):
        return longest
    kind = type(_unwrapped(longest[0]))
    of_a_kind = [stack for stack in stacks if _alike(stack) and type(_unwrapped(stack[0])) is kind]
    return [block for stack in of_a_kind for block in stack]


def _stacks(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Lists of two or more modules with parameters; lists inside a list of like modules are not looked at."""
    stack = [child for child in module.children() if next(child.parameters(), None) is not None]
    if isinstance(module, nn.ModuleList | nn.Sequential) and len(stack) > 1:
        yield stack
        if _alike(stack):
            return
    for child in module.children():
        yield from _stacks(child)


def _alike(stack: list[nn.Module]) -> bool:
    return len({type(_unwrapped(module)) for module in stack}) == 1


def _composite(stack: list[nn.Module]) -> bool:
    return next(_unwrapped(stack[0]).children(), None) is not None


def _unwrapped(module: nn.Module) -> nn.Module:
    for name in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        inner = module._modules.get(name)
        if inner is not None:
            return _unwrapped(inner)
    return module


def _depths_by_matcher(prefix: str, matcher: Any, everything: list[_Parameter]) -> dict[int, int]:
    """Layers by timm's ``group_matcher``: regular expressions or a function, from names to sort keys."""
    places: dict[int, tuple[float, ...]] = {}
    for parameter in everything:
        name = own_name(parameter.names[0])
        # A head or loss that was put around the backbone is above it.
        inside = name.startswith(prefix)
        places[id(parameter.value)] = _place(name.removeprefix(prefix), matcher) if inside else (math.inf,)
    layer_of: dict[tuple[float, ...], int] = {}
    layer = -1
    for place in sorted(set(places.values())):
        if layer < 0 or place[-1] != _JOIN_PREVIOUS:
            layer += 1
        layer_of[place] = layer
    return {key: layer_of[place] for key, place in places.items()}


def _place(name: str, matcher: Any) -> tuple[float, ...]:
    if callable(matcher):
        place = matcher(name)
        return tuple(place) if isinstance(place, Iterable) else (place,)
    for number, entry in enumerate(matcher.values()):
        for regex, suffix in [(entry, None)] if isinstance(entry, str) else (entry or ()):
            if found := re.match(regex, name):
                return (number, *(float(group) for group in found.groups() if group), *(suffix or ()))
    return (math.inf,)


def _check_numbers(lr: float | None, weight_decay: float, layer_decay: float | None) -> None:
    for name, value, valid in (
        ("lr", lr, NONNEGATIVE.or_none()),
        ("weight_decay", weight_decay, NONNEGATIVE),
        ("layer_decay", layer_decay, _LAYER_DECAY),
    ):
        check_number("", name, value, valid)
    if layer_decay is not None and lr is None:
        raise ValueError(f"layer_decay={layer_decay} needs lr=..., which it multiplies for each layer")


def _check_options(pattern: str, options: Mapping[str, Any]) -> None:
    """Check that an optimizer can take an override, and a checkpoint hold it."""
    if not isinstance(options, Mapping):
        raise TypeError(f"overrides[{pattern!r}]={options!r} must be a mapping such as {{'lr': 1e-3}}")
    for key, value in options.items():
        if key in ("params", "name"):
            raise ValueError(f"overrides[{pattern!r}] sets {key!r}, which param_groups sets itself")
        items = value if isinstance(value, tuple | list) else [value]
        if not all(item is None or isinstance(item, bool | int | float | str) for item in items):
            raise TypeError(
                f"overrides[{pattern!r}][{key!r}]={value!r} must be a number, string, bool or None, or a list"
            )


def _check_matches(pattern: str, used: list[_Parameter], everything: list[_Parameter]) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"the pattern {pattern!r} must be a string with the glob of parameter names")
    if any(parameter.matches(pattern) for parameter in used):
        return
    if any(parameter.matches(pattern) for parameter in everything):
        raise ValueError(f"the pattern {pattern!r} matches frozen parameters only (see include_frozen=True)")
    names = [own_name(parameter.names[0]) for parameter in used]
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    raise ValueError(f"the pattern {pattern!r} matches no parameter; the names are: {shown}")
