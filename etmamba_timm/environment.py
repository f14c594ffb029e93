"""What a bug report needs: versions, devices, backends and settings. It also works where PyTorch doesn't."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .version import __version__
from .words import number_of

# Prefixes of variables, and of the processor's features, that change what we or PyTorch do.
VARIABLES = ("ETMAMBA", "OMP_", "MKL_", "MALLOC_", "CUDA_", "PYTORCH", "TORCH", "NVIDIA_", "HF_", "ACCELERATE_", "CXX")
FEATURES = ("fma", "avx", "amx", "asimd", "sve", "bf16", "fphp")
DEVELOPMENT = ("test", "docs", "examples")  # extras that users don't need
SECRET = re.compile("TOKEN|SECRET|KEY|PASSWORD")


def environment() -> dict[str, str]:
    """Names and values, in order, for a bug report; home folders are written ~, and tokens are left out."""
    rows = {
        "etmamba_timm": f"{__version__}, from {Path(__file__).parent}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "system": platform.platform(),
        "processor": _processor(),
        **dict(_torch()),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "packages": _packages(),
    }
    for name, value in sorted(os.environ.items()):
        if name.startswith(VARIABLES):
            rows[f"${name}"] = "(set)" if SECRET.search(name) else re.sub("//[^/@]*@", "//", value)
    return {name: _without_home(value) for name, value in rows.items()}


def _torch() -> Iterator[tuple[str, str]]:
    """PyTorch, its devices, and our kernels on them."""
    try:
        import torch

        from .ops import scan_backends
        from .ops.kernels.build_cpu import COMPILERS
        from .ops.kernels.cache import cache_dir
    except Exception as error:  # a broken installation, of whatever kind, is to be reported too
        yield "torch", f"can't be imported: {type(error).__name__}: {error}"
        return
    yield (
        "torch",
        f"{torch.__version__}, CUDA {torch.version.cuda or 'no'}, {number_of(torch.get_num_threads(), 'thread')}",
    )
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        memory = device.total_memory / 2**30
        yield f"cuda:{i}", f"{device.name}, compute capability {device.major}.{device.minor}, {memory:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "mps", "available"
    for name, reason in scan_backends().items():
        yield f"scan {name}", reason or "ready"
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), "none")
    yield "C++ compiler", f"{compiler}, {_first_line(*compiler.split(), '--version')}"
    try:
        folder = cache_dir()
        yield "kernels' cache", f"{folder}, {number_of(len(list(folder.glob('*.*'))), 'file')}"
    except (RuntimeError, OSError) as error:
        yield "kernels' cache", str(error)


def _processor() -> str:
    """Name, number of cores, and the features that kernels depend on, as Linux tells them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name, features = platform.processor() or platform.machine(), ""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return f"{name}, {number_of(usable, 'core')}"
    if found := re.search(r"^model name\s*: (.*)", text, re.MULTILINE):
        name = found[1]
    if found := re.search(r"^(?:flags|Features)\s*: (.*)", text, re.MULTILINE):
        features = ": " + " ".join(flag for flag in found[1].split() if flag.startswith(FEATURES))
    return f"{name}, {number_of(usable, 'core')}{features}"


def _packages() -> str:
    """The packages that ours requires or can use, by its metadata, with their versions."""
    try:
        requires = metadata.requires("etmamba-timm") or []
    except metadata.PackageNotFoundError:
        return "etmamba-timm isn't installed; it runs from its folder"
    versions = {}
    for requirement in requires:
        extra = re.search(r"extra == ['\"](\w+)", requirement)
        if extra and extra[1] in DEVELOPMENT:
            continue
        name = re.split(r"[^\w.-]", requirement)[0]
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "no"
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return f"unknown ({command[0]} doesn't run)"
    return (done.stdout + done.stderr).strip().partition("\n")[0]


def _without_home(text: str) -> str:
    try:
        home = str(Path.home())
    except RuntimeError:
        return text
    return re.sub(re.escape(home) + r"(?=\W|$)", "~", text) if len(home) > 1 else text
