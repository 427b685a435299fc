"""``python -m lightning_optim`` is ``lightning-optim``."""

import sys

from lightning_optim.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
