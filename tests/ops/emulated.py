"""The GPU kernels on a CPU: compiled for the emulation of kernels/emulation.h, behind the same Python wrappers."""

import ctypes
import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import strategies as st

from etmamba_timm.ops.kernels import build_gpu, choice, load_gpu
from etmamba_timm.ops.kernels.build_cpu import COMPILERS
from etmamba_timm.ops.kernels.cache import digest, from_cache

HERE = Path(__file__).parent / "kernels"
COMPILER = next(filter(None, map(shutil.which, COMPILERS)), None)
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-DEMULATED", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused")

ORDERS = st.sampled_from(["0", "1", "2"])  # of threads: EMULATION_ORDER
needs_emulation = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux",
    reason="the emulation of the GPU kernels needs a C++ compiler on Linux",
)


class EmulatedModule:
    """Stands in for `load_gpu.Module`."""

    def __init__(self, source: str, defines: dict[str, int]) -> None:
        self.library = compile_emulated(source, defines)

    def config(self, kernel: str) -> tuple[int, ...]:
        size = ctypes.c_int.in_dll(self.library, f"{kernel}_config_size").value
        return tuple((ctypes.c_int * size).in_dll(self.library, f"{kernel}_config"))

    def launch(self, kernel: str, grid: Sequence[int], args: ctypes.Structure) -> None:
        getattr(self.library, kernel)(ctypes.byref(args), (ctypes.c_int * 3)(*grid))


def compile_emulated(source: str, defines: dict[str, int]) -> ctypes.CDLL:
    """In the cache folder, as the compiled kernels."""
    files = [build_gpu.SOURCES / source, *sorted(build_gpu.SOURCES.glob("*.h")), HERE / "emulation.h"]
    macros = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    key = digest(repr((FLAGS, macros, [file.read_bytes() for file in files])).encode())

    def build(folder: Path) -> Path:
        made = folder / "made.so"
        command = [COMPILER, *FLAGS, *macros, f"-I{HERE}", "-x", "c++", str(files[0]), "-o", str(made)]
        subprocess.run(command, check=True)
        return made

    return from_cache(f"emulated-{files[0].stem}-{key}", ".so", lambda path: ctypes.CDLL(str(path)), build)


@functools.cache
def _module(source: str, defines: tuple[tuple[str, int], ...]) -> EmulatedModule:
    return EmulatedModule(source, dict(defines))


def emulate(monkeypatch: pytest.MonkeyPatch, processors: int = 4) -> None:
    """Every operator on tensors of the CPU runs on the GPU kernels, emulated."""
    monkeypatch.setattr(load_gpu, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(load_gpu, "PLANS", {})
    monkeypatch.setattr(load_gpu, "module", lambda source, like, **defines: _module(source, tuple(defines.items())))
    monkeypatch.setattr(load_gpu, "processors", lambda device: processors)
    monkeypatch.setattr(choice, "gpu_why_not", lambda device: None)
