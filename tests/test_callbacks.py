"""Callbacks: each is said once and made for both roots of Lightning, with its documentation, found again by pickle."""

from __future__ import annotations

import pickle
from importlib import import_module
from typing import Any

import pytest

from lightning_optim import callbacks
from lightning_optim.callbacks.roots import CALLBACKS, ROOTS, callback_class

#: Names in Lightning's checkpoints that are not the class's own: that of an option of strategies, which came first.
KEYS = {"SpikeRollback": "lightning_optim.Undo"}

#: What callbacks need to be given.
OPTIONS: dict[str, dict[str, Any]] = {"GradientClipping": {"max_norm": 1.0}}


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("name", CALLBACKS)
def test_each_callback_is_one_of_each_root(name: str, root: str) -> None:
    theirs = pytest.importorskip(root).Callback
    cls = callback_class(name, root)
    assert issubclass(cls, theirs)
    assert cls is getattr(import_module(ROOTS[root]), name)
    assert (cls.__name__, cls.__qualname__) == (name, name)
    assert len(cls.__doc__ or "") > 100
    made = cls(**OPTIONS.get(name, {}))
    assert type(pickle.loads(pickle.dumps(made))) is cls  # noqa: S301 # as a Trainer's start method does
    # What names it in Lightning's checkpoints.
    assert made.state_key == KEYS.get(name, name)


def test_the_package_offers_them_by_name() -> None:
    assert set(CALLBACKS) <= set(dir(callbacks))
    assert list(CALLBACKS) == callbacks.__all__
    with pytest.raises(AttributeError, match="has no attribute 'FillTotals'; it has FillTotalSteps, RefuseWithout"):
        callbacks.FillTotals  # noqa: B018
