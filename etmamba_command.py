"""Starts the `etmamba` command, without importing PyTorch and timm for `etmamba --help`.

It is outside the package because `import etmamba_timm` registers the models with timm, and so imports both.
"""

import importlib.util
import os
import sys


def main() -> int:
    """Runs `etmamba_timm.cli.main`, which imports what the command needs, without running the package's `__init__`."""
    # Read when PyTorch is imported. By default OpenMP's threads wait for each other in busy loops, and take the cores
    # from the decoding processes: with both cores of a machine busy, training took three to four times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    spec = importlib.util.find_spec("etmamba_timm")
    assert spec is not None
    sys.modules["etmamba_timm"] = importlib.util.module_from_spec(spec)
    from etmamba_timm.cli import main

    return main()
