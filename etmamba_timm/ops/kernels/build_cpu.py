"""Compiles C++ files at first use and keeps the shared library in the cache folder."""

import ctypes
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from .cache import SET_CACHE, BuildError, cache_dir, digest, from_cache

_logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math: with GCC it also links code that changes how the whole process treats denormal numbers.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math")
# Tried in order: some compilers have another name for the native processor, or no OpenMP.
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
_SCHEME = 1  # increase it to rebuild libraries whose sources, flags and processor haven't changed
_CPUINFO = {  # the lines of /proc/cpuinfo that a native build depends on: x86, Arm, and the others
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),
    *("cpu", "isa", "features"),
}

_SET_CXX = "install a C++ compiler such as g++ or clang++, or set CXX to one that works"


def load(*sources: Path) -> ctypes.CDLL:
    """The library compiled from C++ files and their headers, from the cache if possible. The first file names it.

    The files may only include each other and system headers. A cached library is loaded without a compiler and without
    starting a process, so its key holds only what is known without asking the compiler: source texts, flags and
    processor, but neither $CXX nor its version. Empty the cache to build with another compiler.

    Raises: BuildError.
    """
    texts = {source.name: source.read_bytes() for source in sources}
    key = digest(repr((_SCHEME, FLAGS, OPTIONAL_FLAGS, _processor(), texts)).encode())

    def build(work: Path) -> Path:
        _logger.info("compiling the CPU kernels, about ten seconds; they are kept in %s for this machine", cache_dir())
        for source, text in texts.items():
            Path(work, source).write_bytes(text)  # exactly what the key was made from
        made = Path(work, "made.so")
        _compile([Path(work, source) for source in texts if source.endswith(".cpp")], made)
        return made

    try:
        return from_cache(f"{sources[0].stem}-{key}", ".so", lambda path: ctypes.CDLL(str(path)), build)
    except OSError as error:
        raise BuildError(
            f"the library compiled from {', '.join(texts)} doesn't load: {error}; if {cache_dir()} forbids execution "
            f"(noexec), {SET_CACHE} not so mounted, else set CXX to this system's own compiler"
        ) from error


def _processor() -> str:
    """Identifies the processor that native code is compiled for, without starting a process."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux: the kernel's version names the chip on Apple's; the host's name keeps machines apart
        known = [platform.node(), platform.version()]
    else:
        known = sorted({line for line in lines if line.partition(":")[0].strip() in _CPUINFO})  # cores may differ
    return "\n".join([platform.system(), platform.machine(), *known])


def _compile(sources: list[Path], made: Path) -> None:
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or [next(filter(None, map(shutil.which, COMPILERS)))]
    except StopIteration:
        raise BuildError(f"no C++ compiler found ({', '.join(COMPILERS)}); {_SET_CXX}") from None
    except ValueError as error:  # a quotation without its end
        raise BuildError(f"CXX={os.environ['CXX']} isn't a command: {error}; {_SET_CXX}") from error
    work = str(made.parent)  # the compiler's own temporary files go there as well
    env = {**os.environ, "LC_ALL": "C", "TMPDIR": work, "TMP": work, "TEMP": work}
    for optional in OPTIONAL_FLAGS:
        command = [*compiler, *FLAGS, *optional, *map(str, sources), "-o", str(made)]
        try:
            done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True)
        except OSError as error:
            raise BuildError(f"the C++ compiler {shlex.join(compiler)} doesn't run: {error}; {_SET_CXX}") from error
        if done.returncode == 0:
            return
    said = (done.stderr + done.stdout).decode(errors="replace").replace(work + os.sep, "").strip().splitlines()
    first = [*(line for line in said if "error:" in line or "ld: " in line), *said, "no message"][0]  # ld: the linker
    raise BuildError(f"{shlex.join(compiler)} failed (exit status {done.returncode}): {first}; {_SET_CXX}")
