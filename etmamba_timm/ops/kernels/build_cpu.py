"""Compiles C++ files at first use and keeps the shared library in a cache folder. Nothing is written anywhere else.

A library is called `<source>-<key>-<digest>.so`. The key is made from the sources, the flags and the processor. The
digest is that of the file itself and shows damage. A file gets its name by a rename, once it is complete.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: processes that start together compile once each, and the last one's library stays
    fcntl = None  # type: ignore[assignment]

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

_SET_CACHE = "set ETMAMBA_CACHE to a folder that is"
_SET_CXX = "install a C++ compiler such as g++ or clang++, or set CXX to one that works"


class BuildError(RuntimeError):
    """The library can't be built or loaded. The message says what failed and what to do about it."""


def cache_dir() -> Path:
    """The cache folder: $ETMAMBA_CACHE, else $XDG_CACHE_HOME/etmamba_timm, else ~/.cache/etmamba_timm.

    The same on every operating system, as in torch and huggingface_hub.
    """
    try:
        if chosen := os.environ.get("ETMAMBA_CACHE"):
            return Path(chosen).expanduser().absolute()
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # The XDG specification has relative paths ignored.
        return (base if base.is_absolute() else Path.home() / ".cache") / "etmamba_timm"
    except RuntimeError as error:  # there is no HOME, nor an entry in the password database
        raise BuildError(f"no cache folder for compiled code: {error}; set ETMAMBA_CACHE to one") from error


def load(*sources: Path) -> ctypes.CDLL:
    """The library compiled from C++ files and their headers, from the cache if possible. The first file names it.

    The files may only include each other and system headers. A cached library is loaded without a compiler and without
    starting a process, so its key holds only what is known without asking the compiler: source texts, flags and
    processor, but neither $CXX nor its version. Empty the cache to build with another compiler.

    Raises: BuildError.
    """
    texts = {source.name: source.read_bytes() for source in sources}
    key = _digest(repr((_SCHEME, FLAGS, OPTIONAL_FLAGS, _processor(), texts)).encode())
    name, folder = f"{sources[0].stem}-{key}", cache_dir()
    try:
        library = _cached(folder, name)
        if library is None:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / "lock"):
                library = _cached(folder, name)  # another process may have built it meanwhile
                if library is None:
                    library = _build(texts, folder, name)
        return library
    except OSError as error:
        raise BuildError(f"{folder} can't hold compiled code: {error}; make it writable, or {_SET_CACHE}") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _processor() -> str:
    """Identifies the processor that native code is compiled for, without starting a process."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux: the kernel's version names the chip on Apple's; the host's name keeps machines apart
        known = [platform.node(), platform.version()]
    else:
        known = sorted({line for line in lines if line.partition(":")[0].strip() in _CPUINFO})  # cores may differ
    return "\n".join([platform.system(), platform.machine(), *known])


def _cached(folder: Path, name: str) -> ctypes.CDLL | None:
    """The first library of this name that is undamaged and loads.

    There are several if systems with different C++ runtimes share the folder: each builds one that it can load.
    """
    for path in sorted(folder.glob(f"{name}-*.so")):
        with contextlib.suppress(OSError):
            # Checked first, since loading a truncated library can kill the process.
            if path.name == f"{name}-{_digest(path.read_bytes())}.so":
                return ctypes.CDLL(str(path))
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets in one process at a time, where the file system has locks. This only saves work; all is well without."""
    with path.open("w") as file, contextlib.ExitStack() as unlock:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel if the process is killed
                # Closing the file isn't enough if another thread forked meanwhile.
                unlock.callback(fcntl.flock, file, fcntl.LOCK_UN)
        yield


def _build(texts: dict[str, bytes], folder: Path, name: str) -> ctypes.CDLL:
    for leftover in folder.glob("build-*"):  # left by killed processes
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 24 * 3600:
                shutil.rmtree(leftover, ignore_errors=True)
    _logger.info("compiling the CPU kernels, once for this machine (about ten seconds)")
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as work:
        made = Path(work, "made.so")
        for source, text in texts.items():
            Path(work, source).write_bytes(text)  # exactly what the key was made from
        _compile([Path(work, source) for source in texts if source.endswith(".cpp")], made)
        path = folder / f"{name}-{_digest(made.read_bytes())}.so"
        os.replace(made, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"the library compiled from {', '.join(texts)} doesn't load: {error}; if {folder} forbids execution "
            f"(noexec), {_SET_CACHE} not so mounted, else set CXX to this system's own compiler"
        ) from error


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
