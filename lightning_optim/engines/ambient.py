"""Keeping what a program has set around a step out of it: autocast, and inference mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def no_autocast(device_type: str = "cpu") -> AbstractContextManager[Any]:
    """A context without autocast, which would have matrices multiplied in half precision."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that computes on the CPU as it does where there is no autocast."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with no_autocast():
            return function(*args, **kwargs)

    return call


def of_normal_tensors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that makes tensors which last longer than the ``torch.inference_mode()`` that it may be called in.

    Inference tensors could not be updated in place outside of that mode.
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call
