"""The options that every optimizer has, whatever its rule: declared and documented once."""
# Annotations are evaluated here, as signatures that are made of them are read by other modules.

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

import torch

from lightning_optim.hints import did_you_mean
from lightning_optim.rules.policy import Rounding
from lightning_optim.stepping.options import TORCH_SWITCHES


class CommonOfMatrices(TypedDict, total=False):
    """The options of every optimizer, also of those that step whole matrices.

    A constructor takes these as ``**common: Unpack[CommonOfMatrices]``: editors, mypy, jsonargparse and
    ``inspect.signature`` see each of them by its name.

    Args:
        maximize: Maximize instead of minimizing; default False.
        engine: ``"auto"`` (the default: the fastest that supports the parameters), ``"eager"``, ``"foreach"``,
            ``"host"`` or ``"triton"``; the environment variable ``LIGHTNING_OPTIM_ENGINE`` overrides it.
            ``engine_report()`` of the optimizer says what runs.
        rounding: How weights stored as bfloat16 or float16 are written: ``"nearest"`` (the default), ``"stochastic"``
            (bfloat16: unbiased, reproducible) or ``"kahan"`` (one more slot keeps what rounding lost). Weights in
            float32 and float64 need none.
        state_dtype: Storage type of the state: ``"float32"``, ``"bfloat16"``, ``"float64"``; default float32
            (float64 for float64 weights), also for low-precision weights.
        max_grad_norm: Clip the gradients' global norm to this inside the step; ``p.grad`` is not changed. None, the
            default, clips nothing.
    """

    maximize: bool
    engine: str
    rounding: Rounding
    state_dtype: str | torch.dtype | None
    max_grad_norm: float | None


class Common(CommonOfMatrices, total=False):
    """The options of every optimizer that does not step whole matrices.

    A constructor takes these as ``**common: Unpack[Common]``.

    Args:
        cautious: Zero updates whose sign disagrees with the gradient's (arXiv:2411.16085); default False.
    """

    cautious: bool


# A TypedDict does not inherit documentation, but its readers look for all of its keys there.
Common.__doc__ = (Common.__doc__ or "").rstrip() + (CommonOfMatrices.__doc__ or "").partition("Args:")[2]

#: The options with their types, by the name in the annotation of ``**common``.
_FORMS = {form.__name__: form.__annotations__ for form in (Common, CommonOfMatrices)}

#: The defaults, which a TypedDict cannot declare.
COMMON_DEFAULTS: Mapping[str, Any] = {
    "maximize": False,
    "cautious": False,
    "engine": "auto",
    "rounding": "nearest",
    "state_dtype": None,
    "max_grad_norm": None,
}

#: The common options that param groups may set.
OF_GROUPS = ("maximize", "cautious")


def signature(constructor: Callable[..., Any]) -> inspect.Signature:
    """A constructor's signature, without ``self`` and with the common options in the place of ``**common``.

    Args:
        constructor: The ``__init__`` of a class. If it has no ``**common: Unpack[Common]``, its signature is as it is.
    """
    _, *parameters = inspect.signature(constructor).parameters.values()
    if parameters and (common := _common(parameters[-1])) is not None:
        last = parameters.pop()
        named = {parameter.name for parameter in parameters}
        parameters += [
            inspect.Parameter(name, last.KEYWORD_ONLY, default=COMMON_DEFAULTS[name], annotation=annotation)
            for name, annotation in common.items()
            if name not in named
        ]
    return inspect.Signature(parameters)


def own_options(cls: type) -> tuple[str, ...]:
    """The options that a class's constructor names itself, which are not the common ones."""
    return tuple(option for option in _options(cls) if option not in COMMON_DEFAULTS)


def resolved(cls: type, name: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """The common options of an optimizer that is being made: what was given, and the defaults of the others.

    Args:
        cls: Its class. Options of ``OF_GROUPS`` are valid only if the constructor of the class or of a base has them.
        name: Its name, for the error.
        common: The options that were given.

    Raises:
        TypeError: A name that is no option.
    """
    shown = [option for base in cls.__mro__ if "__signature__" in base.__dict__ for option in _options(base)]
    taken = [option for option in COMMON_DEFAULTS if option not in OF_GROUPS or option in shown]
    for option in common:
        if option not in taken:
            valid = list(dict.fromkeys(shown))
            raise TypeError(f"{name} has no option {option!r}{did_you_mean(option, valid)}; valid: {', '.join(valid)}")
    return {option: common.get(option, COMMON_DEFAULTS[option]) for option in taken}


def _options(cls: type) -> list[str]:
    """The names of the options in a constructor's signature, without torch's switches."""
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    _, *parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.kind not in unnamed and p.name not in TORCH_SWITCHES]


def declared_defaults(cls: type, options: Iterable[str]) -> dict[str, Any]:
    """The defaults in the constructors' signatures, which tell an option's type whatever value was given."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in reversed(cls.__mro__):  # a constructor that passes everything on has no defaults of its own
        if "__signature__" in base.__dict__:
            parameters |= inspect.signature(base).parameters
    declared = {name: parameters[name].default for name in options if name in parameters}
    return {name: default for name, default in declared.items() if default is not inspect.Parameter.empty}


def _common(parameter: inspect.Parameter) -> Mapping[str, Any] | None:
    """The options that a parameter ``**common: Unpack[Common]`` stands for, with their types; None for another one."""
    if parameter.kind is not parameter.VAR_KEYWORD:
        return None
    written = str(parameter.annotation).removesuffix("]").rpartition("[")
    return _FORMS.get(written[2].rpartition(".")[2]) if written[0].endswith("Unpack") else None
