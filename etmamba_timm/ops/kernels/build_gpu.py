"""Compiles the CUDA C++ of gpu/ with NVRTC at first use and keeps the machine code in the cache folder.

NVRTC is a library: neither nvcc nor the toolkit's headers are needed, nor a device. It comes with PyTorch for CUDA.
NVIDIA's Python bindings for it, cuda.bindings, come with PyTorch's Linux wheels from 2.11 on.
"""

import functools
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .cache import BuildError, cache_dir, digest, from_cache

_logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("gpu")
FLAGS = ("--std=c++17", "--device-as-default-execution-space")
_SCHEME = 1  # increase it to rebuild code whose source and flags haven't changed


@functools.cache
def _nvrtc() -> ModuleType | BuildError:
    major = (torch.version.cuda or "13").partition(".")[0]  # cuda.bindings N loads NVRTC N
    try:
        from cuda.bindings import nvrtc

        _check(nvrtc.nvrtcVersion())
        return nvrtc
    except ModuleNotFoundError as error:
        return BuildError(
            f"cuda.bindings, which calls NVIDIA's compiler NVRTC, isn't installed ({error}); "
            f"pip install 'cuda-bindings=={major}.*' installs it"
        )
    except (ImportError, OSError, RuntimeError) as error:  # the bindings are there, the library isn't
        nvrtc_wheel = "nvidia-cuda-nvrtc-cu12" if major == "12" else f"'nvidia-cuda-nvrtc=={major}.*'"
        return BuildError(
            f"NVIDIA's compiler NVRTC doesn't load ({str(error).splitlines()[0]}); pip install {nvrtc_wheel} "
            f"'cuda-bindings=={major}.*' installs it for this PyTorch"
        )


def why_not() -> str | None:
    """None if NVRTC loads; else the reason and the remedy."""
    found = _nvrtc()
    return str(found) if isinstance(found, BuildError) else None


def compile_gpu(source: str, defines: dict[str, int], capability: tuple[int, int]) -> bytes:
    """The machine code of a file in gpu/ for devices of a compute capability, from the cache if possible.

    For a device newer than NVRTC it is PTX for the newest that NVRTC knows, which the driver translates.

    Args:
        source: the file's name; it may include the headers in the folder.
        defines: values of its macros.
        capability: as (9, 0).

    Raises: BuildError.
    """
    nvrtc = _nvrtc()
    if isinstance(nvrtc, BuildError):
        raise nvrtc
    wanted, known = 10 * capability[0] + capability[1], _check(nvrtc.nvrtcGetSupportedArchs())
    arch = f"sm_{wanted}" if wanted in known else f"compute_{max(n for n in known if n <= wanted)}"
    texts = {path.name: path.read_bytes() for path in (SOURCES / source, *sorted(SOURCES.glob("*.h")))}
    macros = (f"--define-macro={name}={value}" for name, value in sorted(defines.items()))
    flags = (*FLAGS, *macros, f"--gpu-architecture={arch}")
    key = digest(repr((_SCHEME, _check(nvrtc.nvrtcVersion()), flags, texts)).encode())

    def build(folder: Path) -> Path:
        _announce(cache_dir())
        made = folder / "made"
        made.write_bytes(translate(texts, flags)[0])
        return made

    try:
        return from_cache(f"{Path(source).stem}-{arch}-{key}", ".cubin", Path.read_bytes, build)
    except BuildError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        # It is a matter of a second: without a folder to keep the code in, each process compiles for itself.
        _logger.warning("compiled GPU kernels aren't kept: %s", error)
        return translate(texts, flags)[0]


@functools.cache
def _announce(folder: Path) -> None:
    _logger.info("compiling GPU kernels, about a second each; they are kept in %s for this kind of device", folder)


def translate(texts: dict[str, bytes], flags: tuple[str, ...]) -> tuple[bytes, str]:
    """The machine code (or PTX, for a virtual architecture) of the first text, and the compiler's log.

    The other texts are what it may include, by name.

    Raises: BuildError.
    """
    nvrtc = _nvrtc()
    if isinstance(nvrtc, BuildError):
        raise nvrtc
    source, *headers = texts
    _logger.debug("compiling %s", source)
    included = [texts[name] for name in headers]
    names = [name.encode() for name in headers]
    program = _check(nvrtc.nvrtcCreateProgram(texts[source], source.encode(), len(names), included, names))
    try:
        options = [flag.encode() for flag in flags]
        [status] = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _buffer(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        said = log.decode(errors="replace").strip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            first = next((line for line in said.splitlines() if "error" in line), said or status.name)
            raise BuildError(f"NVRTC can't compile {source}: {first}")
        virtual = any(flag.startswith("--gpu-architecture=compute") for flag in flags)
        size = _check((nvrtc.nvrtcGetPTXSize if virtual else nvrtc.nvrtcGetCUBINSize)(program))
        made = _buffer(size)
        _check((nvrtc.nvrtcGetPTX if virtual else nvrtc.nvrtcGetCUBIN)(program, made))
        return made[:size], said
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _buffer(size: int) -> bytes:
    """Bytes for NVRTC to write to. One more than asked for: Python has only one object for each single byte."""
    return bytes(size + 1)


def _check(returned: tuple[Any, ...]) -> Any:
    """The values of a call of NVRTC, whose first is its status."""
    status, *values = returned
    if status.value != 0:
        raise RuntimeError(f"NVRTC says {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
