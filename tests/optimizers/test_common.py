"""The judge of the other tests."""

from __future__ import annotations

import copy

import pytest
import torch

from .common import assert_same, known_warnings

pytestmark = known_warnings


def test_the_judge_sees_every_difference() -> None:
    same = {"a": [torch.tensor([1.0, float("nan")]), 1, "x"]}
    assert_same(same, copy.deepcopy(same))
    one = torch.tensor([1.0, float("nan")])
    for other in (
        one.clone().fill_(2.0),
        one.double(),
        torch.tensor([1 + 2**-23, float("nan")]),
        one[:1],
        one.tolist(),
    ):
        with pytest.raises(AssertionError):
            assert_same({"a": [one]}, {"a": [other]})
