"""Keeping the caller's autocast and inference mode out of a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def no_autocast(device_type: str = "cpu") -> AbstractContextManager[Any]:
    """A context without autocast, which would multiply matrices in half precision."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function so that it runs without autocast on the CPU."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with no_autocast():
            return function(*args, **kwargs)

    return call


def of_normal_tensors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function so that the tensors it makes are normal ones, even if it is called in inference mode.

    Inference tensors could not be updated in place outside of that mode.
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call
