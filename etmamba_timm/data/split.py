"""Splits videos into those for training and for validation, and keeps the split as lists."""

import csv
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ..files import whole_file
from .annotations import AnnotationError, Annotations, each, from_rows, read_text

VAL_SHARE = 0.2
SEPARATOR = ";"  # of a video's labels


def split_videos(
    annotations: Annotations, seed: int = 0, source_of: Callable[[Path, str], str] | None = None
) -> tuple[Annotations, Annotations]:
    """Videos for training and for validation, drawn by the seed.

    Of each class a fifth is for validation, rounded up; of a class with one video, none. A video with several labels
    counts as one of the rarest of them.

    Args:
        annotations: the videos.
        seed: of the draw.
        source_of: what a video (its path and the name of its class) was cut from, such as a film. Videos of one source,
            of whatever class, stay together; then a class has fewer for validation where its sources are large.
    """
    classes, labels = annotations.classes, annotations.rarest_labels()
    members: dict[object, list[int]] = {}
    for i, (path, _) in enumerate(annotations.samples):
        source = i if source_of is None else source_of(Path(str(path)), classes[labels[i]])
        members.setdefault(source, []).append(i)
    totals = Counter(labels)
    left = {label: min(math.ceil(VAL_SHARE * count), count - 1) for label, count in totals.items()}
    sources = list(members.values())
    random.Random(seed).shuffle(sources)
    val: set[int] = set()
    for videos in sources:
        wanted = Counter(labels[i] for i in videos)
        if all(count <= left[label] for label, count in wanted.items()):
            val.update(videos)
            for label, count in wanted.items():
                left[label] -= count
    kept = [sample for i, sample in enumerate(annotations.samples) if i not in val]
    return Annotations(kept, classes, annotations.missing), Annotations(
        [annotations.samples[i] for i in sorted(val)], classes, []
    )


def write_split(folder: Path, root: Path, train: Annotations, val: Annotations) -> None:
    """Writes `train.csv` and `val.csv` into `folder`: lists of videos below `root`, for the layout 'list'.

    Their header is `video,labels` if videos have several labels, which are then separated by `;`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("val", val)):
        with whole_file(folder / f"{name}.csv") as draft, draft.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("video", "labels" if train.is_multilabel else "label"))
            for video, label in part.samples:
                path = Path(str(video))
                path = path.relative_to(root) if path.is_relative_to(root) else path  # a list may have absolute ones
                table.writerow((path.as_posix(), SEPARATOR.join(part.classes[i] for i in each(label))))


def read_split(folder: Path, root: Path, classes: list[str]) -> tuple[Annotations, Annotations]:
    """Reads what `write_split` wrote.

    Raises:
        AnnotationError: a list is missing or can't be read, or most of its videos are missing.
    """
    parts = []
    for name in ("train", "val"):
        file = folder / f"{name}.csv"
        header, *rows = [row for row in csv.reader(read_text(file).splitlines()) if row] or [[]]
        if bad := next((row for row in rows if len(row) != 2), None):
            raise AnnotationError(f"{file}: {','.join(bad)!r} isn't video,label; start a run in another folder")
        several = header[1:] == ["labels"]
        named = [(video, tuple(filter(None, label.split(SEPARATOR))) if several else label) for video, label in rows]
        parts.append(from_rows(named, classes, lambda video: root / video, file))
    train, val = parts
    return train, val
