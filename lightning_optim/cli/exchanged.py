"""Reports which options a class keeps when it replaces the class of a configuration file.

``--config file.yaml --optimizer Lion`` keeps those options of the file's AdamW that Lion has, too, as in every
LightningCLI. This is convenient for a weight decay, but rarely for a learning rate, so users are told of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def exchanges(files: Iterable[Any], chosen: Mapping[str, Any]) -> list[str]:
    """A line for each class that has replaced the class of a file.

    Args:
        files: The configurations that were read, in their order.
        chosen: For each option (``"optimizer"``), the class path and arguments after parsing, or None.

    >>> file = {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.003, "eps": 1e-8}}}
    >>> print(*exchanges([file], {"optimizer": {"class_path": "Lion", "init_args": {"lr": 0.003}}}))
    --optimizer Lion in place of the file's AdamW: keeps lr=0.003; drops eps=1e-08
    """
    lines = []
    for option, now in chosen.items():
        given = [spec for file in files for spec in _specs(file, option)]
        others = [spec for spec in given if now is not None and spec["class_path"] != now["class_path"]]
        if now is None or not others:
            continue
        old, before, after = others[-1]["class_path"], others[-1].get("init_args") or {}, now.get("init_args") or {}
        keeps = _listed({key: value for key, value in before.items() if key in after and _same(value, after[key])})
        drops = _listed({key: value for key, value in before.items() if key not in after})
        said = "; ".join([*([f"keeps {keeps}"] if keeps else []), *([f"drops {drops}"] if drops else [])])
        if said:
            lines.append(f"--{option} {now['class_path']} in place of the file's {old}: {said}")
    return lines


def _specs(file: Any, option: str) -> list[Any]:
    """The values of an option in a file, at its top and within the sections of commands."""
    if not isinstance(file, Mapping):
        return []
    sections = [file, *(section for section in file.values() if isinstance(section, Mapping))]
    found = [section[option] for section in sections if option in section]
    return [spec for spec in found if isinstance(spec, Mapping) and "class_path" in spec]


def _same(value: Any, other: Any) -> bool:
    as_lists = [list(one) if isinstance(one, tuple) else one for one in (value, other)]
    return bool(as_lists[0] == as_lists[1])


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())
