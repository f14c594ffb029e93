"""Small trees of files for the tests of datasets."""

from pathlib import Path


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def found(annotations, root: Path) -> list[tuple[str, str]]:
    """(path below root, class name) of each sample."""
    return [(path.relative_to(root).as_posix(), annotations.classes[label]) for path, label in annotations.samples]
