"""Acting on modules as they are imported: every way of importing works, and none is broken."""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_optim import after_import as home
from lightning_optim.after_import import after_import

Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Writes modules that can be imported; what is imported and watched is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(home._finder, "actions", {})
    monkeypatch.setattr(home._finder, "done", {})
    finders, modules = list(sys.meta_path), set(sys.modules)

    def write(name: str, text: str = "value = 1\n") -> str:
        path = tmp_path.joinpath(*name.split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text)
        importlib.invalidate_caches()
        return name

    yield write
    sys.meta_path[:] = finders
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def seen() -> list[Any]:
    return []


def test_now_or_later_and_once_for_each_execution(make: Make, seen: list[Any]) -> None:
    def note(module: ModuleType) -> None:
        seen.append(module.value)

    name = make("watched_a")
    for _ in range(2):
        after_import(name, note)
    assert name not in sys.modules
    module = importlib.import_module(name)
    importlib.import_module(name)
    assert seen == [1]
    after_import(name, note)
    assert seen == [1]
    after_import(name, lambda module: seen.append("another"))
    assert "another" in seen
    seen.clear()
    importlib.reload(module)
    assert seen == [1, "another"]
    del sys.modules[name]
    importlib.import_module(name)
    assert seen == [1, "another"] * 2


def test_nobody_finds_a_trace_in_the_module(make: Make, seen: list[Any]) -> None:
    name = make("watched_b", "def f():\n    return 1\n")
    after_import(name, seen.append)
    found = importlib.util.find_spec(name)
    assert found is not None
    assert name not in sys.modules
    assert seen == []
    loader: Any = found.loader
    assert "return 1" in loader.get_source(name)  # whoever looks, and imports nothing
    assert loader.path.endswith("watched_b.py")
    assert copy.copy(loader).get_filename(name) == loader.path
    module = importlib.import_module(name)
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    assert "return 1" in inspect.getsource(module.f)


def test_submodules_and_packages(make: Make, seen: list[Any]) -> None:
    make("watched_c.__init__", "")
    make("watched_c.inner", "from watched_c import other\n")
    make("watched_c.other")
    after_import("watched_c.inner", lambda module: seen.append(sys.modules["watched_c.other"].value))
    import_watched = importlib.import_module("watched_c")
    assert seen == []
    importlib.import_module("watched_c.inner")
    assert seen == [1]
    assert import_watched.inner is sys.modules["watched_c.inner"]


def test_errors_of_an_action_are_logged_and_those_of_the_module_are_its_own(
    make: Make, seen: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(module: ModuleType) -> None:
        raise RuntimeError("no such registry")

    name, broken = make("watched_d"), make("watched_e", "raise KeyError('its own')\n")
    after_import(name, fail)
    after_import(name, seen.append)
    with caplog.at_level(logging.WARNING, home.__name__):
        assert importlib.import_module(name).value == 1
    assert "could not prepare watched_d" in caplog.text
    assert "no such registry" in caplog.text
    assert len(seen) == 1
    after_import(broken, seen.append)
    with pytest.raises(KeyError, match="its own"):
        importlib.import_module(broken)
    after_import("watched_missing", seen.append)
    with pytest.raises(ModuleNotFoundError, match="watched_missing"):
        importlib.import_module("watched_missing")
    assert len(seen) == 1


class Delegating(importlib.abc.MetaPathFinder):
    """A finder that asks all others, as hooks of other packages do, and hands on what they find."""

    def __init__(self) -> None:
        self.busy = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if self.busy:
            return None
        self.busy = True
        try:
            finders = [finder for finder in sys.meta_path if finder is not self]
            return next((spec for one in finders if (spec := one.find_spec(name, path, target))), None)
        finally:
            self.busy = False


@pytest.mark.parametrize("position", [0, 1])
def test_beside_finders_that_ask_all_others(make: Make, seen: list[Any], position: int) -> None:
    name = make(f"watched_f{position}")
    after_import(name, seen.append)
    sys.meta_path.insert(position, Delegating())
    module = importlib.import_module(name)
    assert seen == [module]


def test_past_a_finder_that_comes_first_it_catches_up_at_the_next_import(make: Make, seen: list[Any]) -> None:
    class First(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            return importlib.machinery.PathFinder.find_spec(name, path) if name == "watched_g" else None

    name, other = make("watched_g"), make("watched_h")
    after_import(name, seen.append)
    sys.meta_path.insert(0, First())
    module = importlib.import_module(name)
    assert seen == []
    importlib.import_module(other)
    assert seen == [module]


def test_asked_for_in_the_middle_of_the_modules_own_import(make: Make, seen: list[Any]) -> None:
    """Nothing is done to a module that is half there."""
    make(
        "watched_i",
        """
        from lightning_optim.after_import import after_import
        from watched_i_notes import seen
        after_import("watched_i", lambda module: seen.append(module.value))
        value = 1
        """.replace("\n        ", "\n"),
    )
    make("watched_i_notes", "seen = []\n")
    importlib.import_module("watched_i")
    importlib.import_module(make("watched_j"))
    assert sys.modules["watched_i_notes"].seen == [1]


class OldLoader:
    """Without the method that a loader has had since Python 3.4."""

    def load_module(self, name: str) -> ModuleType:
        module = sys.modules[name] = ModuleType(name)
        vars(module)["value"] = 2
        return module


class Odd(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "watched_k":
            return None
        return importlib.machinery.ModuleSpec(name, OldLoader())  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*exec_module.*:ImportWarning")
def test_loaders_of_an_old_kind_are_left_alone(make: Make, seen: list[Any]) -> None:
    sys.meta_path.insert(0, Odd())
    sys.meta_path.insert(0, object())  # type: ignore[arg-type]
    after_import("watched_k", seen.append)
    try:
        assert importlib.import_module("watched_k").value == 2
    except AttributeError:  # of Python itself, which no longer has a place for them, or for what is no finder
        return
    importlib.import_module(make("watched_l"))
    assert len(seen) == 1


def test_namespace_packages_and_builtins(make: Make, seen: list[Any]) -> None:
    make("watched_space.inner")
    after_import("watched_space", lambda module: seen.append(module.__name__))
    importlib.import_module("watched_space.inner")
    assert seen == ["watched_space"]
    after_import("builtins", lambda module: seen.append(module.__name__))
    assert seen[-1] == "builtins"
