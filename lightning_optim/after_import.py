"""Calling a function with a module as soon as somebody imports it, without importing it.

An error of the function is logged, and does not fail the import. A reload of the module calls the function again.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]

_log = logging.getLogger(__name__)


def after_import(name: str, action: Action) -> None:
    """Call ``action`` with the module ``name``: now if it is imported already, and whenever it is imported later.

    Args:
        name: The module's full name.
        action: The function; it is called once each time the module is executed, however often it was registered.

    Example:
        >>> import colorsys
        >>> after_import("colorsys", lambda module: print("have", module.__name__))
        have colorsys
    """
    actions = _finder.actions.setdefault(name, [])
    if action not in actions:
        actions.append(action)
        _finder.done.pop(name, None)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.catch_up()


class _Finder:
    """A meta path finder that leaves finding to the others, and adds actions to the loaders that they find."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}
        self.done: dict[str, ModuleType] = {}
        self._asking = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        self.catch_up()
        asking: set[str] = self._asking.__dict__.setdefault("names", set())
        # A finder that asks all others, as this one does, comes back here.
        if name not in self.actions or name in asking:
            return None
        asking.add(name)
        try:
            finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            specs = (finder.find_spec(name, path, target) for finder in finders)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            asking.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec

    def catch_up(self) -> None:
        """Act on modules that bypassed this finder: imported before it was there, or by a finder in front of it."""
        for name in list(self.actions):
            module = sys.modules.get(name)
            if module is None or self.done.get(name) is module:
                continue
            if not getattr(getattr(module, "__spec__", None), "_initializing", False):
                self.act(name, module)

    def act(self, name: str, module: ModuleType) -> None:
        self.done[name] = module
        for action in list(self.actions[name]):
            try:
                action(module)
            except Exception:  # no error of ours may fail somebody else's import
                _log.warning("lightning-optim could not prepare %s", name, exc_info=True)


class _Loader:
    """A loader that calls the actions after loading. The module itself only ever sees the original loader."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        return None if create is None else create(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None  # noqa: S101
        spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.act(spec.name, module)

    def __getattr__(self, name: str) -> Any:
        """Other attributes of the original loader, for callers that inspect a spec and import nothing."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._loader, name)


_finder = _Finder()
