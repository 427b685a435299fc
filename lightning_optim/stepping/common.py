"""The options that every optimizer has, whatever its rule: declared and documented once."""
# Annotations are evaluated here, as signatures that are made of them are read by other modules.

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict, Unpack

import torch

from lightning_optim.hints import did_you_mean
from lightning_optim.rules.policy import Rounding
from lightning_optim.stepping.options import TORCH_SWITCHES


class Common(TypedDict, total=False):
    """What can be asked of every optimizer.

    A constructor takes these as ``**common: Unpack[Common]``: editors, mypy, jsonargparse and ``inspect.signature``
    see each of them by its name.

    Args:
        maximize: Ascend instead of descending; default False.
        cautious: Zero updates whose sign disagrees with the gradient's (arXiv:2411.16085); default False.
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
    cautious: bool
    engine: str
    rounding: Rounding
    state_dtype: str | torch.dtype | None
    max_grad_norm: float | None


#: The defaults, which a TypedDict cannot declare.
COMMON_DEFAULTS: Mapping[str, Any] = {
    "maximize": False,
    "cautious": False,
    "engine": "auto",
    "rounding": "nearest",
    "state_dtype": None,
    "max_grad_norm": None,
}

#: Those of them that param groups may set.
OF_GROUPS = ("maximize", "cautious")


def signature(constructor: Callable[..., Any]) -> inspect.Signature:
    """A constructor's signature, without ``self`` and with the common options in the place of ``**common``.

    Args:
        constructor: The ``__init__`` of a class. If it has no ``**common: Unpack[Common]``, its signature is as it is.
    """
    _, *parameters = inspect.signature(constructor).parameters.values()
    if parameters and _is_common(parameters[-1]):
        last = parameters.pop()
        named = {parameter.name for parameter in parameters}
        parameters += [
            inspect.Parameter(name, last.KEYWORD_ONLY, default=COMMON_DEFAULTS[name], annotation=annotation)
            for name, annotation in Common.__annotations__.items()
            if name not in named
        ]
    return inspect.Signature(parameters)


def own_options(cls: type) -> tuple[str, ...]:
    """The options that a class's constructor names itself, which are not the common ones."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(cls).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind not in kinds and p.name not in COMMON_DEFAULTS)


def resolved(cls: type, name: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """The common options of an optimizer that is being made: what was given, and the defaults of the others.

    Args:
        cls: Its class. Where the constructor does not take an option for groups, its rule cannot do that, and there is
            no such option.
        name: Its name, for the error.
        common: What was given.

    Raises:
        TypeError: Something that is no option.
    """
    valid = [option for option in list(inspect.signature(cls).parameters)[1:] if option not in TORCH_SWITCHES]
    for option in common:
        if option not in COMMON_DEFAULTS:
            hint = did_you_mean(option, valid)
            raise TypeError(f"{name} has no option {option!r}{hint}; valid: {', '.join(valid)}")
    taken = {option for option in COMMON_DEFAULTS if option not in OF_GROUPS or option in valid or option in common}
    return {option: common.get(option, default) for option, default in COMMON_DEFAULTS.items() if option in taken}


def declared_defaults(cls: type, options: Iterable[str]) -> dict[str, Any]:
    """The defaults in a constructor's signature: what type an option has, whatever value was given."""
    parameters = inspect.signature(cls).parameters
    declared = {name: parameters[name].default for name in options if name in parameters}
    return {name: default for name, default in declared.items() if default is not inspect.Parameter.empty}


def _is_common(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    written = isinstance(annotation, str) and annotation.endswith("Unpack[Common]")
    return parameter.kind is parameter.VAR_KEYWORD and (written or annotation == Unpack[Common])
