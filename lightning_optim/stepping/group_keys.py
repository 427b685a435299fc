"""Which keys a param group may have besides its optimizer's options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_optim.stepping.ascent import ADAPTIVE, RHO
from lightning_optim.stepping.options import KNOWN_STRANGERS, TORCH_SWITCHES, known_options

#: Names of options in other libraries. Under these names they would silently be ignored.
SYNONYMS = {
    "learning_rate": "lr",
    "epsilon": "eps",
    "weight_decay_rate": "weight_decay",
    "adjust_lr_fn": "adjust_lr",
}


def check_switches(optimizer: str, switches: Mapping[str, Any]) -> None:
    """Check torch's switches, which callers of torch's classes may pass: None and False ask for nothing.

    Raises:
        ValueError: A switch is on; the message says what to use instead.
        TypeError: A switch is neither None nor a bool.

    >>> check_switches("AdamW", {"fused": False, "foreach": None})
    """
    for name, value in switches.items():
        if value is None or value is False:
            continue
        valid = f"valid: None, False, and in its place {TORCH_SWITCHES[name]}"
        if value is True:
            raise ValueError(f"{optimizer}: {name}=True is not an option, but one of torch's own ways to step; {valid}")
        raise TypeError(f"{optimizer}: {name}={value!r} is neither None nor a bool; {valid}")


def check_keys(
    optimizer: str, group: Mapping[Any, Any], defaults: Iterable[str], constructor: Mapping[str, Any]
) -> None:
    """Check that no key of a group is an option that would be ignored.

    Unknown keys are kept, as in ``torch.optim``: wrappers and trainers store values of their own in the groups
    (``rho``, ``lr_scale``, ``layer_id``). An error is a misspelled option, an option of another optimizer, or an option
    of the constructor whose value is not the constructor's.

    Args:
        optimizer: The optimizer's name, for messages.
        group: The group.
        defaults: The options that groups may set.
        constructor: The constructor's other options, with their values.

    Raises:
        ValueError: Such a key; the message says what is valid.
        TypeError: A key that is no string.
    """
    defaults = list(defaults)
    valid = f"valid: {', '.join(sorted(defaults))}, and keys of your own that resemble none of them"
    others = known_options()
    for key, value in group.items():
        if not isinstance(key, str):
            raise TypeError(f"{optimizer}: a param group has the key {key!r}, a {type(key).__name__}; valid: strings")
        if key in defaults:
            continue
        if key in TORCH_SWITCHES:
            check_switches(optimizer, {key: value})
            continue
        if key in constructor:
            if _equal(value, constructor[key]):
                continue
            wrong = "not an option"
            more = f". The constructor has one for all groups: {key}={constructor[key]!r}"
        elif key in others:
            wrong, more = f"not an option of {optimizer}", ""
        elif meant := near_miss(key, [*defaults, RHO, ADAPTIVE]):
            wrong, more = f"not an option (did you mean {meant!r}?)", ""
        else:
            continue
        raise ValueError(f"{optimizer}: {key}={value!r} in a param group is {wrong}; {valid}{more}")


def near_miss(key: str, options: Iterable[str]) -> str | None:
    """The option that a key misspells, or is a synonym of; None if there is none.

    A misspelling differs in capitals or separators only, or by one stroke for every five letters (a letter added,
    missing or replaced, or two exchanged), and is at most one letter longer or shorter: a longer key means something
    else (``lr_scale``, ``no_weight_decay``).

    >>> [near_miss(key, ["lr", "weight_decay"]) for key in ("weight_deacy", "Lr", "lr_scale", "learning_rate")]
    ['weight_decay', 'lr', None, 'lr']
    """
    if key in KNOWN_STRANGERS:
        return None
    options = list(options)
    if SYNONYMS.get(key.lower()) in options:
        return SYNONYMS[key.lower()]
    bare = _bare(key)
    for option in options:
        other = _bare(option)
        exchanged = sorted(bare) == sorted(other)
        allowed = max(max(len(bare), len(other)) // 5, int(exchanged))
        if abs(len(bare) - len(other)) <= 1 and _strokes(bare, other) <= allowed:
            return option
    return None


def _bare(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _strokes(a: str, b: str) -> int:
    """The fewest strokes that turn one word into another: letters added, left out, replaced, or two exchanged."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, TypeError, ValueError):  # tensors and arrays of several elements
        return False
