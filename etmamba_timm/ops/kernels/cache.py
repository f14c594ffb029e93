"""A folder for compiled code, which is made at first use. Nothing is written anywhere else.

A file is called `<name>-<key>-<digest><suffix>`. Name and key say what it was made from. The digest is that of the file
itself and shows damage. A file gets its name by a rename, once it is complete.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # Windows: processes that start together compile once each, and the last one's file stays
    fcntl = None  # type: ignore[assignment]

Loaded = TypeVar("Loaded")

SET_CACHE = "set ETMAMBA_CACHE to a folder that is"


class BuildError(RuntimeError):
    """The code can't be built or loaded. The message says what failed and what to do about it."""


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


def digest(data: bytes) -> str:
    """A short checksum."""
    return hashlib.sha256(data).hexdigest()[:32]


def from_cache(name: str, suffix: str, load: Callable[[Path], Loaded], build: Callable[[Path], Path]) -> Loaded:
    """What `load` makes of the file of this name, built if there is none that is undamaged and loads.

    Args:
        name: of the file, with a key that says what it is made from.
        suffix: of the file.
        load: raises OSError for a file that can't be used here.
        build: makes the file in the folder that it is given, and returns its path.

    Raises:
        BuildError: the folder can't be used.
        OSError: from `load`, for a newly built file.
    """
    folder = cache_dir()
    try:
        if (found := _find(folder, name, suffix, load)) is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if (found := _find(folder, name, suffix, load)) is not None:
                return found  # another process built it meanwhile
            path = _build(folder, name, suffix, build)
    except OSError as error:
        raise BuildError(f"{folder} can't hold compiled code: {error}; make it writable, or {SET_CACHE}") from error
    return load(path)


def _find(folder: Path, name: str, suffix: str, load: Callable[[Path], Loaded]) -> Loaded | None:
    """The first file of this name that is undamaged and loads.

    There are several if systems with different C++ runtimes share the folder: each builds one that it can load.
    """
    for path in sorted(folder.glob(f"{name}-*{suffix}")):
        with contextlib.suppress(OSError):
            # Checked first, since loading a truncated library can kill the process.
            if path.name == f"{name}-{digest(path.read_bytes())}{suffix}":
                return load(path)
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


def _build(folder: Path, name: str, suffix: str, build: Callable[[Path], Path]) -> Path:
    for leftover in folder.glob("build-*"):  # left by killed processes
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 24 * 3600:
                shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as work:
        made = build(Path(work))
        path = folder / f"{name}-{digest(made.read_bytes())}{suffix}"
        os.replace(made, path)
    return path
