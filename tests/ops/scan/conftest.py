"""mamba-ssm's Python over a stand-in for its compiled kernel, which needs no GPU."""

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import selective_scan_cuda_standin as standin

from etmamba_timm.ops.scan import mamba_ssm
from etmamba_timm.ops.scan.selective_scan import BACKENDS

VERSION = "2.3.2.post1"


def is_mamba(name: str) -> bool:
    return name.split(".")[0] in ("mamba_ssm", "selective_scan_cuda")


@pytest.fixture
def no_mamba() -> Iterator[None]:
    """Nothing of mamba-ssm is imported or probed; what was before comes back afterwards."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_mamba(name)}
    mamba_ssm._why_no_kernel.cache_clear()
    yield
    for name in list(sys.modules):
        if is_mamba(name):
            del sys.modules[name]
    sys.modules.update(before)
    mamba_ssm._why_no_kernel.cache_clear()


@pytest.fixture
def mamba(no_mamba, mamba_modules, monkeypatch) -> ModuleType:
    """mamba_ssm.ops.selective_scan_interface over the stand-in; the backend takes the CPU for its device."""
    sys.modules.update(mamba_modules)
    row = replace(mamba_ssm.BACKEND, devices=("cpu",), why_not=mamba_ssm._why_no_kernel)
    monkeypatch.setitem(BACKENDS, row.name, row)
    standin.calls.clear()
    return mamba_modules["mamba_ssm.ops.selective_scan_interface"]


@pytest.fixture(scope="session")
def mamba_modules(request) -> dict[str, ModuleType]:
    """What `import mamba_ssm.ops.selective_scan_interface` puts into sys.modules, over the stand-in.

    Left out is what the scan's module imports and the scan doesn't use: mamba_ssm/__init__.py, whose language models
    need transformers, and a layer norm that needs triton, which comes with PyTorch's CUDA builds alone.
    """
    init = find_mamba_ssm(request.config)
    spec = importlib.util.spec_from_file_location("mamba_ssm", init, submodule_search_locations=[str(init.parent)])
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_mamba(name)}
    sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)
    sys.modules["mamba_ssm.ops.triton.layer_norm"] = MagicMock()
    sys.modules["selective_scan_cuda"] = standin
    try:
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    finally:
        modules = {name: sys.modules.pop(name) for name in list(sys.modules) if is_mamba(name)}
        sys.modules.update(before)
    return modules


def find_mamba_ssm(config: pytest.Config) -> Path:
    """mamba_ssm/__init__.py of the installed package, or else of its Python installed into pytest's cache."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is not None:
        return Path(spec.origin)
    cache = config.cache.mkdir("mamba-ssm")
    if not (cache / VERSION).exists():
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-build-isolation", "--no-deps"]
            done = subprocess.run(
                [sys.executable, "-m", "pip", "install", *options, "--target", unfinished, f"mamba-ssm=={VERSION}"],
                env=os.environ | {"MAMBA_FORCE_BUILD": "TRUE", "MAMBA_SKIP_CUDA_BUILD": "TRUE"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                reason = f"mamba-ssm's Python can't be installed: {lines[-1] if lines else 'pip says nothing'}"
                (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
            Path(unfinished, "mamba_ssm").rename(cache / VERSION)
    return cache / VERSION / "__init__.py"
