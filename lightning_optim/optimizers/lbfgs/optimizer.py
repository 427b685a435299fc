"""L-BFGS with its history in host memory, and line searches that may fail without harm."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.known_as import known_as
from lightning_optim.optimizers.lbfgs.iterate import count, refuse_unsuitable, signature, trained
from lightning_optim.optimizers.lbfgs.line_search import LineSearch
from lightning_optim.optimizers.lbfgs.options import LBFGSOptions, check_memory
from lightning_optim.optimizers.lbfgs.quasi_newton import Closure, QuasiNewton, Record
from lightning_optim.optimizers.lbfgs.state import Kind, by_position, check_state, own_state, torchs_pairs
from lightning_optim.primitives import primitives
from lightning_optim.stepping.closure import ClosureOptimizer
from lightning_optim.stepping.divided import refuse_a_part
from lightning_optim.stepping.evaluations import LossEvaluator
from lightning_optim.stepping.group_keys import check_keys
from lightning_optim.stepping.loading import load_groups, readable
from lightning_optim.stepping.options import check_options, each_once
from lightning_optim.stepping.outside_of_graphs import stay_outside
from lightning_optim.stepping.places import owners
from lightning_optim.stepping.shards import is_distributed
from lightning_optim.warnings import warn_once

#: Options that ``torch.optim.LBFGS`` keeps in its param group, and our class in :class:`LBFGSOptions`.
_OF_TORCHS_GROUP = {"max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn"}

#: The modules whose code a step runs, besides the closure.
_OWN_CODE = (
    __name__,
    *(
        f"lightning_optim.optimizers.lbfgs.{name}"
        for name in ("byrd_nocedal", "iterate", "line_search", "memory_budget", "options", "quasi_newton")
    ),
    "lightning_optim.engines.host_memory",
    "lightning_optim.engines.memory",
    "lightning_optim.stepping.closure",
    "lightning_optim.stepping.evaluations",
    "lightning_optim.stepping.places",
    "lightning_optim.stepping.shards",
)


@known_as("LBFGS")
class LBFGSOptim(ClosureOptimizer):
    r"""L-BFGS: quasi-Newton steps from the last gradients' differences, with a line search.

    .. math:: x \leftarrow x + t\,p, \qquad p = -\Lambda H g

    H is the inverse Hessian of the last ``history_size`` pairs :math:`(s, y)` in compact form
    (:class:`~lightning_optim.optimizers.lbfgs.byrd_nocedal.CompactHistory`), in host memory whatever devices the
    weights are on; t comes from a line search whose first trial is 1. :math:`\Lambda` holds each weight's ``lr``:

    - One ``lr`` for all weights scales the first trial (``line_search=None``: the step), as in ``torch.optim``.
    - A group's share of the direction is multiplied by that group's ``lr``; with 0 the group stays where it is. If
      unequal learning rates turn the direction uphill, :math:`-\Lambda g` is taken and the history dropped.

    **One iteration per step.** ``max_iter`` is 1, where ``torch.optim.LBFGS`` has 20: with an iteration per step,
    schedules, callbacks, logs and ``max_steps`` count what they count for every optimizer, and mini-batches change as
    often. Set it to 20 for torch's way: 20 iterations on the closure of one step.

    **The closure** evaluates the whole loss again at whatever the weights are then
    (:class:`~lightning_optim.stepping.closure.ClosureOptimizer`). A pair's gradients both come from the closure of
    one step, so other data in the next step does no harm to the history. After a step, ``p.grad`` holds the gradient
    at the weights where it ended.

    **What cannot fail silently.** A loss or gradient that is not finite counts as +inf: the search goes back from it.
    If no step is acceptable, the weights are again exactly what they were, the history is dropped, and a warning (once)
    and :attr:`counts` say so. If the closure raises, the weights are put back as well.

    **Low precision.** The iterate is a master copy in float32 (float64 if the history or a weight is), and the weights
    are this copy, rounded. Pairs use the steps that the rounded weights made. With low-precision forwards, set
    ``noise``: losses are then compared with that tolerance (with the rounding error of the loss's own type, they always
    are), and a pair is kept only if the gradient's change stands out of the noise; to this end the pair may span up to
    8 times the step.

    The public name is ``lightning_optim.LBFGS``; the class's own differs so that ``--optimizer LBFGS`` stays torch's in
    any LightningCLI.

    Args:
        params: Parameters, named parameters or param groups; groups may set ``lr`` and ``weight_decay``. DTensors are
            refused. Frozen parameters (``requires_grad=False``) take no memory.
        lr: Factor of the direction, a number or a 0-dim tensor; 1 is the quasi-Newton step.
        history_size: Pairs that are kept. Each takes two numbers per weight.
        line_search: ``"strong_wolfe"``; ``"armijo"`` (backtracking; pairs of negative curvature are skipped); None: a
            step of exactly ``lr``.
        weight_decay: Adds ``weight_decay / 2`` · |weights|² to the loss that the step minimizes, and so to its
            gradient; neither ``p.grad`` nor the returned loss includes it.
        max_iter: Iterations in a step.
        max_eval: The most evaluations of the closure in a step, including the first; None: 25 per iteration. One more
            may follow, to restore the gradient of the chosen point if another point was tried last.
        tolerance_grad: No step is made if no element of the gradient is larger.
        tolerance_change: Iterations end if the weights or the loss change by less; brackets are not searched below it.
        noise: Relative error of the loss and of the gradient's norm (bfloat16 rounds by up to 2⁻⁹ at each operation),
            0 for none, or ``"auto"``: measured at the first step, in six evaluations of the closure, and then kept.
        history_dtype: ``"float32"`` or ``"float64"``; None: float64 if some weight is.
        min_curvature: Pairs with a smaller cosine between s and y are skipped; None: 1e-6 in float32, 1e-10 in float64,
            which is above the error of the dot products.
        reuse_evaluation: Whether the last evaluation of a step is the first of the next, if the weights are still the
            same. For closures that are the same function at every step (all data at once): saves one evaluation.
        memory_budget: Bytes of host memory that may be taken, or a fraction up to 1 of what is free; None: all of it.

    Raises:
        ValueError: An option out of its range, or unknown; more memory needed than there is.
        TypeError: An option or a parameter of the wrong type.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd edition, 2006, chapters 3 and 7. Byrd, Nocedal and Schnabel,
        Representations of quasi-Newton matrices, Mathematical Programming 63, 1994. Shi, Xie, Byrd and Nocedal, A
        noise-tolerant quasi-Newton algorithm for unconstrained optimization, arXiv:2010.04352.

    >>> weight = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    >>> optimizer = LBFGSOptim([weight])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (1 - weight[0]) ** 2 + 100 * (weight[1] - weight[0] ** 2) ** 2
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(40):
    ...     loss = optimizer.step(closure)
    >>> weight.detach()
    tensor([1.0000, 1.0000], dtype=torch.float64)
    """

    paper = "Byrd, Nocedal and Schnabel, 1994"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        history_size: int = 10,
        line_search: LineSearch | None = "strong_wolfe",
        weight_decay: float = 0.0,
        *,
        max_iter: int = 1,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        noise: float | Literal["auto"] = 0.0,
        history_dtype: str | torch.dtype | None = None,
        min_curvature: float | None = None,
        reuse_evaluation: bool = False,
        memory_budget: int | float | None = None,
    ) -> None:
        self.options = LBFGSOptions(
            history_size=history_size,
            line_search=line_search,
            max_iter=max_iter,
            max_eval=max_eval,
            tolerance_grad=tolerance_grad,
            tolerance_change=tolerance_change,
            noise=noise,
            history_dtype=history_dtype,
            min_curvature=min_curvature,
            reuse_evaluation=reuse_evaluation,
            memory_budget=memory_budget,
        )
        name = type(self).public_name()
        self._record = Record(name, noise=None if noise == "auto" else float(noise))
        self._work: QuasiNewton | None = None
        refuse_a_part(name, "its line search")
        self._params: list[weakref.ref[Tensor]] | None = None
        defaults = {"lr": lr, "weight_decay": weight_decay}
        primitives(defaults)
        check_options(name, defaults, {"lr": 1.0, "weight_decay": 0.0})
        self._complete = False
        super().__init__(params, defaults)
        self._complete = True
        check_memory(name, signature(self.param_groups), self.options)
        self._check_places()

    # -- torch.optim.Optimizer ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, evaluate: Callable[[], Tensor] | None = None) -> Any:
        """One step of ``max_iter`` iterations.

        Args:
            closure: Evaluates the model at the current weights, leaves its gradient in ``p.grad``, returns the loss.
            evaluate: In its place, computes the loss at the current weights and returns it, without ``backward()``. If
                there is a closure too, it is called once, before the step.

        Returns:
            The loss at the weights before the step: what the first call returned.

        Raises:
            RuntimeError: There is no closure, or it returned nothing.
        """
        if evaluate is not None:
            if closure is not None:
                with torch.enable_grad():
                    closure()
            closure = LossEvaluator(self, evaluate).loss_and_gradient
        if closure is None:
            raise RuntimeError(
                f"{type(self).public_name()}: step() without a closure, but a line search evaluates the model several "
                "times: pass a function that zeroes the gradients, computes the loss, calls backward() and returns the "
                "loss, or step(evaluate=...), where it only computes and returns the loss (Lightning's automatic "
                "optimization passes a closure, except with precision='16-mixed', whose scaler steps without: use one "
                "of our strategies there)"
            )
        stay_outside(*_OWN_CODE)
        work = self._prepare()
        if work is None:  # nothing is trained
            with torch.enable_grad():
                return closure()
        return work.step(self.param_groups, closure, self.options, self._record)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: An unknown option, a value out of its range, a parameter twice, or not enough memory.
            TypeError: A parameter that is not floating-point or complex.
        """
        name = type(self).public_name()
        if isinstance(param_group, dict):
            primitives(param_group)
            check_keys(name, param_group, self.defaults, vars(self.options))
            check_options(name, param_group, self.defaults)
            each_once(param_group)
        super().add_param_group(param_group)
        try:
            refuse_unsuitable(name, self.param_groups[-1])
            if self._complete:
                check_memory(name, signature(self.param_groups), self.options)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and primitives, under the first parameter's number except for master copies.

        The history itself is not copied, as it may fill the memory: copy the result to keep it while training goes on.
        """
        packed = super().state_dict()
        for group in packed["param_groups"]:
            primitives(group)
        work = self._work
        if work is not None and self._is_for_these(work):
            known = None if work.loss is None else (work.loss, work.gradient)
            masters = work.iterate.masters(self.param_groups)
            packed["state"] = own_state(work.layout, work.history, masters, known, self.counts, self._record.noise)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer of this class, or the pairs of ``torch.optim.LBFGS``.

        A run goes on bit for bit, unless ``history_size`` or ``history_dtype`` differ: then the newest pairs that fit
        are taken.

        Raises:
            ValueError: The state is another optimizer's, of other parameters, or damaged. Nothing is changed then.
        """
        state_dict = state_dict.copy() if isinstance(state_dict, Mapping) else state_dict
        for pre_hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        name, layout = type(self).public_name(), signature(self.param_groups)
        matched = readable(name, self.param_groups, state_dict)
        own = vars(self.options)
        groups = load_groups(name, self.param_groups, matched, self.defaults, ["lr"], lambda group: None, own)
        for group in groups:
            for key in set(group) & _OF_TORCHS_GROUP:
                del group[key]
        state = by_position(name, state_dict, matched)
        sizes = [p.numel() * (2 if p.is_complex() else 1) for group in self.param_groups for p in group["params"]]
        kind = check_state(name, state, layout, sizes)
        if kind == "empty":
            self._work = None
        else:
            self._load_work(kind, state)
        self.__setstate__({"param_groups": groups})
        for post_hook in list(self._optimizer_load_state_dict_post_hooks.values()):
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ("options", "_record", "_work", "_complete")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._params = None  # a copy has other parameters
        self.defaults.pop("differentiable", None)  # torch adds it there: the step is without autograd

    # -- beyond torch -------------------------------------------------------------------------------------------

    @property
    def counts(self) -> dict[str, int]:
        """What happened so far: iterations, evaluations, skipped pairs and failed searches; part of the state."""
        return dict(self._record.counts)

    @property
    def noise(self) -> float | None:
        """The relative error that the loss is assumed to have; None if it is still to be measured."""
        return self._record.noise

    def _prepare(self) -> QuasiNewton | None:
        """The vectors and the history for the parameters that are trained now; None if there are none."""
        name, layout = type(self).public_name(), signature(self.param_groups)
        if any(is_distributed(p) for group in self.param_groups for p in group["params"]):
            for group in self.param_groups:
                refuse_unsuitable(name, group)
        if self._work is not None and not self._is_for_these(self._work):
            self._work = None
            warn_once(
                f"{name}: other parameters are trained than before, or in another order, so the history starts anew"
            )
        if self._work is None and count(layout):
            check_memory(name, layout, self.options)
            self._work = QuasiNewton(layout, self.options)
        self._params = [weakref.ref(p) for group in self.param_groups for p in trained(group)]
        return self._work

    def _load_work(self, kind: Kind, state: Mapping[int, Mapping[Any, Any]]) -> None:
        before = self._work
        try:
            work = self._prepare()
            if work is not None and kind == "torch":
                work.start_from(torchs_pairs(state))
            elif work is not None:
                self._load_own(work, state)
        except ValueError:
            self._work = before
            raise

    def _is_for_these(self, work: QuasiNewton) -> bool:
        """Whether ``work`` is for the parameters that are trained now, in this order."""
        if work.layout != signature(self.param_groups):
            return False
        now = [p for group in self.param_groups for p in trained(group)]
        return self._params is None or all(p is known() for p, known in zip(now, self._params, strict=True))

    def _check_places(self) -> None:
        owners(type(self).public_name(), [p for group in self.param_groups for p in trained(group)])

    def _load_own(self, work: QuasiNewton, state: Mapping[Any, Any]) -> None:
        own = state[0]
        try:
            work.history.load_state_dict(own)
        except ValueError as error:
            raise ValueError(f"{type(self).public_name()}: {error}") from error
        work.iterate.load_masters(self.param_groups, {i: s["master"] for i, s in state.items() if "master" in s})
        self._record.counts = {key: int(own[key]) for key in self.counts}
        if self.options.noise == "auto":
            self._record.noise = own["noise"]
        work.loss = None
        if self.options.reuse_evaluation and "gradient" in own:
            work.gradient[: count(work.layout)].copy_(own["gradient"])
            work.loss = float(own["loss"])
            work.iterate.read(self.param_groups)  # so that the next step finds these weights unchanged
