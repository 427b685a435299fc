"""Muon: momentum, orthogonalized, for hidden matrices; AdamW for all else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy as is_uninitialized
from torch.optim.optimizer import ParamsT

from lightning_optim.checks import NONNEGATIVE, Range, check_number
from lightning_optim.engines.newton_schulz import MUON, Orthogonalized, matrices
from lightning_optim.known_as import known_as
from lightning_optim.optimizers.adam import ADAM
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.param_groups import Kinds
from lightning_optim.primitives import primitive
from lightning_optim.rules.matrix import MatrixRule
from lightning_optim.rules.ops import lerp
from lightning_optim.rules.rule import Rule
from lightning_optim.stepping.common import CommonOfMatrices
from lightning_optim.stepping.divided import divided_by
from lightning_optim.stepping.links import Rest
from lightning_optim.stepping.method import Group
from lightning_optim.stepping.split_groups import tie
from lightning_optim.warnings import warn_once

#: Names of embeddings and output heads in common models: matrices, but not hidden ones.
EMBEDDINGS_AND_HEADS = (
    "*embed*", "*emb", "*emb.*", "*wte.*", "*wpe.*", "*lm_head.*", "head.*", "*.head.*", "*classifier.*",
)  # fmt: skip

_ADAMW_LR = 3e-4


def muon(p: Any, g: Any, momentum_buffer: Any, *, momentum: Any, nesterov: bool) -> Any:
    """The rule of Muon's direction, which is orthogonalized before the weight follows it."""
    momentum_buffer = lerp(momentum_buffer, g, 1 - momentum)
    return lerp(g, momentum_buffer, momentum) if nesterov else momentum_buffer, momentum_buffer


def move(p: Any, g: Any, *, lr: Any) -> Any:
    """The rule by which a weight follows its orthogonalized direction."""
    return lr * g


@dataclass(frozen=True)
class Routing:
    """Which parameters are hidden matrices, and how fast the others learn.

    Attributes:
        lr: Learning rate of hidden matrices.
        adamw_lr: Learning rate of the others.
        patterns: Globs of the names of matrices that are not hidden.
    """

    lr: float | Tensor
    adamw_lr: float | Tensor
    patterns: tuple[str, ...]

    def is_hidden(self, p: Tensor, names: Sequence[str], stacked: bool) -> bool:
        """Whether a parameter is a hidden matrix (or a stack of such), as far as its shape and names tell."""
        if not _is_matrix(p) or p.numel() == 0 or min(matrices(p.shape, stacked)[1:]) < 2:
            return False
        return not any(fnmatchcase(name, pattern) for name in names for pattern in self.patterns)

    def scaled(self, lr: float | Tensor) -> float | Tensor:
        """The learning rate of the other parameters in a group whose hidden matrices have the learning rate ``lr``."""
        if lr is self.lr or float(self.lr) == float(lr) or self._is_no_measure():
            return torch.full_like(lr, float(self.adamw_lr)) if isinstance(lr, Tensor) else self.adamw_lr
        return lr * (self.adamw_lr / self.lr)

    def _is_no_measure(self) -> bool:
        """Whether the constructor's lr is too small to define a ratio, as at the start of a warm-up.

        In training, Muon's lr is never a thousandth of AdamW's: it is far larger, or similar with ``match_rms_adamw``.
        """
        return float(self.lr) * 1000 < float(self.adamw_lr) or float(self.lr) == 0


def _is_matrix(p: Tensor) -> bool:
    if is_uninitialized(p):
        raise ValueError(
            "Muon: a lazy module's weight, whose shape must be known to tell matrices from the rest; valid: a forward "
            "pass before the optimizer is made"
        )
    return p.ndim >= 2 and p.is_floating_point()


@known_as("Muon")
class MuonOptim(RuleOptimizer):
    r"""Muon: momentum, orthogonalized, for hidden matrices; AdamW for all else, in one optimizer.

    .. math:: m \leftarrow \mu m + (1-\mu) g, \quad
              O = \mathrm{NS}\big(\mu m + (1-\mu) g\big) \approx U V^\top, \quad
              \Theta \leftarrow (1-\eta\lambda)\,\Theta - \eta\,s\,O

    where :math:`U \Sigma V^\top` is what NS is given, :math:`s = \sqrt{\max(1, rows/columns)}`, and NS are
    ``ns_steps`` Newton–Schulz steps (:func:`~lightning_optim.engines.newton_schulz.orthogonalize`), done for all
    matrices of a shape at once: in bfloat16 on CUDA, in float32 elsewhere, in float64 for float64 weights.

    **Which parameters.** A param group says by ``use_muon`` which of the two rules steps it. A group without that key
    is split into one of each kind (an empty one is left out): hidden matrices to Muon; vectors, scalars, matrices of
    one row or column, complex weights, embeddings and output heads to AdamW. The latter two are known by their names,
    so pass ``model.named_parameters()``, or the model itself to :func:`~lightning_optim.registry.create_optimizer`,
    which knows ``nn.Embedding`` by its type as well. Without names, all matrices go to Muon, and a warning says so.

    **Shapes.** Rows are the first dimension. A weight of three dimensions is a stack of matrices, one for each expert,
    and each is orthogonalized by itself (``stacked=False``: one matrix of ``(first, rest)``, as for the kernel of
    ``nn.Conv1d``); one of four or more, as a convolution's kernel, is one matrix of ``(first, rest)``.

    **Learning rates.** Every group has its own ``lr``, which any scheduler may move: ``lr`` for matrices, ``adamw_lr``
    for the rest. If a group that is split has an ``lr`` of its own, the rest gets that times ``adamw_lr / lr``. The two
    parts of a group that is added later, as by finetuning callbacks, keep this ratio: if only one of them is given
    another ``lr``, as by ``param_groups[-1]["lr"] = ...``, it counts for the whole group. (Groups with ``use_muon`` are
    not tied.) Schedulers count groups when they are made, so add groups before.

    The public name is ``lightning_optim.Muon``; the class's own differs so that ``--optimizer Muon`` stays torch's in
    any LightningCLI.

    Weights that are divided over processes (DTensors, as FSDP2 makes them) are stepped as whole matrices: each process
    gathers the directions and orthogonalizes all of them. FSDP1's flat parameters are vectors, and so go to AdamW.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Learning rate of matrices, a number or a 0-dim tensor. With ``adjust_lr="original"``, a weight's singular
            values move by about this.
        momentum: Decay rate of the averaged gradient.
        weight_decay: Decay coefficient of all groups; weights shrink by ``lr * weight_decay`` of themselves each step.
        nesterov: Orthogonalize ``lerp(g, m, momentum)`` rather than ``m``.
        ns_steps: Number of Newton–Schulz steps.
        ns_coefficients: ``"muon"`` (Jordan's, which leave singular values between 0.7 and 1.2), or ``"polar_express"``
            (arXiv:2505.16932, which converge).
        adjust_lr: ``"original"``: s as above; ``"match_rms_adamw"``: 0.2 · √max(rows, columns), for the ``lr`` and
            ``weight_decay`` of AdamW (arXiv:2502.16982).
        stacked: Whether weights of three dimensions are stacks of matrices.
        adamw_lr: Learning rate of the AdamW groups.
        betas: Decay rates of AdamW's two averages.
        eps: Added to AdamW's denominator.
        adamw_patterns: Globs of the names of matrices that go to AdamW; None: ``EMBEDDINGS_AND_HEADS``.
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.CommonOfMatrices`.

    Raises:
        ValueError: An option out of its range, or unknown; ``use_muon=True`` for what is no real matrix.
        TypeError: An option of the wrong type.

    References:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
        https://kellerjordan.github.io/posts/muon/. Liu et al., Muon is Scalable for LLM Training, arXiv:2502.16982.

    >>> model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(9, 4), "hidden": torch.nn.Linear(4, 4)})
    >>> optimizer = MuonOptim(model.named_parameters(), lr=0.02, adamw_lr=1e-3)
    >>> for group in optimizer.param_groups:
    ...     print(group["use_muon"], group["lr"], group["param_names"])
    True 0.02 ['hidden.weight']
    False 0.001 ['embed.weight', 'hidden.bias']
    """

    paper = "https://kellerjordan.github.io/posts/muon"
    rule = Rule(muon)
    matrix_rule = MatrixRule(rule, Orthogonalized(), move=Rule(move))
    rest = Rest(ADAM, "AdamW", {"amsgrad": False})
    ranges: ClassVar[dict[str, Range]] = {
        "adamw_lr": NONNEGATIVE,
        "ns_steps": Range(lambda x: 1 <= x < 100 and x % 1 == 0, "a number of steps from 1 to 99"),
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "adjust_lr": ("original", "match_rms_adamw"),
        "ns_coefficients": ("muon", "polar_express"),
    }
    group_options = ("use_muon",)
    _in_constructor = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: Literal["muon", "polar_express"] = "muon",
        adjust_lr: Literal["original", "match_rms_adamw"] = "original",
        stacked: bool = True,
        adamw_lr: float | Tensor = _ADAMW_LR,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw_patterns: Sequence[str] | None = None,
        **common: Unpack[CommonOfMatrices],
    ) -> None:
        defaults = {
            "lr": primitive(lr),
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "adjust_lr": adjust_lr,
            "stacked": stacked,
            "betas": betas,
            "eps": eps,
            "use_muon": None,
        }
        lr, adamw_lr = primitive(lr), primitive(adamw_lr)
        self.routing = _routing(lr, adamw_lr, adamw_patterns)
        self.given = {"adamw_lr": adamw_lr, "adamw_patterns": adamw_patterns}
        self._in_constructor = True
        super().__init__(params, defaults, **common)
        self._in_constructor = False

    @classmethod
    def by_matrices(cls, group: Group, p: Tensor) -> bool:
        """See :meth:`RuleOptimizer.by_matrices`: the group's ``use_muon``."""
        return bool(group["use_muon"])

    @classmethod
    def check(cls, group: Group) -> None:
        """See :meth:`RuleOptimizer.check`: whether ``use_muon`` fits the group's parameters, and the momentum."""
        name = cls.public_name()
        if not (group["use_muon"] is None or isinstance(group["use_muon"], bool)):
            raise TypeError(f"{name}: use_muon={group['use_muon']!r} is not a bool; valid: True, False")
        momentum = group["momentum"]
        on_device = isinstance(momentum, Tensor) and momentum.device.type != "cpu"  # reading it would wait
        if not on_device and not 0 <= float(momentum) < 1:
            raise ValueError(f"{name}: momentum={momentum!r}; valid: a number in [0, 1)")
        for index, p in enumerate(group["params"] if group["use_muon"] else ()):
            if not _is_matrix(p):
                raise ValueError(
                    f"{name}: use_muon=True with parameter {index} of the group, of shape {tuple(p.shape)} and "
                    f"{p.dtype}; valid: real weights of two or more dimensions, or use_muon=False"
                )

    @classmethod
    def kinds(cls, options: Mapping[str, Any]) -> Kinds:
        """See :meth:`RuleOptimizer.kinds`: embeddings are known by their modules' type as well as by name."""
        lr = options.get("lr", 0.02)
        routing = _routing(lr, options.get("adamw_lr", _ADAMW_LR), options.get("adamw_patterns"))

        def kind(p: nn.Parameter, names: Sequence[str], owners: Sequence[nn.Module]) -> tuple[str, dict[str, Any]]:
            embeds = any(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in owners)
            convolves = p.ndim == 3 and any(isinstance(owner, nn.modules.conv._ConvNd) for owner in owners)
            stacked = options.get("stacked", True) and not convolves
            if embeds or not routing.is_hidden(p, names, stacked):
                return "adamw", {"use_muon": False, "lr": routing.adamw_lr}
            if convolves:
                return "muon_conv", {"use_muon": True, "stacked": False}
            return "muon", {"use_muon": True}

        return kind

    @classmethod
    def check_saved(cls, group: Group) -> None:
        """See :meth:`RuleOptimizer.check_saved`: saved groups are split already."""
        if group["use_muon"] is None:
            raise ValueError(f"{cls.public_name()}: use_muon=None in a saved param group; valid: True, False")
        cls.check(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; without ``use_muon`` among these, they may become two groups.

        Raises:
            ValueError: A misspelled option, a value out of its range, a parameter that another group has, or
                ``use_muon=True`` for what is no real matrix.
            TypeError: A parameter that is not floating-point or complex.
        """
        own = set(param_group) if isinstance(param_group, dict) else set()
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        if group["use_muon"] is not None:
            if "lr" not in own and not group["use_muon"]:
                group["lr"] = self.routing.adamw_lr
            self.param_groups.append(group)
            return
        hidden = [
            self.routing.is_hidden(
                p, group["param_names"][index : index + 1] if "param_names" in group else (), group["stacked"]
            )
            for index, p in enumerate(group["params"])
        ]
        if any(hidden) and "param_names" not in group:
            warn_once(
                f"{self.public_name()}: the parameters have no names, so that embeddings and output heads cannot be "
                "told from hidden matrices: all matrices are orthogonalized. Pass model.named_parameters(), "
                'create_optimizer("muon", model), or groups with use_muon=True and use_muon=False',
                key="Muon: no names",
            )
        halves = [_half(group, hidden, muon) for muon in (True, False)]
        halves = [half for half in halves if half["params"]] or [halves[1]]
        if (maker := divided_by()) is not None:
            raise ValueError(
                f"{self.public_name()}: a param group without use_muon, which would be split, but {maker} and moves "
                "learning rates group by group; valid: groups with use_muon=True and use_muon=False"
            )
        for half in halves:
            if not half["use_muon"]:
                half["lr"] = self.routing.scaled(group["lr"])
            if len(halves) == 2 and "name" in half:
                half["name"] += ".muon" if half["use_muon"] else ".adamw"
            self.param_groups.append(half)
        if len(halves) == 2 and not self._in_constructor:
            tie(*halves)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a Muon: ours, or ``torch.optim.Muon``'s, if all parameters are matrices.

        Which rule steps a group is one of its options, and so comes from the state.

        Raises:
            ValueError: The state is another optimizer's, of other parameters, or damaged.
        """
        groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
        if isinstance(groups, list) and groups and all(isinstance(g, dict) and _is_torchs(g) for g in groups):
            state_dict = {**state_dict, "param_groups": [self._from_torch(group) for group in groups]}
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "routing": self.routing}

    def _from_torch(self, saved: Group) -> Group:
        """A saved param group of ``torch.optim.Muon`` as one of ours."""
        coefficients = primitive(saved["ns_coefficients"])
        if not isinstance(coefficients, list | tuple) or [*map(str, coefficients)] != [*map(str, MUON)]:
            raise ValueError(
                f"{self.public_name()}: saved with ns_coefficients={saved['ns_coefficients']!r}; valid: {MUON}"
            )
        group = {key: value for key, value in saved.items() if key not in ("adjust_lr_fn", "eps")}
        return {
            **group,
            "ns_coefficients": "muon",
            "adjust_lr": saved["adjust_lr_fn"] or "original",
            "use_muon": True,
            "betas": self.defaults["betas"],
            "eps": self.defaults["eps"],  # torch's is that of the orthogonalization
        }


def _is_torchs(group: Group) -> bool:
    return "adjust_lr_fn" in group and "ns_coefficients" in group and "use_muon" not in group


def _half(group: Group, hidden: Sequence[bool], muon: bool) -> Group:
    """The part of a group that is hidden matrices if ``muon``, else the other part."""
    half = {**group, "use_muon": muon}
    for key in ("params", "param_names"):
        if key in group:
            half[key] = [value for value, mine in zip(group[key], hidden, strict=True) if mine == muon]
    return half


def _routing(lr: float | Tensor, adamw_lr: float | Tensor, patterns: Iterable[str] | None) -> Routing:
    """A :class:`Routing`, after its values are checked."""
    check_number("Muon", "lr", lr, NONNEGATIVE, tensors=True)
    check_number("Muon", "adamw_lr", adamw_lr, NONNEGATIVE, tensors=True)
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns or ()):
        raise TypeError(f"Muon: adamw_patterns={patterns!r}; valid: a list of globs of names, such as ['head.*']")
    return Routing(lr, adamw_lr, EMBEDDINGS_AND_HEADS if patterns is None else tuple(patterns))
