"""Lists of videos and labels, as people and programs write them.

A list is a table of text. Which separator it uses, whether it begins with a header, and which columns hold the videos
and their labels is found by looking at the rows and at the files that exist. What isn't plain `video,label` is logged.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..words import number_of
from .annotations import (
    SUFFIXES,
    AnnotationError,
    Annotations,
    check_number,
    classes_of,
    each,
    existing_folder,
    from_rows,
    video_files,
)
from .frames import is_there
from .tables import WANTED, Row, exists, is_video, read_rows, sample_of, short, some

_logger = logging.getLogger(__name__)

# Names of the parts of a dataset, in names of files and folders and in columns.
PARTS = {"train": ("train",), "val": ("val", "validate", "validation", "valid"), "test": ("test",)}
LABEL_NAMES = {
    *("label", "class", "action", "activity", "category", "target"),
    *("label_name", "class_name", "label_id", "class_id", "class_idx"),
}
SEVERAL_NAMES = {"labels", "classes", "actions", "activities", "categories", "targets", "tags"}
FRAMES_NAMES = {"frames", "num_frames", "n_frames", "nframes", "total_frames", "frame_count"}
FEWEST_SEVERAL = 0.05  # share of fields that must hold several labels, if no header says so; fewer are mistakes
FEWEST_FRAMES = 8  # if no header says so, whole numbers are taken for frame counts only from here on


class Listed(NamedTuple):
    """The rows of a list.

    Attributes:
        rows: (path of the video as the list gives it, label), or a tuple of labels in a list of several labels a video.
        notes: how the list was read, where it isn't plain `video,label` or `video,labels`; sentences for a warning.
        is_multilabel: whether it is a list of several labels a video.
    """

    rows: list[tuple[str, str | tuple[str, ...]]]
    notes: list[str]
    is_multilabel: bool


def read_list(
    path: str | Path,
    root: str | Path | None = None,
    classes: list[str] | None = None,
    subset: str | None = None,
    is_multilabel: bool = False,
) -> Annotations:
    """A file of lines `video,label`, separated by a comma, a tab, a semicolon or the last space.

    Labels are class indices if they are whole numbers, else names. Lines that begin with `#` are comments. A header is
    skipped; other columns (an index, frame counts, parts of the dataset) are recognised, and a warning says so.

    A field may hold several labels: `walk;talk`, `walk|talk`, numbers, or a list as Python writes it. If a twentieth of
    the fields does, or at least one under a header such as `video,labels`, the list is one of several labels a video:
    each label is a tuple, an empty field is a video with none of the classes, and rows of the same video are joined.
    Under such a header, rows that give a video different labels are enough.

    Args:
        path: the list.
        root: the folder in which relative paths start; the list's own by default.
        classes: names of the classes; by default those in the list, in alphabetical order or, if they are numbers,
            from 0 to the largest.
        subset: 'train', 'val' or 'test': the rows to take, if a column says which part each row belongs to.
        is_multilabel: whether videos have several labels even if the list doesn't show it, as the training list does.

    Raises:
        AnnotationError: a line that can't be read, several labels for very few videos, or most videos missing.
    """
    path = Path(path)
    folder = existing_folder(root or path.parent)
    rows, notes, _ = parse_list(path, folder, subset, is_multilabel)
    if classes is None:
        notes = notes + _gaps(rows)
    if notes:
        _logger.warning("%s: %s", path, "; ".join(notes))
    return from_rows(rows, classes, lambda video: folder / video, path, lambda: _remedy(path, folder, rows))


def parse_list(path: Path, root: Path, subset: str | None = None, is_multilabel: bool = False) -> Listed:
    """The rows of a list. Arguments and errors as in `read_list`; videos may be missing."""
    notes: list[str] = []
    rows = read_rows(path, root, notes)
    return _Table(path, root, rows, notes).read(subset, is_multilabel)


class _Table:
    """Rows of equally many fields, and which of their columns are not yet explained."""

    def __init__(self, path: Path, root: Path, rows: list[Row], notes: list[str]) -> None:
        self.path, self.root, self.notes = path, root, notes
        self.rows = rows
        self.video = self._video_column()
        self.names = self._take_header()  # of the columns, in small letters; empty without a header
        self.left = [i for i in range(len(rows[0].fields)) if i != self.video]

    def read(self, subset: str | None, is_multilabel: bool) -> Listed:
        self._drop_empty()
        self._drop_parts(subset)
        self._drop_index()
        self._drop_frames()
        label = self._label_column()
        rows = [(row, row.fields[self.video], row.fields[label]) for row in self.rows]
        is_multilabel = is_multilabel or self._has_several(rows, label)
        if bad := next((row for row, video, name in rows if not video or not (name or is_multilabel)), None):
            lacks = "label" if bad.fields[self.video] else "video"
            raise AnnotationError(f"{self.path}, line {bad.number}: {short(bad.text)} has no {lacks}; {WANTED}")
        if label < self.video:
            self.notes.append(f"column {label + 1} is taken for the label and column {self.video + 1} for the video")
        self._check_labels(
            [(row, part) for row, _, name in rows for part in (_parts(name) if is_multilabel else [name])]
        )
        videos = self._slashes([video for _, video, _ in rows])
        if is_multilabel:
            return Listed(self._joined(videos, [_parts(name) for _, _, name in rows]), self.notes, True)
        labels = self._whole([name for _, _, name in rows])
        self._tell_repeated(videos, labels)
        return Listed(list(zip(videos, labels, strict=True)), self.notes, False)

    def _column(self, index: int) -> list[str]:
        return [row.fields[index] for row in self.rows]

    def _drop(self, column: int, why: str) -> None:
        self.left.remove(column)
        self.notes.append(f"{self._called(column)} is left out: {why}")

    def _called(self, column: int) -> str:
        name = self.names[column] if self.names else ""
        return f"column {column + 1}" + (f" ({name!r})" if name else "")

    def _video_column(self) -> int:
        """The column with the most files that exist or, failing that, with the most names of videos."""
        sample = sample_of(self.rows[1:] or self.rows)
        width = len(self.rows[0].fields)
        tests: tuple[Callable[[str], bool], ...] = (
            lambda field: exists(self.root, field),
            lambda field: field.lower().endswith(SUFFIXES),
            _looks_like_path,
        )
        for test in tests:
            counts = [sum(test(row.fields[i]) for row in sample) for i in range(width)]
            if max(counts):
                return counts.index(max(counts))
        if width > 2:
            raise AnnotationError(
                f"{self.path}, line {sample[0].number}: {short(sample[0].text)} has {width} fields, and none is a "
                f"video below {self.root}; {WANTED}"
            )
        return 0

    def _take_header(self) -> list[str]:
        """Remove the header from the rows and return its fields; without a header, an empty list."""
        first, others = self.rows[0], self.rows[1:]
        name = first.fields[self.video]
        if not others or is_video(self.root, name) or "/" in name:
            return []
        beside = [(field, [row.fields[i] for row in others]) for i, field in enumerate(first.fields) if i != self.video]
        videos = [row.fields[self.video] for row in sample_of(others)]
        certain = _most(_looks_like_path, videos) and not _looks_like_path(name)
        if _most(lambda video: _looks_like_path(video) or exists(self.root, video), videos):
            likely = all(field not in values for field, values in beside)
        else:  # most videos are missing
            likely = any(
                not field.lstrip("-").isdecimal() and all(map(str.isdecimal, values)) for field, values in beside
            ) or (len(beside) == 1 and first.fields[-1].lower() in LABEL_NAMES | SEVERAL_NAMES)
        if not (certain or likely):
            return []
        if not certain:
            self.notes.append(f"line {first.number} ({short(first.text)}) is taken for a header")
        self.rows = [row for row in others if row.fields != first.fields]
        if repeated := len(others) - len(self.rows):
            self.notes.append(f"lines that repeat the header are left out ({repeated})")
        if not self.rows:
            raise AnnotationError(f"{self.path} lists no videos after its header {short(first.text)}; {WANTED}")
        return [field.lower() for field in first.fields]

    def _drop_empty(self) -> None:
        for column in list(self.left):
            if len(self.left) > 1 and not any(self._column(column)):
                self.left.remove(column)

    def _drop_index(self) -> None:
        """Numbers of rows before all other columns, as pandas writes them; after shuffling in another order."""
        while len(self.left) > 1 and self.left[0] < self.video:
            values = self._column(self.left[0])
            if not all(value.isdecimal() and len(value) < 20 for value in values):
                return
            if self.names and self.names[self.left[0]] in LABEL_NAMES | SEVERAL_NAMES:
                return
            numbers = [int(value) for value in values]
            named = bool(self.names) and re.fullmatch(r"|index|unnamed: [\d.]+", self.names[self.left[0]])
            in_order = numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            if not in_order and not (named and len(set(numbers)) == len(numbers)):
                return
            self._drop(self.left[0], "it numbers the rows, as pandas' index does")

    def _drop_parts(self, subset: str | None) -> None:
        """A column that says which part of the dataset each row belongs to; other parts' rows are dropped with it."""
        part_of = {name: part for part, names in PARTS.items() for name in names}
        for column in self.left if len(self.left) > 1 else []:
            parts = [part_of.get(value.lower()) for value in self._column(column)]
            if None in parts:
                continue
            counts = Counter(parts)
            several = ", ".join(f"{part} {count}" for part, count in counts.items())
            if len(counts) == 1:
                self._drop(column, f"it says {self.rows[0].fields[column]!r} in every row")
            elif subset is None:
                self._drop(column, f"it names parts ({several}), and the rows of all parts are taken")
            elif subset in counts:
                self._drop(column, f"it names parts ({several}), and only the rows of {subset!r} are taken")
                self.rows = [row for row, part in zip(self.rows, parts, strict=True) if part == subset]
            else:
                raise AnnotationError(
                    f"{self.path}: {self._called(column)} names the parts {several}; wanted rows of {subset!r}. "
                    "Add them, or write a list without this column for each part"
                )
            return

    def _drop_frames(self) -> None:
        """Frame counts, as in `path 24 1`."""
        for column in self.left if len(self.left) > 1 else []:
            values = self._column(column)
            if not all(value.isdecimal() and len(value) < 10 for value in values):
                continue
            others = [self._column(other) for other in self.left if other != column]
            named = bool(self.names) and self.names[column] in FRAMES_NAMES
            # Without a name: of two columns, counts differ within a class, and come before class indices.
            alone = len(others) == 1 and not (self.names and self.names[column])
            if alone and all(value.isdecimal() for value in others[0]) and column != self.left[0]:
                continue
            many = min(map(int, values)) >= FEWEST_FRAMES
            if named or (alone and many and not _same_classes(values, others[0])):
                self._drop(column, f"its numbers ({some(values)}) are taken for numbers of frames")
                return

    def _label_column(self) -> int:
        if len(self.left) == 1:
            return self.left[0]
        labels = [i for i in self.left if self.names and self.names[i] in LABEL_NAMES | SEVERAL_NAMES]
        if len(labels) == 1:
            others = ", ".join(self._called(i) for i in self.left if i != labels[0])
            self.notes.append(f"{others} left out: {self._called(labels[0])} is the label, of the whole video")
            return labels[0]
        row = self.rows[0]
        columns = ", ".join(f"{self._called(i)} with {short(row.fields[i])}" for i in self.left)
        raise AnnotationError(
            f"{self.path}, line {row.number}: {short(row.text)} has {len(self.left)} columns beside the video that "
            f"may hold labels, or frame counts, starts and ends ({columns}); {WANTED}. Leave the others out, or name "
            "the columns in a header, the right one 'label'"
        )

    def _has_several(self, rows: list[tuple[Row, str, str]], column: int) -> bool:
        """Whether it is a list of several labels a video."""
        if self.names and self.names[column] in SEVERAL_NAMES:
            labels = {(video, part) for _, video, label in rows for part in _parts(label)}
            return len(labels) > len({video for video, _ in labels})
        counts = Counter(part for label in {label for _, _, label in rows} for part in _parts(label))
        several = []
        for row, _, label in rows:
            parts = _parts(label)
            if len(parts) > 1 and (all(map(str.isdecimal, parts)) or any(counts[part] > 1 for part in parts)):
                several.append((row, label, parts))
        if not several:
            return False
        row, label, parts = several[0]
        if len(several) < FEWEST_SEVERAL * len(rows):
            raise AnnotationError(
                f"{self.path}, line {row.number}: the label {short(label)} looks like {len(parts)} labels "
                f"({some(parts)}); {WANTED}: keep the most important one. If videos do have several labels, call the "
                "column 'labels' in a header"
            )
        self.notes.append(f"{self._called(column)} holds several labels a video ({some([label])})")
        return True

    def _check_labels(self, rows: list[tuple[Row, str]]) -> None:
        """Whole numbers, or names."""
        for row, label in rows:
            check_number(label, f"{self.path}, line {row.number}: ")
        names = [(row, label) for row, label in rows if not label.isdecimal()]
        if names and 2 * len(names) < len(rows):
            row, label = names[0]
            raise AnnotationError(
                f"{self.path}, line {row.number}: the label {short(label)} is no whole number, as most others are"
            )

    def _slashes(self, videos: list[str]) -> list[str]:
        """Windows' backslashes as slashes, where the file exists so."""
        turned = [
            video.replace("\\", "/")
            if "\\" in video and not is_there(self.root / video) and exists(self.root, video)
            else video
            for video in videos
        ]
        if changed := [video for video, new in zip(videos, turned, strict=True) if video != new]:
            self.notes.append(f"'\\' is read as '/' in {number_of(len(changed), 'path')} ({some(changed)})")
        return turned

    def _whole(self, labels: list[str]) -> list[str]:
        """Labels such as '3.0', pandas' numbers of a column with gaps, as whole numbers."""
        if not all(re.fullmatch(r"\d+\.0+", label) for label in labels):
            return labels
        self.notes.append(f"the labels ({some(labels)}) are read as whole numbers")
        return [label.partition(".")[0] for label in labels]

    def _joined(self, videos: list[str], labels: list[list[str]]) -> list[tuple[str, str | tuple[str, ...]]]:
        """All labels of each video, in the order of the videos' first rows."""
        joined: dict[str, dict[str, None]] = {}
        for video, names in zip(videos, labels, strict=True):
            joined.setdefault(video, {}).update(dict.fromkeys(names))
        if unlabelled := [video for video, names in joined.items() if not names]:
            count = number_of(len(unlabelled), "video")
            self.notes.append(f"no label means none of the classes: {count}, first {unlabelled[0]}")
        return [(video, tuple(names)) for video, names in joined.items()]

    def _tell_repeated(self, videos: list[str], labels: list[str]) -> None:
        """Videos that are listed with different labels."""
        given: dict[str, str] = {}
        twice = {video: label for video, label in zip(videos, labels, strict=True)
                 if given.setdefault(video, label) != label}  # fmt: skip
        if twice:
            video, label = next(iter(twice.items()))
            self.notes.append(
                f"videos with different labels in several rows, each row a sample of its own: {len(twice)}, first "
                f"{video} with {given[video]!r} and {label!r} (to join them, call the column 'labels' in a header)"
            )


def _gaps(rows: list[tuple[str, str | tuple[str, ...]]]) -> list[str]:
    """A note on numbered classes without a video."""
    labels = {name for _, label in rows for name in each(label)}
    if not all(label.isdecimal() for label in labels):
        return []
    numbers, classes = {int(label) for label in labels}, len(classes_of(rows))
    if len(numbers) == classes:
        return []
    if numbers == set(range(1, classes)):
        return [
            f"the labels are 1 to {classes - 1}, but classes count from 0: the model gets "
            f"{number_of(classes, 'class')}, and class 0 has no videos; subtract 1 from the labels for {classes - 1}"
        ]
    return [f"{classes - len(numbers)} of the {classes} numbered classes, 0 to {classes - 1}, have no videos"]


def _remedy(path: Path, root: Path, rows: list[tuple[str, str | tuple[str, ...]]]) -> str:
    """What to do about missing videos, by the first of them."""
    video = next(video for video, _ in rows if not is_there(root / video))
    slashed = video.replace("\\", "/")
    if is_there(path.parent / slashed):
        return f"they lie beside the list: give {path.parent} as the folder of the videos (root, --data)"
    if os.path.isdir(root / slashed):
        return "it is a folder without pictures; name video files, or folders that hold the frames of one video"
    if found := next((slashed + suffix for suffix in SUFFIXES if os.path.isfile(root / (slashed + suffix))), None):
        return f"{root / found} exists: write the names with their suffix"
    name = slashed.rpartition("/")[2]
    if here := next((file for file in video_files(root) if file.name == name), None):
        above = Path(str(here).removesuffix(slashed))
        if above != here and not slashed.startswith("/"):
            return f"{here} exists: give {above} as the folder of the videos (root, --data)"
        return f"{here} exists: write the paths in the list as they are below {root}"
    return "give the folder that holds them (root, --data)"


def _parts(label: str) -> list[str]:
    """The labels in a field of several: whole numbers with anything between, names with | or ;, or Python's list."""
    bare = re.sub(r"^\[([^\[\]]*)\]$", r"\1", label)
    if re.fullmatch(r"[\s,;|]*\d+([\s,;|]+\d+)*[\s,;|]*", bare):
        parts = re.findall(r"\d+", bare)
    elif bare != label and re.match(r"""\s*["']""", bare):
        parts = [text for _, text in re.findall(r"""(["'])(.*?)\1""", bare)]
    else:
        parts = [part.strip() for part in re.split(r"[|;]", bare)]
    return list(dict.fromkeys(filter(None, parts)))


def _same_classes(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two columns say the same, as a class' number and its name do; False if no class comes twice."""
    pairs = set(zip(first, second, strict=True))
    return len(pairs) == len(set(first)) == len(set(second)) < len(first)


def _looks_like_path(field: str) -> bool:
    """Whether a field has folders, or ends as names of files do."""
    return re.search(r"[/\\]|\.[a-zA-Z]\w{1,4}$", field) is not None


def _most(test: Callable[[str], bool], values: list[str]) -> bool:
    return 2 * sum(map(test, values)) > len(values)
