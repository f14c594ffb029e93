"""Files that are written whole or not at all, where it is known before the work that they can be."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_file(path: str | Path, suffixes: tuple[str, ...] = (), what: str = "files") -> None:
    """Raises ValueError if `path` can't be written: to be called before the work.

    Args:
        path: a file that is there or not.
        suffixes: those that its name may have; none for any.
        what: is written, in the plural, for the message.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        choice = " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
        raise ValueError(f"{path}: {what} are written as {choice}; give a name that ends so")
    target = path.resolve()
    if not target.parent.is_dir():
        parent = target.parent if path.is_symlink() else path.parent
        raise ValueError(f"{parent}: no such folder; make it first")
    if target.is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it")
    if target.exists() and not target.is_file():  # a device, which would be replaced
        raise ValueError(f"{path}: is no regular file; name one")
    try:
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".etmamba-").cleanup()
    except OSError as error:
        raise ValueError(f"{path}: can't be written ({error.strerror}); choose another folder") from error


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A draft beside `path`, of the same name, that takes its place when the block ends without an error."""
    path = Path(path).resolve()  # writes through a link
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".etmamba-") as folder:
        draft = Path(folder) / path.name
        yield draft
        os.replace(draft, path)
