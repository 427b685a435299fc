"""The base class of all optimizers that step by a rule: the bookkeeping for every rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Unpack, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.checks import Range, check_choice
from lightning_optim.engines.choice import requested_engine
from lightning_optim.engines.scaling import LossScale
from lightning_optim.param_groups import Kinds
from lightning_optim.primitives import primitive, primitives
from lightning_optim.rules.matrix import MatrixRule
from lightning_optim.rules.policy import ROUNDINGS, Decay
from lightning_optim.rules.rule import UPDATES, Rule
from lightning_optim.stepping.common import OF_GROUPS, Common, declared_defaults, own_options, resolved, signature
from lightning_optim.stepping.divided import divided_by, refuse_a_part
from lightning_optim.stepping.group_keys import check_keys
from lightning_optim.stepping.links import Rest
from lightning_optim.stepping.loading import OF_ANY_STATE, load_groups, load_state, readable
from lightning_optim.stepping.method import Group, Inputs, Options, Owner
from lightning_optim.stepping.options import (
    UNDECLARED,
    Declared,
    Need,
    check_option,
    check_options,
    check_parameters,
    each_once,
    make_known,
    parse_dtype,
)
from lightning_optim.stepping.routed import RoutedStepper
from lightning_optim.stepping.scalars import scalars_of
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.together import why_one_whole


class RuleOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that steps by a :class:`~lightning_optim.rules.rule.Rule`.

    A subclass sets :attr:`rule` and has an explicit constructor; everything else (engines, state, checkpoints,
    clipping, rounding, checks) is here.

    Args:
        params: Parameters, named parameters, or dicts of param groups, as for any torch optimizer.
        defaults: The options of the optimizer's own that param groups may set, with their defaults.
        common: See :class:`~lightning_optim.stepping.common.Common`; the constructor of a subclass passes on its own
            ``**common: Unpack[Common]``.

    Raises:
        ValueError: An option out of its range, an unknown option, engine, rounding or state type.
        TypeError: An option or a parameter of the wrong type.
    """

    rule: ClassVar[Rule]
    #: The rule of parameters that are stepped as whole matrices, if there are such: see :meth:`by_matrices`.
    matrix_rule: ClassVar[MatrixRule | None] = None
    #: The rule of all other parameters, if there is a ``matrix_rule``.
    rest: ClassVar[Rest | None] = None
    #: The paper (or page) that defines the algorithm.
    paper: ClassVar[str]
    #: The class of ``torch.optim`` with which state and results are interchangeable, if any.
    torch_equivalent: ClassVar[type[torch.optim.Optimizer] | None] = None
    #: How weight decay is applied where the group has no ``decoupled_weight_decay`` of its own.
    default_decay: ClassVar[Decay] = "decoupled"
    #: Valid ranges of the class's own numeric options, where they differ from ``RANGES``. Without a range, any finite
    #: number is valid. The range of a tuple holds for each of its numbers.
    ranges: ClassVar[Mapping[str, Range]] = MappingProxyType({})
    #: Valid words of the class's own options that are words.
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    #: What the rule needs of every parameter, such as ``REAL``.
    needs: ClassVar[tuple[Need, ...]] = ()
    #: Options that only param groups have, and the constructor has not.
    group_options: ClassVar[tuple[str, ...]] = ()
    #: What this class and its bases declare about options.
    declared: ClassVar[Declared] = UNDECLARED
    #: The constructor's options that hold for all groups, as they were given.
    given: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **common: Unpack[Common]) -> None:
        name = type(self).public_name()
        asked = resolved(type(self), name, common)
        of_groups = {option: asked.pop(option) for option in OF_GROUPS if option in asked}
        defaults |= {option: value for option, value in of_groups.items() if option not in defaults}
        check_choice(name, "rounding", asked["rounding"], ROUNDINGS)
        if (max_grad_norm := primitive(asked["max_grad_norm"])) is not None:
            check_option(name, "max_grad_norm", max_grad_norm, 1.0)
            refuse_a_part(name, f"max_grad_norm={max_grad_norm}")
        if self.rule.every or (self.matrix_rule is not None and self.matrix_rule.interval is not None):
            defaults = {**defaults, UPDATES: 0}
        primitives(defaults)
        check_options(name, defaults, {**defaults, **declared_defaults(type(self), defaults)}, self.declared)
        self.given = {**self.given, **asked, "max_grad_norm": max_grad_norm}
        self.options = Options(
            engine=requested_engine(asked["engine"]),
            rounding=asked["rounding"],
            state_dtype=parse_dtype("state_dtype", asked["state_dtype"]),
            max_grad_norm=max_grad_norm,
        )
        self._attach()
        super().__init__(params, defaults)
        if divided_by() is not None and why_one_whole(type(self), self.param_groups) is not None:
            refuse_a_part(name, "its step")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.declared = Declared.of(cls)
        # `inspect`, and all that reads options by it, shows the common options by their names.
        cls.__signature__ = signature(cls.__init__)  # type: ignore[attr-defined] # `inspect` looks for it
        make_known((*own_options(cls), *cls.ranges, *cls.choices, *cls.group_options))

    @classmethod
    def public_name(cls) -> str:
        """The name under which users know the class (``AdamW`` for ``AdamWOptim``)."""
        return cls.__name__.removesuffix("Optim")

    # -- what a subclass may say differently --------------------------------------------------------------------

    @classmethod
    def flags(cls, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        """Values of the rule's flags for one parameter: by default the group's options of the same names.

        Args:
            group: The param group.
            p: The parameter.
            fresh: Whether the parameter has had no step yet.
        """
        del p, fresh
        return {name: bool(group[name]) for name in cls.rule.flags if name not in cls.rule.every}

    @classmethod
    def decay(cls, group: Group) -> Decay:
        """How weight decay is applied to a group: ``"none"`` where the rule does it itself."""
        if "weight_decay" not in group or "weight_decay" in cls.rule.scalars:
            return "none"
        decoupled = group.get("decoupled_weight_decay")
        return cls.default_decay if decoupled is None else ("decoupled" if decoupled else "l2")

    @classmethod
    def rules(cls) -> tuple[Rule, ...]:
        """All rules by which a parameter may be stepped."""
        return (cls.rule,) if cls.matrix_rule is None or cls.rest is None else (cls.matrix_rule.state, cls.rest.rule)

    @classmethod
    def by_matrices(cls, group: Group, p: Tensor) -> bool:
        """Whether a parameter is stepped by :attr:`matrix_rule`.

        Args:
            group: The param group.
            p: The parameter.
        """
        del group, p
        return False

    @classmethod
    def kinds(cls, options: Mapping[str, Any]) -> Kinds | None:
        """A function that sorts a module's parameters into kinds that are stepped differently, or None.

        Args:
            options: Options of the constructor, by name; the others have their defaults.

        Returns:
            The ``kinds`` of :func:`~lightning_optim.param_groups.param_groups`.
        """
        del options
        return None

    @classmethod
    def check(cls, group: Group) -> None:
        """Check options that are each valid by themselves, but may not be valid together.

        Raises:
            ValueError: They are not valid together.
        """

    @classmethod
    def check_saved(cls, group: Group) -> None:
        """Check the options of a saved group together: by default, as :meth:`check`.

        Raises:
            ValueError: They are not valid.
        """
        cls.check(group)

    @classmethod
    def scalars(cls, group: Group) -> dict[str, float | Tensor]:
        """The numbers of a group by the rule's names: ``betas`` gives ``beta1``, ``beta2``, ..."""
        return scalars_of(cls.rule, group)

    def asked_for(self, evaluate: Callable[[], Tensor] | None) -> Inputs | None:
        """What the rule needs at this step besides gradients: nothing, unless a subclass asks for something.

        Args:
            evaluate: As in :meth:`step`.
        """
        del evaluate
        return None

    # -- torch.optim.Optimizer ----------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None, *, evaluate: Callable[[], Tensor] | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, evaluate: Callable[[], Tensor] | None = None) -> float: ...

    def step(
        self, closure: Callable[[], float] | None = None, *, evaluate: Callable[[], Tensor] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient; gradients are not changed.

        Args:
            closure: Evaluates the model again and returns the loss.
            evaluate: Runs the model forward and returns the loss, for optimizers that ask for more than gradients. It
                is called only at steps that need it.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Engines call compiled code of their own, which torch.compile cannot trace. Not a decorator: dynamo's wrapper
        # costs 10 µs at every step, and its import more than a second at the first.
        run = _outside_of_graphs if torch.compiler.is_compiling() else Stepper.step
        # ``torch.amp.GradScaler`` sets these attributes around a step of optimizers with
        # ``_step_supports_amp_scaling = True``. Ours do not set that flag, since Lightning refuses `gradient_clip_val`
        # with it; the owner of a scaler may set it (the in-graph strategies do without).
        found_inf = getattr(self, "found_inf", None)
        amp = None if found_inf is None else LossScale(getattr(self, "grad_scale", None), found_inf, check=False)
        with torch.no_grad():
            run(self._stepper, inputs=self.asked_for(evaluate), loss=amp)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see ``torch.optim.Optimizer.add_param_group``.

        Keys that are no options are kept, in checkpoints too; a key that looks like a misspelled option is an error.
        A parameter that is in the group twice is stepped once, with a warning.

        Raises:
            ValueError: No ``params``, a misspelled option, a value out of its range, or a parameter of another group.
            TypeError: A parameter that is not floating-point or complex.
        """
        name = type(self).public_name()
        if isinstance(param_group, dict):
            if "params" not in param_group:
                raise ValueError(f"{name}: a param group without 'params'; it has {list(param_group)}")
            primitives(param_group)
            check_keys(name, param_group, self.defaults, self.given)
            check_options(name, param_group, self.defaults, self.declared)
            each_once(param_group)
        super().add_param_group(param_group)
        try:
            options = self.options
            check_parameters(name, self.param_groups[-1], options.rounding, options.state_dtype, self.needs)
            self.check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: tensors and primitives, as in ``torch.optim``."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            primitives(group)  # schedules and callbacks may have written NumPy's numbers
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer of the same kind: ours or torch's own class of the same name.

        Unlike ``torch.optim``'s, it keeps the state's precision under low-precision weights, owns its tensors, and
        finds parameters by their names where both sides know these.

        Raises:
            ValueError, TypeError: The state is another optimizer's, of other parameters, or damaged. Nothing is
                changed then.
        """
        state_dict = state_dict.copy() if isinstance(state_dict, Mapping) else state_dict
        for pre_hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        name = type(self).public_name()
        state_dict = readable(name, self.param_groups, state_dict)
        interval = None if self.matrix_rule is None else self.matrix_rule.interval
        required = [option for option in self.defaults if option in (*OF_ANY_STATE, *self.group_options, interval)]
        groups = load_groups(
            name, self.param_groups, state_dict, self.defaults, required, self.check_saved, self.given, self.declared
        )
        state = load_state(name, groups, state_dict, self._stepper.planner_of, self.rules())
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in list(self._optimizer_load_state_dict_post_hooks.values()):
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "options": self.options, "given": dict(self.given)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it there: engines step without autograd
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        self._attach()

    # -- beyond torch -------------------------------------------------------------------------------------------

    def engine_report(self) -> str:
        """Which engine steps which parameters, and why each faster one does not.

        Before the first step: what the first step would use, if every parameter had a gradient of its own dtype.
        """
        return "\n".join(str(decision) for decision in self._stepper.report())

    def use_engine(self, engine: str) -> None:
        """Step by another engine from here on; the state stays as it is.

        Args:
            engine: As in the constructor.

        Raises:
            ValueError: An unknown engine.
        """
        self.options = replace(self.options, engine=requested_engine(engine))
        self.given = {**self.given, "engine": engine}
        self._attach()

    def capture_steps(self, capture: bool = True) -> None:
        """Record the step as a CUDA graph the second time it is made, and replay it from then on.

        A replay is one call for the host, whatever the number of tensors. Gradients may be new tensors at every step
        (``zero_grad(set_to_none=True)``), and every option of a param group may change; another set of tensors or a
        loaded state is recorded anew. Where the Triton engine does not run, a warning says so, and steps are as before.

        Args:
            capture: Whether to record and replay.

        A step then raises RuntimeError if a parameter that requires a gradient has none.
        """
        self.options = replace(self.options, capture=capture)
        self._attach()

    def observe(self, observe: bool = True) -> None:
        """Have the following steps keep what the rule observes: see :meth:`observed`.

        Args:
            observe: Whether to keep it.
        """
        self.options = replace(self.options, observe=observe)
        self._attach()

    def observed(self) -> dict[str, dict[Tensor, Tensor]]:
        """What the rule has observed since :meth:`observe`: by name and parameter, the number of its last step.

        The numbers are 0-dim tensors on the parameters' devices; whoever reads one waits for it. A rule that observes
        nothing has none.
        """
        return self._stepper.observed.numbers

    @property
    def grad_norm(self) -> Tensor | None:
        """The global norm of the gradients, unscaled and not yet clipped, at the last step; None if none was needed.

        It is needed for ``max_grad_norm``, and where the step itself looks for infinite gradients.
        """
        scaling = self._stepper.scaling
        return None if scaling is None else scaling.norm()

    def _attach(self) -> None:
        self._stepper = self.make_stepper(self, self.options)

    def make_stepper(self, owner: Owner, options: Options) -> Stepper:
        """A stepper that steps parameters as this optimizer does.

        Args:
            owner: Has the parameters and their state; the stepper does not keep it alive.
            options: The options that hold for all of them.
        """
        cls = type(self)
        return (
            Stepper(owner, cls, options) if cls.matrix_rule is None else RoutedStepper(owner, cast(Any, cls), options)
        )


@torch._disable_dynamo
def _outside_of_graphs(stepper: Stepper, *, inputs: Inputs | None, loss: LossScale | None) -> None:
    stepper.step(inputs=inputs, loss=loss)
