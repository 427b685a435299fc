"""SAM: sharpness-aware minimization around any optimizer; ASAM by a flag."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_optim.checks import NONNEGATIVE, check_number, check_switch
from lightning_optim.primitives import primitive, primitives
from lightning_optim.stepping.ascent import ADAPTIVE, RHO, Ascent
from lightning_optim.stepping.divided import refuse_a_part
from lightning_optim.stepping.evaluations import ClosureEvaluator, Evaluator, LossEvaluator, Request, request_of
from lightning_optim.stepping.loading import readable
from lightning_optim.stepping.outside_of_graphs import stay_outside


class _Shared:
    """An attribute that a wrapper shares with the optimizer inside it: assigning to either changes both."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Any, owner: type | None = None) -> Any:
        if wrapper is None:
            return self
        base = wrapper.__dict__.get("base")
        if base is not None:
            return getattr(base, self._name)
        if self._name not in wrapper.__dict__:  # Lightning's wrapper then asks the optimizer
            raise AttributeError(self._name)
        return wrapper.__dict__[self._name]

    def __set__(self, wrapper: Any, value: Any) -> None:
        base = wrapper.__dict__.get("base")
        if base is None:
            wrapper.__dict__[self._name] = value
        else:
            setattr(base, self._name, value)


class SAM(Optimizer):
    r"""SAM: steps with the gradient of the worst weights nearby, so as to find flat minima.

    .. math:: e = \rho\,\frac{g}{\lVert g \rVert + 10^{-12}}, \qquad
              \theta \leftarrow \mathrm{base}\big(\theta,\ \nabla L(\theta + e)\big)

    with the norm over all gradients together, of all param groups, devices and shards. With ``adaptive`` (ASAM) it is
    :math:`e = \rho\,T^2 g / \lVert T g \rVert`, where :math:`T = |\theta| + 0.01` for weights and 1 for biases, as in
    its authors' code. Biases are those with ``bias`` in their name if names are known (``model.named_parameters()``),
    else all tensors of less than two dimensions, which takes the scales of norm layers for biases.

    Every step evaluates the model twice. There are three ways to do so:

    - a Lightning Trainer with a strategy of ours does all of it (see ``docs/strategies.md``), with accumulation,
      clipping, ``16-mixed`` and DDP;
    - ``step(evaluate=...)`` after a backward pass, with a function that returns the loss; or ``step(closure)``;
    - :meth:`perturb`, a second forward and backward pass over the *same* batches from zeroed gradients,
      :meth:`restore`, and ``step()``.

    Param groups, state and defaults are the base optimizer's, so that any schedule moves its learning rate, and
    ``state_dict`` is the base's, with ``sam_rho`` and ``sam_adaptive`` in each group; these may be set per group.

    Args:
        params: Parameters, named parameters or param groups, as the base takes them.
        base: Builds the optimizer that steps: a class, a ``functools.partial``, or in a configuration file of a
            LightningCLI a ``class_path`` with ``init_args``.
        rho: Length of the perturbation; ASAM's authors take 0.5.
        adaptive: Use ASAM.

    Raises:
        ValueError: ``rho`` is negative or not finite, or the base cannot be in a SAM.
        TypeError: ``base`` builds no optimizer, or an option has the wrong type.

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv:2010.01412.
        Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks,
        arXiv:2102.11600.

    >>> from functools import partial
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = SAM([weight], partial(torch.optim.SGD, lr=0.1), rho=0.5)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = weight.square().sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure).item()
    12.5
    >>> weight.detach()  # 0.9 of it, and less by a tenth of the perturbation, [0.3, 0.4]
    tensor([2.6700, 3.5600])
    """

    paper = "arXiv:2010.01412"
    param_groups = _Shared()
    state = _Shared()
    defaults = _Shared()

    def __init__(
        self,
        params: ParamsT,
        base: Callable[[Iterable], Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
    ) -> None:
        rho, adaptive = primitive(rho), primitive(adaptive)
        _check({RHO: rho, ADAPTIVE: adaptive}, {RHO: "rho", ADAPTIVE: "adaptive"})
        refuse_a_part("SAM", "the length of its perturbation")
        if isinstance(base, Optimizer) or not callable(base):
            raise TypeError(
                f"SAM: base={_described(base)}; valid: what builds an optimizer from parameters, such as "
                "torch.optim.AdamW or functools.partial(torch.optim.AdamW, lr=1e-3)"
            )
        given, own = _without_own_options(params)
        inner = base(given)
        _check_base(inner)
        # Among the defaults, so that later groups and loaded ones get them too.
        inner.defaults.update({RHO: rho, ADAPTIVE: adaptive})
        for group in inner.param_groups:
            group.update({RHO: rho, ADAPTIVE: adaptive} | own.get(id(group["params"][0]) if group["params"] else 0, {}))
        self._ascent = Ascent()
        super().__init__(inner.param_groups, inner.defaults)
        for name in ("param_groups", "state", "defaults"):
            del self.__dict__[name]
        self.base = inner

    @overload
    def step(self, closure: None = None, *, evaluate: Callable[[], Tensor] | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any], *, evaluate: Callable[[], Tensor] | None = None) -> Any: ...

    def step(self, closure: Callable[[], Any] | None = None, *, evaluate: Callable[[], Tensor] | None = None) -> Any:
        """Step the base optimizer with the gradient at the perturbed weights.

        Args:
            closure: Evaluates the model and returns the loss. It is called twice, or once with ``evaluate``, or after
                :meth:`perturb` and :meth:`restore`, when the gradients are there already.
            evaluate: Computes the loss at the perturbed weights and returns it, without ``backward()``.

        Returns:
            What the closure returned the first time: the loss at the weights themselves.

        If there are no gradients after its first call (it dropped them, say), the closure is not called again, and
        nothing is stepped.

        Raises:
            RuntimeError: The weights are perturbed; there is neither closure nor ``evaluate``, and nobody has called
                :meth:`perturb` and :meth:`restore`; or the closure computes no gradients the second time.
        """
        stay_outside(__name__, *(f"lightning_optim.stepping.{name}" for name in ("ascent", "evaluations", "shards")))
        ascent = self._ascent
        if ascent.perturbed:
            raise RuntimeError("SAM: step() while the weights are perturbed; call restore() first")
        loss = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if self.asks:
                if evaluate is not None:
                    self.ask(LossEvaluator(self, evaluate))
                elif closure is not None:
                    self.ask(ClosureEvaluator(self, closure))
                else:
                    self._refuse_to_step_plainly()
        finally:
            self.abandon()
        self.base.step()
        return loss

    #: See :mod:`lightning_optim.stepping.evaluations`.
    request: ClassVar[Request] = "gradient"

    @property
    def asks(self) -> bool:
        """Whether the next step still needs a second gradient: not after :meth:`perturb` and :meth:`restore`."""
        return not self._ascent.done

    def ask(self, evaluator: Evaluator) -> None:
        """Replace the gradients by those at the worst weights nearby.

        If an exception is raised, :meth:`abandon` puts the weights back. If there are no gradients, none are
        evaluated.
        """
        self.perturb(evaluator.loss_scale)
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            evaluator.gradient()
        self.restore()

    @torch.no_grad()
    def perturb(self, loss_scale: float | Tensor | None = None) -> None:
        """Move the weights to the worst place nearby, by the present gradients; these are not changed.

        Where a gradient is infinite or NaN, the weights stay as they are. Nothing is read back from the device.

        Args:
            loss_scale: What the loss, and so the gradients, were multiplied by, if they were.

        Raises:
            RuntimeError: The weights are perturbed already, or a gradient is sparse.
        """
        ascent = self._ascent
        if ascent.perturbed:
            raise RuntimeError("SAM: perturb() twice; call restore() in between")
        ascent.ascend(self.param_groups, loss_scale)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back to what they were before :meth:`perturb`, bit for bit.

        Raises:
            RuntimeError: The weights are not perturbed.
        """
        ascent = self._ascent
        if not ascent.perturbed:
            raise RuntimeError("SAM: restore() without perturb()")
        ascent.descend()

    @torch.no_grad()
    def abandon(self) -> None:
        """Forget a step that was begun by :meth:`perturb`; weights that are perturbed are put back.

        Call it after an error in the second pass, say; the next ``step()`` is then a whole one again.
        """
        self._ascent.abandon()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own: the base's, ``sam_rho`` and ``sam_adaptive``.

        Raises:
            ValueError, TypeError: ``sam_rho`` or ``sam_adaptive`` is not valid, or what the base raises.
        """
        if isinstance(param_group, dict):
            primitives(param_group)
            _check(param_group)
        if "base" in self.__dict__:
            self.base.add_param_group(param_group)
        else:  # the constructor goes through the groups that there are
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict, with ``sam_rho`` and ``sam_adaptive`` in each param group."""
        for before in list(self._optimizer_state_dict_pre_hooks.values()):
            before(self)
        state_dict = self.base.state_dict()
        for after in list(self._optimizer_state_dict_post_hooks.values()):
            result = after(self, state_dict)
            state_dict = state_dict if result is None else result
        for group in state_dict["param_groups"]:
            primitives(group)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a SAM, or of an optimizer like the base, which leaves each group's ``sam_rho`` as it is.

        Parameters are found by their names where both sides know these, also for a base of torch's.

        Raises:
            ValueError, TypeError: ``sam_rho`` or ``sam_adaptive`` is not valid, or what the base raises.
        """
        state_dict = state_dict.copy() if isinstance(state_dict, Mapping) else state_dict
        for before in list(self._optimizer_load_state_dict_pre_hooks.values()):
            result = before(self, state_dict)
            state_dict = state_dict if result is None else result
        state_dict = readable("SAM", self.param_groups, state_dict)
        own = [{key: group[key] for key in (RHO, ADAPTIVE)} for group in self.param_groups]
        saved = [{key: primitive(value) for key, value in group.items()} for group in state_dict["param_groups"]]
        if len(saved) == len(own):
            for group in saved:
                _check(group)
            saved = [mine | group for mine, group in zip(own, saved, strict=True)]
        self.base.load_state_dict({**state_dict, "param_groups": saved})
        for after in list(self._optimizer_load_state_dict_post_hooks.values()):
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "_ascent": self._ascent}

    def __setstate__(self, state: dict[str, Any]) -> None:
        switch = "differentiable" in state["base"].defaults
        super().__setstate__(state)
        if not switch:  # torch adds it, but our optimizers have no such option
            self.defaults.pop("differentiable", None)

    def __repr__(self) -> str:
        return f"SAM over {self.base!r}"

    def _refuse_to_step_plainly(self) -> None:
        """Raise an error, since a step without a second gradient would silently be the base's own."""
        # torch.distributed.checkpoint makes a step with lr=0 so that optimizers allocate their state.
        if all("lr" in group and float(group["lr"]) == 0 for group in self.param_groups):
            return
        raise RuntimeError(
            "SAM: step() without a closure, and without perturb() and restore() before it, would be a step of "
            f"{type(self.base).__name__} alone; valid: step(closure), where the closure runs forward and backward; "
            "step(evaluate=...), which returns the loss; or perturb(), a second forward and backward pass, restore(), "
            "step(). Under a Lightning Trainer: strategy='in_graph' or another one of lightning-optim's"
        )


def stepped(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose rule updates the weights: the base of a SAM, or any other optimizer itself."""
    return optimizer.base if isinstance(optimizer, SAM) else optimizer


def built_by(base: Any) -> tuple[type[Optimizer] | None, dict[str, Any]]:
    """The class that a base builds, or None if it is unknown, and the options that the base itself names.

    >>> from functools import partial
    >>> built_by(partial(torch.optim.SGD, lr=0.1))
    (<class 'torch.optim.sgd.SGD'>, {'lr': 0.1})
    """
    given: dict[str, Any] = {}
    while isinstance(base, partial):
        given = base.keywords | given
        # jsonargparse passes the class as an argument to a function of its own.
        classes = [part for part in (base.func, *base.args) if _is_optimizer_class(part)]
        base = classes[-1] if classes else base.func
    return (base if _is_optimizer_class(base) else None), given


def _is_optimizer_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer)


def _without_own_options(params: Any) -> tuple[Any, dict[int, dict[str, Any]]]:
    """The parameters for the base, without SAM's own options, and these options by the ids of their parameters."""
    if isinstance(params, Tensor):
        return params, {}  # every optimizer refuses a single tensor, with an error of its own
    given: list[Any] = []
    own: dict[int, dict[str, Any]] = {}
    for entry in params:
        if isinstance(entry, dict) and "params" in entry:
            entry = {key: primitive(value) if key in (RHO, ADAPTIVE) else value for key, value in entry.items()}
            _check(entry)
            options = {key: entry[key] for key in (RHO, ADAPTIVE) if key in entry}
            entry = {key: value for key, value in entry.items() if key not in options}
            if not isinstance(entry["params"], Tensor):
                entry["params"] = list(entry["params"])
            members = entry["params"] if isinstance(entry["params"], list) else [entry["params"]]
            own |= {id(member[1] if isinstance(member, tuple) else member): options for member in members}
        given.append(entry)
    return given, own


def _check_base(inner: Any) -> None:
    if not isinstance(inner, Optimizer):
        raise TypeError(f"SAM: base built a {type(inner).__name__}; valid: a torch.optim.Optimizer")
    reason = ""
    if isinstance(inner, SAM):
        reason = "a SAM in a SAM perturbs twice"
    elif request_of(inner) is not None:
        reason = "it evaluates the model itself"
    elif clash := {RHO, ADAPTIVE} & inner.defaults.keys():
        reason = f"it has options {', '.join(sorted(clash))} of its own"
    if reason:
        raise ValueError(f"SAM: base={type(inner).__name__}: {reason}; valid: optimizers of one gradient, as AdamW")


def _check(options: dict[str, Any], names: dict[str, str] | None = None) -> None:
    shown = names or {RHO: RHO, ADAPTIVE: ADAPTIVE}
    rho, adaptive = options.get(RHO, 0.0), options.get(ADAPTIVE, False)
    check_number("SAM", shown[RHO], rho, NONNEGATIVE)
    check_switch("SAM", shown[ADAPTIVE], adaptive)


def _described(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Optimizer) else repr(value)
