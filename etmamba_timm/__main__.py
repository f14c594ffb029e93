"""`python -m etmamba_timm` is the `etmamba` command, for launchers that start modules: `accelerate launch -m`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
