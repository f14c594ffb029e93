"""Which videos a dataset holds and what they show, read from its official files. Nothing is decoded here."""

import csv
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .embedded import VideoFile

_logger = logging.getLogger(__name__)

SUFFIXES = (
    *(".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg"),
    *(".wmv", ".flv", ".3gp", ".ts", ".mts", ".ogv"),
)
MOST_CLASSES = 100_000  # of numbered ones; a larger label is no label
MOST_MISSING = 0.5  # share of a list's videos that may be missing before it is an error
BREAKFAST = (
    *("cereals", "coffee", "friedegg", "juice", "milk"),
    *("pancake", "salat", "sandwich", "scrambledegg", "tea"),
)
BREAKFAST_TEST = {1: (3, 15), 2: (16, 28), 3: (29, 41), 4: (42, 54)}  # participants, first and last
HMDB51_SPLITS = {"train": "1", "test": "2"}


class AnnotationError(ValueError):
    """A dataset's files aren't what they should be. The message says which, and what was wanted."""


@dataclass(frozen=True)
class Annotations:
    """A dataset's videos.

    Attributes:
        samples: (file, class index) of each video that is there; a file is what `VideoReader` takes.
        classes: names of the classes.
        missing: files, or names of files, that were listed but aren't there.
    """

    samples: list[tuple[VideoFile, int]]
    classes: list[str]
    missing: list[str]


def read_folders(root: str | Path, classes: list[str] | None = None) -> Annotations:
    """`root/<class>/**/<video>`; classes are the folders' names in alphabetical order, or those given.

    Links are followed. What is hidden, by a name that begins with a dot, is left out: other programs' files.
    """
    root = _folder(root)
    names = classes or class_folders(root)
    samples = [(path, index) for index, name in enumerate(names) for path in video_files(root / name)]
    if not samples:
        raise AnnotationError(f"{root} holds no videos in folders of classes; wanted {root}/<class>/<video>.mp4")
    held = {index for _, index in samples}
    if empty := [name for index, name in enumerate(names) if index not in held]:
        _logger.warning(
            "%s: no videos (%s) in %d of %d classes, first %s",
            *(root, ", ".join(SUFFIXES), len(empty), len(names), empty[0]),
        )
    return Annotations(samples, list(names), [])


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root` that aren't hidden, in alphabetical order."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def video_files(root: Path) -> list[Path]:
    """Videos in any folders below `root`, in alphabetical order; links are followed, what is hidden is left out."""
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        videos = (name for name in names if not name.startswith(".") and name.lower().endswith(SUFFIXES))
        found += [Path(folder, name) for name in videos]
    return sorted(found)


def read_list(path: str | Path, root: str | Path | None = None, classes: list[str] | None = None) -> Annotations:
    """A file of lines `video label`, separated by a comma, a tab or the last space; `#` begins a comment line.

    Labels are class indices, or names where they aren't all whole numbers. A header is skipped: a first line whose
    label is 'label', or alone no whole number. Relative paths start at `root`, by default the list's own folder.
    """
    path = Path(path)
    root = _folder(root or path.parent)
    return from_rows(list_rows(path), classes, lambda video: root / video, path)


def list_rows(path: Path) -> list[tuple[str, str]]:
    """(video, label) of each line.

    Raises:
        AnnotationError: a line without a label, or labels most of which are numbers, and not all.
    """
    lines = [(i, line.strip()) for i, line in enumerate(_text(path).splitlines(), 1)]
    lines = [(i, line) for i, line in lines if line and not line.startswith("#")]
    separator = next((s for s in (",", "\t") if 2 * sum(s in line for _, line in lines) > len(lines)), " ")
    rows = []
    for number, line in lines:
        if separator == " ":
            video, _, label = (field.strip().strip('"') for field in line.rpartition(separator))
        else:  # names with commas stand in quotes
            *parts, label = (field.strip() for field in next(csv.reader([line], delimiter=separator)))
            video = separator.join(parts)
        if not video or not label:
            raise AnnotationError(
                f"{path}, line {number}: {line!r} has no label; wanted `video label` or `video,label`"
            )
        rows.append((number, video, label))
    names = [row for row in rows if not row[2].isdecimal()]
    if names and names[0] is rows[0]:
        title = names[0][2]
        if title.lower() == "label" or (len(names) == 1 < len(rows) and not title.lstrip("-").isdecimal()):
            rows, names = rows[1:], names[1:]  # a header
    if names and 2 * len(names) < len(rows):
        number, _, label = names[0]
        raise AnnotationError(f"{path}, line {number}: the label {label!r} is no whole number, as most others are")
    return [(video, label) for _, video, label in rows]


def read_kinetics(csv_file: str | Path, root: str | Path, classes: list[str] | None = None) -> Annotations:
    """Kinetics' csv: columns label, youtube_id, time_start, time_end; videos `<id>_<start>_<end>.mp4` below `root`.

    Times have six digits in the names, as the official downloader writes them; `<id>.mp4` is taken as well. Classes are
    the labels in alphabetical order, or those given (a split that lacks some must be read with the other's).
    """
    csv_file = Path(csv_file)
    find = _finder(root)
    return from_rows(
        kinetics_rows(csv_file), classes, lambda names: next(filter(None, map(find, names)), Path(names[0])), csv_file
    )


def kinetics_rows(csv_file: Path) -> list[tuple[tuple[str, str], str]]:
    """((name with the times, name without), label) of each line."""
    reader = csv.DictReader(_text(csv_file).splitlines())
    wanted = {"label", "youtube_id", "time_start", "time_end"}
    if not wanted <= set(reader.fieldnames or ()):
        raise AnnotationError(f"{csv_file} has the columns {reader.fieldnames}; Kinetics' have {sorted(wanted)}")
    rows = []
    for row in reader:
        try:
            span = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
        except (TypeError, ValueError) as error:
            raise AnnotationError(
                f"{csv_file}, line {reader.line_num}: no start and end of a video ({error})"
            ) from error
        rows.append(((span, row["youtube_id"]), row["label"]))
    return rows


def classes_of(rows: list[tuple]) -> list[str]:
    """The classes of (…, label): all labels in order, or 0 to the largest where they all are whole numbers."""
    labels = {label for _, label in rows}
    if labels and all(label.isdecimal() for label in labels):
        largest = max(map(int, labels))
        if largest >= MOST_CLASSES:
            raise AnnotationError(f"{largest} is a label; numbered classes end below {MOST_CLASSES}")
        return [str(i) for i in range(largest + 1)]
    return sorted(labels)


def read_ssv2(annotations: str | Path, root: str | Path, labels: str | Path | None = None) -> Annotations:
    """Something-Something V2: train.json or validation.json, and labels.json beside it; `<id>.webm` below `root`."""
    annotations = Path(annotations)
    labels = Path(labels) if labels else annotations.with_name("labels.json")
    find = _finder(root)
    try:
        index = {name: int(number) for name, number in json.loads(_text(labels)).items()}
        entries = [
            (str(e["id"]), e["template"].replace("[", "").replace("]", "")) for e in json.loads(_text(annotations))
        ]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise AnnotationError(
            f"{annotations} and {labels} aren't Something-Something V2's ({type(error).__name__}: {error}); "
            "wanted a list of {id, template, ...} and a dict of names to numbers"
        ) from error
    if sorted(index.values()) != list(range(len(index))):
        raise AnnotationError(
            f"{labels} numbers its classes {sorted(index.values())[:5]}...; wanted 0 to {len(index) - 1}"
        )
    return from_rows(entries, sorted(index, key=index.get), lambda name: find(name) or Path(name), annotations)


def read_hmdb51(root: str | Path, splits: str | Path, split: int = 1, subset: str = "train") -> Annotations:
    """HMDB-51: `splits/<class>_test_split<n>.txt`, lines `<video>.avi 0|1|2` (unused, train, test)."""
    if split not in (1, 2, 3) or subset not in HMDB51_SPLITS:
        raise AnnotationError(
            f"split {split}, subset {subset!r}; HMDB-51 has splits 1, 2, 3 and the subsets train, test"
        )
    ending = f"_test_split{split}.txt"
    files = sorted(_folder(splits).glob(f"*{ending}"))
    if not files:
        raise AnnotationError(f"{splits} holds no <class>{ending}; unpack HMDB-51's test_train_splits there")
    rows = []
    for file in files:
        for line in _text(file).splitlines():
            video, _, use = line.strip().rpartition(" ")
            if use == HMDB51_SPLITS[subset]:
                rows.append((Path(video.strip()).stem, file.name.removesuffix(ending)))
    find = _finder(root)
    return from_rows(
        rows, [f.name.removesuffix(ending) for f in files], lambda name: find(name) or Path(name), files[0].parent
    )


def read_breakfast(root: str | Path, split: int = 1, subset: str = "train") -> Annotations:
    """Breakfast: `root/P<participant>/<camera>/<...>_<activity>[_ch0].avi`; participants of the split are the test set.

    Of stereo pairs (`_ch0`, `_ch1`) the first is taken. The ten activities are the classes, in alphabetical order.
    """
    if split not in BREAKFAST_TEST or subset not in ("train", "test"):
        raise AnnotationError(
            f"split {split}, subset {subset!r}; Breakfast has splits 1 to 4 and the subsets train, test"
        )
    first, last = BREAKFAST_TEST[split]
    root, samples = _folder(root), []
    for path in video_files(root):
        participant = next((p for p in path.relative_to(root).parts[:-1] if p[:1] == "P" and p[1:].isdigit()), None)
        stem = path.stem.removesuffix("_ch0")
        activity = stem.rpartition("_")[2]
        if participant is None or activity not in BREAKFAST:
            continue
        if (first <= int(participant[1:]) <= last) == (subset == "test"):
            samples.append((path, BREAKFAST.index(activity)))
    if not samples:
        raise AnnotationError(f"{root} holds no videos of that part; wanted {root}/P03/cam01/P03_cereals.avi and so on")
    return Annotations(samples, list(BREAKFAST), [])


def from_rows(
    rows: list,
    classes: list[str] | None,
    locate: Callable,
    source: Path | str,
    remedy: str = "give the folder that holds them as root",
) -> Annotations:
    """Rows of (what `locate` takes, label) -> annotations; a file that isn't there is listed as missing."""
    if not rows:
        raise AnnotationError(f"{source} lists no videos")
    labels = {label for _, label in rows}
    classes = classes or classes_of(rows)
    index = {name: i for i, name in enumerate(classes)}
    if unknown := sorted(
        labels - set(index) - {label for label in labels if label.isdecimal() and int(label) < len(classes)}
    ):
        raise AnnotationError(f"{source}: labels {unknown[:5]} are none of the {len(classes)} classes {classes[:5]}...")
    samples, missing = [], []
    for what, label in rows:
        found = locate(what)
        if found.is_file():
            samples.append((found, index[label] if label in index else int(label)))
        else:
            missing.append(str(found))
    if len(missing) > MOST_MISSING * len(rows):
        raise AnnotationError(
            f"{source} lists {len(rows)} videos, {len(missing)} of which aren't there (first: {missing[0]}); {remedy}"
        )
    if missing:
        _logger.warning(
            "%s: %d of %d videos are missing and left out, first %s", source, len(missing), len(rows), missing[0]
        )
    return Annotations(samples, list(classes), missing)


def _finder(root: str | Path) -> Callable[[str], Path | None]:
    """Finds a video below `root` by its name without suffix, in whatever folders."""
    stems = {}
    for path in video_files(_folder(root)):
        stems.setdefault(path.stem, path)
    return stems.get


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise AnnotationError(f"{path} is no folder")
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path} can't be read: {error}") from error
