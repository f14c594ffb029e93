"""Writing files completely or not at all, and checking early that they can be written."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_file(path: str | Path, suffixes: tuple[str, ...] = (), what: str = "files") -> None:
    """Checks that `path` can be written. Call it before a long computation.

    Args:
        path: a file that may or may not exist.
        suffixes: allowed suffixes; empty for any.
        what: a plural noun for the contents, used in the message.

    Raises:
        ValueError: `path` can't be written, or has another suffix.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        choice = " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
        raise ValueError(f"{path}: {what} are written as {choice}; change the suffix")
    target = path.resolve()
    if not target.parent.is_dir():
        parent = target.parent if path.is_symlink() else path.parent
        raise ValueError(f"{parent}: no such folder; create it first")
    if target.is_dir():
        raise ValueError(f"{path}: is a folder; give a file name")
    if target.exists() and not target.is_file():  # such as a device, which would be replaced
        raise ValueError(f"{path}: not a regular file; give another path")
    try:
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".etmamba-").cleanup()
    except OSError as error:
        raise ValueError(f"{path}: can't be written ({error.strerror}); choose another folder") from error


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path of the same name, which replaces `path` if the block ends without an error."""
    path = Path(path).resolve()  # replaces a link's target, not the link
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".etmamba-") as folder:
        draft = Path(folder) / path.name
        yield draft
        os.replace(draft, path)
