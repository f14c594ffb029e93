"""The videos of a dataset and their classes, read from its official files. Nothing is decoded here."""

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..words import number_of
from .embedded import VideoFile
from .frames import PICTURES, is_picture, is_there

_logger = logging.getLogger(__name__)

# Files with these suffixes are taken for videos; where two have the same name, the first suffix wins.
SUFFIXES = (
    *(".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".mts", ".ogv"),
    *(".m2ts", ".m2t", ".vob", ".mpe", ".mpv", ".m1v", ".m2v", ".m2p", ".asf", ".f4v", ".3g2", ".3gpp", ".qt", ".mk3d"),
    *(".mxf", ".dv", ".divx", ".xvid", ".ogm", ".rm", ".rmvb", ".nut", ".ivf", ".mjpeg", ".mjpg"),
    *(".h264", ".264", ".h265", ".265", ".hevc", ".gif", ".apng"),
)
MOST_CLASSES = 100_000  # numbered classes; a larger number is an error in the list
MOST_MISSING = 0.5  # share of a list's videos that may be missing before it is an error
BREAKFAST = (
    *("cereals", "coffee", "friedegg", "juice", "milk"),
    *("pancake", "salat", "sandwich", "scrambledegg", "tea"),
)
BREAKFAST_TEST = {1: (3, 15), 2: (16, 28), 3: (29, 41), 4: (42, 54)}  # participants, first and last
HMDB51_SPLITS = {"train": "1", "test": "2"}
T = TypeVar("T", int, str)
Label = int | tuple[int, ...]  # a class index, or those of a video that may have several


class AnnotationError(ValueError):
    """A dataset's files can't be read. The message says which file or line, what was wanted, and what to do."""


@dataclass(frozen=True)
class Annotations:
    """A dataset's videos.

    Attributes:
        samples: (file or folder of frames, class index) of each video that exists; `open_video` takes it. If videos may
            have several labels, it is a tuple of class indices, perhaps of one or none, for all videos.
        classes: names of the classes; empty if the videos have no labels, and all class indices are 0.
        missing: files, or names of files, that are listed but don't exist.
    """

    samples: list[tuple[VideoFile, Label]]
    classes: list[str]
    missing: list[str]

    @property
    def is_multilabel(self) -> bool:
        """Whether a video may have several labels."""
        return bool(self.samples) and isinstance(self.samples[0][1], tuple)

    def rarest_labels(self) -> list[int]:
        """The class of each video; the rarest of several, and `len(classes)` for none."""
        counts = Counter(i for _, label in self.samples for i in each(label))
        nothing = len(self.classes)
        return [min(each(label), key=lambda i: (counts[i], i), default=nothing) for _, label in self.samples]

    def renumbered(self, numbers: Sequence[int], classes: Iterable[str]) -> "Annotations":
        """The same videos with class i as number `numbers[i]` of `classes`."""
        samples = [(file, _map(numbers.__getitem__, label)) for file, label in self.samples]
        return Annotations(samples, list(classes), self.missing)


def each(label: T | tuple[T, ...]) -> tuple[T, ...]:
    """The labels of a video that has one, or may have several."""
    return label if isinstance(label, tuple) else (label,)


def _map(function: Callable[[T], int], label: T | tuple[T, ...]) -> Label:
    return tuple(sorted(set(map(function, label)))) if isinstance(label, tuple) else function(label)


def read_folders(root: str | Path, classes: list[str] | None = None) -> Annotations:
    """`root/<class>/**/<video>`; classes are the folders' names in alphabetical order, or those given.

    In a class without video files, each folder below it that holds pictures is a video, a folder of frames. Links are
    followed. Files and folders whose names begin with a dot are ignored, as other programs' own. Any other file that
    isn't taken, as it is no video or lies in no class, is counted in a warning.

    Raises:
        AnnotationError: `root` isn't a folder, or holds no videos in folders of classes; or all lie in one, but in
            folders below it, which are more likely the classes.
    """
    root = existing_folder(root)
    names = classes or class_folders(root)
    samples: list[tuple[VideoFile, Label]] = []
    others: list[Path] = []
    held: list[str] = []  # classes with videos
    nested: list[str] = []  # those whose videos all lie in folders below the class's
    for index, name in enumerate(names):
        videos, frames, beside = _files(root / name)
        if videos:
            beside += [path for folder in frames for path in sorted(folder.iterdir()) if is_picture(path.name)]
        videos = videos or frames
        samples += [(path, index) for path in videos]
        others += beside
        held += [name] if videos else []
        nested += [name] if videos and all(path.parent != root / name for path in videos) else []
    if not samples:
        hint = f"; they hold {_kinds(others)}" if others else ""
        if any(path.suffix.lower() in PICTURES for path in others):
            hint += ": put the frames of each video in a folder of their own"
        raise AnnotationError(f"{root} holds no videos in folders of classes, wanted {root}/<class>/<video>.mp4{hint}")
    if others:
        _logger.warning(
            "%s: %s in folders of classes left out, no video by the suffix: %s; first %s",
            *(root, number_of(len(others), "file"), _kinds(others), others[0]),
        )
    if loose := sorted(path for path in root.iterdir() if _is_video_name(path.name) and path.is_file()):
        _logger.warning("%s: %s in no folder of a class, first %s", root, number_of(len(loose), "video"), loose[0])
    if nested:
        if len(held) == 1 and (classes is None or len(classes) == 1):
            raise AnnotationError(
                f"{root} would be a single class, {nested[0]!r}, whose videos all lie in folders below it, such as "
                f"{samples[0][0]}; give {_with_classes(root / nested[0])}"
            )
        _logger.warning(
            "%s: all videos of %d of %s, first %s, lie in folders below the class's; if those are the classes, give "
            "another folder, such as %s",
            *(root, len(nested), number_of(len(names), "class"), nested[0], root / nested[0]),
        )
    if empty := [name for name in names if name not in held]:
        total = number_of(len(names), "class")
        _logger.warning("%s: no videos in %d of %s, first %s", root, len(empty), total, empty[0])
    return Annotations(samples, list(names), [])


def _with_classes(folder: Path) -> Path:
    """The first folder, from this one down, that has several folders or a video."""
    while len(below := class_folders(folder)) == 1 and class_folders(folder / below[0]):
        folder /= below[0]
    return folder


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root` that aren't hidden, in alphabetical order."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def video_files(root: Path) -> list[Path]:
    """Videos at any depth below `root`, in alphabetical order; links are followed, hidden files are ignored.

    Files come first, then folders of frames.
    """
    videos, frames, _ = _files(root)
    return videos + frames


def _files(root: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The videos, the folders of frames, and other files at any depth below `root`, each in alphabetical order.

    A folder of frames holds pictures and no videos, and isn't `root` itself.
    """
    videos: list[Path] = []
    frames: list[Path] = []
    others: list[Path] = []
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in names if not name.startswith(".")]
        held = [Path(folder, name) for name in names if _is_video_name(name)]
        is_frames = not held and Path(folder) != root and any(map(is_picture, names))
        videos += held
        frames += [Path(folder)] if is_frames else []
        others += [Path(folder, n) for n in names if not (_is_video_name(n) or (is_frames and is_picture(n)))]
    return sorted(videos), sorted(frames), sorted(others)


def _is_video_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _kinds(files: list[Path]) -> str:
    """'10 .txt, 2 .jpg (pictures)', the most frequent first."""
    counts = Counter(path.suffix.lower() for path in files).most_common()
    kinds = [f"{n} {suffix or 'without suffix'}{' (pictures)' * (suffix in PICTURES)}" for suffix, n in counts]
    return ", ".join(kinds[:5]) + (f" and {number_of(len(kinds) - 5, 'other kind')}" if len(kinds) > 5 else "")


def read_kinetics(csv_file: str | Path, root: str | Path, classes: list[str] | None = None) -> Annotations:
    """Kinetics' csv: columns label, youtube_id, time_start, time_end; videos `<id>_<start>_<end>.mp4` below `root`.

    Times have six digits in the names, as the official downloader writes them; `<id>.mp4` is taken as well. Classes are
    the labels in alphabetical order, or those given: a part that lacks some classes needs those of the training part.
    """
    csv_file = Path(csv_file)
    find = _finder(root)
    return from_rows(
        kinetics_rows(csv_file), classes, lambda names: next(filter(None, map(find, names)), Path(names[0])), csv_file
    )


def kinetics_rows(csv_file: Path) -> list[tuple[tuple[str, str], str]]:
    """((name with the times, name without), label) of each line."""
    reader = csv.DictReader(read_text(csv_file).splitlines())
    wanted = {"label", "youtube_id", "time_start", "time_end"}
    if not wanted <= set(reader.fieldnames or ()):
        raise AnnotationError(f"{csv_file} has the columns {reader.fieldnames}; Kinetics' have {sorted(wanted)}")
    rows = []
    for row in reader:
        try:
            span = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
        except (TypeError, ValueError) as error:
            raise AnnotationError(
                f"{csv_file}, line {reader.line_num}: no start and end of a video ({error}); wanted both in seconds"
            ) from error
        rows.append(((span, row["youtube_id"]), row["label"]))
    return rows


def classes_of(rows: list[tuple]) -> list[str]:
    """The classes of rows (..., label): the labels in alphabetical order or, if all are numbers, 0 to the largest."""
    labels = {name for _, label in rows for name in each(label)}
    if labels and all(label.isdecimal() for label in labels):
        for label in labels:
            check_number(label)
        return [str(i) for i in range(max(map(int, labels)) + 1)]
    return sorted(labels)


def check_number(label: str, where: str = "") -> None:
    """Raise AnnotationError if a label is a number too large for a class; `where` begins the message."""
    if label.isdecimal() and (len(label) > 20 or int(label) >= MOST_CLASSES):  # int() refuses thousands of digits
        raise AnnotationError(f"{where}{label[:30]} is a label; numbered classes end below {MOST_CLASSES}")


def read_ssv2(annotations: str | Path, root: str | Path, labels: str | Path | None = None) -> Annotations:
    """Something-Something V2: train.json or validation.json, and labels.json beside it; `<id>.webm` below `root`."""
    annotations = Path(annotations)
    labels = Path(labels) if labels else annotations.with_name("labels.json")
    find = _finder(root)
    try:
        index = {name: int(number) for name, number in json.loads(read_text(labels)).items()}
        entries = [
            (str(e["id"]), e["template"].replace("[", "").replace("]", "")) for e in json.loads(read_text(annotations))
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
    return from_rows(entries, sorted(index, key=index.__getitem__), lambda name: find(name) or Path(name), annotations)


def read_hmdb51(root: str | Path, splits: str | Path, split: int = 1, subset: str = "train") -> Annotations:
    """HMDB-51: `splits/<class>_test_split<n>.txt`, lines `<video>.avi 0|1|2` (unused, train, test)."""
    if split not in (1, 2, 3) or subset not in HMDB51_SPLITS:
        raise AnnotationError(
            f"split {split}, subset {subset!r}; HMDB-51 has splits 1, 2, 3 and the subsets train, test"
        )
    ending = f"_test_split{split}.txt"
    files = sorted(existing_folder(splits).glob(f"*{ending}"))
    if not files:
        raise AnnotationError(f"{splits} holds no <class>{ending}; unpack HMDB-51's test_train_splits there")
    rows = []
    for file in files:
        for line in read_text(file).splitlines():
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
    root = existing_folder(root)
    samples: list[tuple[VideoFile, Label]] = []
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
    locate: Callable[..., VideoFile],
    source: Path | str,
    remedy: Callable[[], str] = lambda: "give the folder that holds them (root, --data)",
) -> Annotations:
    """Annotations from rows of (what `locate` takes, label or labels). A file that doesn't exist is listed as missing.

    Raises:
        AnnotationError: no rows, labels that aren't among `classes`, or most files missing; `remedy` ends the message.
    """
    if not rows:
        raise AnnotationError(f"{source} lists no videos")
    classes = classes or classes_of(rows)
    index = {str(i): i for i in range(len(classes))} | {name: i for i, name in enumerate(classes)}
    labels = {name for _, label in rows for name in each(label)}
    number = {label: label if label in index else label.lstrip("0") or "0" for label in labels}
    if unknown := sorted(label for label, name in number.items() if name not in index):
        raise AnnotationError(
            f"{source}: labels {unknown[:5]} are none of the classes {classes[:5]}" + "..." * (len(classes) > 5)
        )
    samples: list[tuple[VideoFile, Label]] = []
    missing = []
    for what, label in rows:
        found = locate(what)
        if is_there(found) if isinstance(found, Path) else found.is_file():
            samples.append((found, _map(lambda name: index[number[name]], label)))
        else:
            missing.append(str(found))
    if len(missing) > MOST_MISSING * len(rows):
        raise AnnotationError(
            f"{source} lists {number_of(len(rows), 'video')}, {len(missing)} of which aren't there (first: "
            f"{missing[0]}); {remedy()}"
        )
    if missing:
        _logger.warning(
            "%s: %d of %s missing and left out, first %s",
            *(source, len(missing), number_of(len(rows), "video"), missing[0]),
        )
    return Annotations(samples, list(classes), missing)


def _finder(root: str | Path) -> Callable[[str], Path | None]:
    """Finds a video at any depth below `root` by its name without suffix; files come before folders of frames."""
    stems: dict[str, Path] = {}
    videos, frames, _ = _files(existing_folder(root))
    for path in [*sorted(videos, key=lambda path: SUFFIXES.index(path.suffix.lower())), *frames]:
        stems.setdefault(path.stem if path.suffix.lower() in SUFFIXES else path.name, path)
    return stems.get


def existing_folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise AnnotationError(f"{path} is no folder")
    return path


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path} can't be read: {error}; save it as text in UTF-8") from error
    except OSError as error:
        raise AnnotationError(f"{path} can't be read: {error}") from error
