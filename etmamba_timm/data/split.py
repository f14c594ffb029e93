"""Splits one folder of classes into training and validation videos, and keeps the split as lists."""

import csv
import math
import random
from pathlib import Path

from ..files import whole_file
from .annotations import AnnotationError, Annotations, from_rows, read_text

VAL_SHARE = 0.2


def split_videos(annotations: Annotations, seed: int = 0) -> tuple[Annotations, Annotations]:
    """Videos for training and for validation, drawn by the seed.

    Of each class a fifth is for validation, rounded up; of a class with one video, none.
    """
    train: list[int] = []
    val: list[int] = []
    draw = random.Random(seed)
    for label in range(len(annotations.classes)):
        own = [i for i, (_, other) in enumerate(annotations.samples) if other == label]
        count = min(math.ceil(VAL_SHARE * len(own)), max(len(own) - 1, 0))
        chosen = set(draw.sample(own, count))
        val += sorted(chosen)
        train += [i for i in own if i not in chosen]
    parts = ([annotations.samples[i] for i in indices] for indices in (train, val))
    return tuple(Annotations(samples, annotations.classes, []) for samples in parts)  # type: ignore[return-value]


def write_split(folder: Path, root: Path, train: Annotations, val: Annotations) -> None:
    """Writes `train.csv` and `val.csv` into `folder`: lists of videos below `root`, for the layout 'list'."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("val", val)):
        with whole_file(folder / f"{name}.csv") as draft, draft.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("video", "label"))
            for path, label in part.samples:
                table.writerow((Path(str(path)).relative_to(root).as_posix(), part.classes[label]))


def read_split(folder: Path, root: Path, classes: list[str]) -> tuple[Annotations, Annotations]:
    """Reads what `write_split` wrote.

    Raises:
        AnnotationError: a list is missing or can't be read, or most of its videos are missing.
    """
    parts = []
    for name in ("train", "val"):
        file = folder / f"{name}.csv"
        rows = [row for row in csv.reader(read_text(file).splitlines()) if row][1:]
        if bad := next((row for row in rows if len(row) != 2), None):
            raise AnnotationError(f"{file}: {','.join(bad)!r} isn't video,label; start a run in another folder")
        parts.append(from_rows([tuple(row) for row in rows], classes, lambda video: root / video, file))
    train, val = parts
    return train, val
