"""`python -m etmamba_timm`: the `etmamba` command, for launchers that run modules (`accelerate launch -m`)."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
