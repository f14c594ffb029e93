"""Splits videos into those for training and for validation, and keeps the split as lists."""

import csv
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ..files import whole_file
from .annotations import AnnotationError, Annotations, from_rows, read_text

VAL_SHARE = 0.2


def split_videos(
    annotations: Annotations, seed: int = 0, source_of: Callable[[Path, str], str] | None = None
) -> tuple[Annotations, Annotations]:
    """Videos for training and for validation, drawn by the seed.

    Of each class a fifth is for validation, rounded up; of a class with one video, none.

    Args:
        annotations: the videos.
        seed: of the draw.
        source_of: what a video (its path and the name of its class) was cut from, such as a film. Videos of one source,
            of whatever class, stay together; then a class has fewer for validation where its sources are large.
    """
    classes = annotations.classes
    members: dict[object, list[int]] = {}
    for i, (path, label) in enumerate(annotations.samples):
        source = i if source_of is None else source_of(Path(str(path)), classes[label])
        members.setdefault(source, []).append(i)
    totals = Counter(label for _, label in annotations.samples)
    left = {label: min(math.ceil(VAL_SHARE * count), count - 1) for label, count in totals.items()}
    sources = list(members.values())
    random.Random(seed).shuffle(sources)
    val: set[int] = set()
    for videos in sources:
        wanted = Counter(annotations.samples[i][1] for i in videos)
        if all(count <= left[label] for label, count in wanted.items()):
            val.update(videos)
            for label, count in wanted.items():
                left[label] -= count
    kept = [sample for i, sample in enumerate(annotations.samples) if i not in val]
    return Annotations(kept, classes, annotations.missing), Annotations(
        [annotations.samples[i] for i in sorted(val)], classes, []
    )


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
