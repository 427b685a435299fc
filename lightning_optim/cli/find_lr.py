"""``lightning-optim find-lr``: a range test of the training that the flags and files of ``fit`` describe."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_optim.control.lr_finder.suggestions import METHODS
from lightning_optim.control.lr_finder.sweep import MODES

_DESCRIPTION = """\
Find a learning rate for a training by a range test: the learning rate rises from step to step, and the curve of the
losses suggests one. Nothing is trained or saved.

All other arguments are those of `lightning-optim fit`: --config FILE, --model CLASS, --optimizer NAME, ...
"""

_EPILOG = """\
exit codes: 0; 1 if the curve suggests nothing, with the reason; 2 for arguments that are not valid.

  lightning-optim find-lr --config config.yaml --write lr.yaml
  lightning-optim fit --config config.yaml --config lr.yaml
"""


def main(arguments: Sequence[str] = ()) -> int:
    """Print what is suggested; ``--json`` for programs.

    Returns:
        0; 1 if no learning rate is suggested, or Lightning is missing; 2 for arguments that are not valid.
    """
    parser = _parser()
    options, training = parser.parse_known_args(list(arguments))
    from lightning_optim.cli.with_lightning import can_use_lightning

    if not can_use_lightning("find-lr"):
        return 1
    if not training:
        parser.error("what is to be trained? --config FILE or --model CLASS as for `fit`")
    from lightning_optim.cli.faults import in_words, is_of_the_user
    from lightning_optim.cli.found import FindLRCLI

    try:
        cli = FindLRCLI.tested(training, options)
    except Exception as error:
        if not is_of_the_user(error):
            raise
        parser.error(in_words(error))
    test = cli.finder.test
    assert test is not None  # noqa: S101 # the fit has ended by it
    if not cli.trainer.is_global_zero:
        return 0
    print(json.dumps(test.as_dict(), indent=2) if options.json else test.table())
    files = [] if options.folder is None else test.save(options.folder)
    if options.write is not None and test.suggestion is not None:
        options.write.write_text(cli.overlay())
        files.append(options.write)
    for file in files:
        print(f"wrote {file}", file=sys.stderr)
    return 0 if test.suggestion is not None else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-optim find-lr",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # other flags are the training's
    )
    parser.add_argument("--min_lr", type=float, default=1e-7, help="the first learning rate (1e-7)")
    parser.add_argument("--max_lr", type=float, default=10.0, help="the last learning rate (10)")
    parser.add_argument("--steps", type=int, default=100, help="how many optimizer steps are made (100)")
    parser.add_argument("--mode", choices=MODES, default=MODES[0], help="how the learning rates are spaced")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="whose suggestion is taken")
    parser.add_argument("--folder", type=Path, help="write lr_finder.json and the picture lr_finder.png there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a YAML file for a second --config of `fit`")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
