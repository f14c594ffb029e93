"""Starts the `etmamba` command, without importing PyTorch and timm for `etmamba --help`.

It is outside the package because `import etmamba_timm` registers the models with timm, and so imports both.
"""

import importlib.util
import sys


def main() -> int:
    """Runs `etmamba_timm.cli.main`, which imports what the command needs, without running the package's `__init__`."""
    spec = importlib.util.find_spec("etmamba_timm")
    assert spec is not None
    sys.modules["etmamba_timm"] = importlib.util.module_from_spec(spec)
    from etmamba_timm.cli import main

    return main()
