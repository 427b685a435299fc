"""What a command does before it uses Lightning: it says what is missing, and silences what nobody can act on."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings

_ADVERTISEMENT = "💡 Tip:"


def can_use_lightning(command: str) -> bool:
    """Prepare for a command that takes LightningCLI's flags; say what is missing for it, if anything is."""
    missing = [name for name in ("lightning", "jsonargparse") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"lightning-optim {command} needs {' and '.join(missing)}: pip install 'lightning-optim[cli]'",
            file=sys.stderr,
        )
        return False
    # `--model my_project.Model` is looked up from the current folder, as under `python -m`: the console script's
    # own folder is what Python would put there.
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    quiet_lightning()
    return True


def quiet_lightning() -> None:
    """Drop Lightning's advertisements, and a deprecation warning about its own code.

    All else stays: whatever a user could change has a reason to be printed.
    """
    # Lightning 2.6 with torch 2.13: torch tells Lightning's authors to write `is_leaf()`.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated", module=r"lightning\.pytorch\..*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ADVERTISEMENT)
