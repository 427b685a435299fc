"""Silence for lines of Lightning's that a user of the command cannot act on."""

from __future__ import annotations

import logging
import warnings

_ADVERTISEMENT = "💡 Tip:"


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
