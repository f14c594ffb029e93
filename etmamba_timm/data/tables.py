"""The text of a list as rows of equally many fields, by whichever separator it uses."""

import csv
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .annotations import SUFFIXES, AnnotationError, read_text
from .frames import is_there

SAMPLED = 100  # rows of which the files are looked for, to tell the columns apart
SEPARATORS = {",": "','", "\t": "a tab", ";": "';'", " ": "a space"}
WANTED = "wanted `video,label` or `video label`, with one label for each video"


@dataclass
class Row:
    number: int  # of the line, from 1
    text: str
    fields: list[str]


def read_rows(path: Path, root: Path, notes: list[str]) -> list[Row]:
    """The rows of a list without comments and blank lines; what is unusual about them is added to `notes`.

    Raises:
        AnnotationError: the file isn't text in UTF-8, has no rows, or a line has other fields than most.
    """
    lines = [(i, line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    plain = [line for _, line in lines if not line.lstrip().startswith("#")]
    separator = _separator(plain or [line for _, line in lines], root)
    rows = []
    for number, line in lines:
        try:
            row = Row(number, line.strip(), _split(line, separator, root))
        except csv.Error as error:
            raise AnnotationError(f"{path}, line {number}: {short(line)} can't be read ({error}); {WANTED}") from error
        if not line.lstrip().startswith("#") or exists(root, row.fields[0]):  # a name may begin with it
            rows.append(row)
    if not rows:
        raise AnnotationError(f"{path} lists no videos; {WANTED}")
    if separator == ";":
        notes.append("its fields are separated by ';'")
    if separator != " " and _has_split_paths(rows, separator, root):
        for row in rows:
            row.fields = _joined(row, separator, root) or row.fields
    _make_even(path, rows, separator, root)
    unquoted = [row.fields[-1] for row in rows if separator == " " and '"' not in row.text]
    if words := [label for label in unquoted if " " in label and not is_video(root, label)]:
        notes.append(f"all that follows the video is taken for its label ({some(words)})")
    return rows


def _separator(lines: list[str], root: Path) -> str:
    """The separator with which most lines have a field that is a video; failing that, one that most lines contain."""
    sample = sample_of(lines)

    def videos(separator: str) -> tuple[int, int]:
        """How many lines have a video that exists, and how many the name of a video."""
        try:
            split = [_split(line, separator, root) for line in sample]
        except csv.Error:
            return 0, 0
        split = [fields for fields in split if len(fields) > 1]
        exist = sum(any(exists(root, field) for field in fields) for fields in split)
        return exist, sum(any(field.lower().endswith(SUFFIXES) for field in fields) for fields in split)

    best = max(SEPARATORS, key=videos)
    if any(videos(best)):
        return best
    return next((s for s in SEPARATORS if s != " " and 2 * sum(s in line for line in lines) > len(lines)), " ")


def _split(line: str, separator: str, root: Path) -> list[str]:
    if separator != " ":
        fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
        return [field.strip() for field in fields]
    line = line.strip()
    if '"' in line:
        return [field for field in next(csv.reader([line], delimiter=" ", skipinitialspace=True)) if field]
    return _split_at_spaces(line, root)


def _split_at_spaces(line: str, root: Path) -> list[str]:
    """The video, which may contain spaces, and what stands beside it; whole numbers between them are fields too."""
    places = [match.span() for match in re.finditer(" +", line)][::-1]  # the last first
    for start, end in places:
        if line[:start].lower().endswith(SUFFIXES):
            return [line[:start], *_numbers_first(line[end:])]
    for start, end in places[::-1]:
        if line[end:].lower().endswith(SUFFIXES) and (exists(root, line[end:]) or " " not in line[end:]):
            return [line[:start], line[end:]]
    for start, end in places:
        if exists(root, line[:start]):
            return [line[:start], *_numbers_first(line[end:])]
    if not places:
        return [line]
    start, end = places[0]
    return [line[:start], line[end:]]


def _numbers_first(text: str) -> list[str]:
    """'24 1' -> ['24', '1'], '24 sit down' -> ['24', 'sit down'], 'sit down' -> ['sit down']."""
    fields = []
    while match := re.match(r"(\d+) +", text):
        fields.append(match[1])
        text = text[match.end() :]
    return [*fields, text]


def _has_split_paths(rows: list[Row], separator: str, root: Path) -> bool:
    """Whether names of files contain the separator and aren't in quotes."""
    return any(
        not any(exists(root, field) for field in row.fields) and _joined(row, separator, root)
        for row in sample_of(rows)
        if len(row.fields) > 2
    )


def _joined(row: Row, separator: str, root: Path) -> list[str] | None:
    """The fields of a row whose video has the separator in its name, or None."""
    parts = row.text.split(separator)
    for k in range(len(parts) - 1, 1, -1):
        name = separator.join(parts[:k]).strip()
        if exists(root, name):
            return [name, *_split(separator.join(parts[k:]), separator, root)]
    return None


def _make_even(path: Path, rows: list[Row], separator: str, root: Path) -> None:
    """Give all rows as many fields as most have, or say which row can't be read."""
    shortest = min(len(row.fields) for row in rows)
    for row in rows:
        while len(row.fields) > shortest and not row.fields[-1]:
            row.fields.pop()
    counts = Counter(len(row.fields) for row in rows)
    width = max(counts, key=lambda count: (counts[count], count))
    if width > 2 and len(rows[0].fields) == width - 1 and len(rows) > 2 and not has_video(root, rows[0]):
        rows[0].fields.insert(0, "")  # a header without a name for the index, as R writes it
    for row in rows:
        if len(row.fields) > width and separator != " ":
            row.fields = _joined(row, separator, root) or row.fields
        count = len(row.fields)
        if count < 2:
            others = f" (the fields of other lines are separated by {SEPARATORS[separator]})" if width > 1 else ""
            raise AnnotationError(f"{path}, line {row.number}: {short(row.text)} has no label{others}; {WANTED}")
        if count != width:
            raise AnnotationError(
                f"{path}, line {row.number}: {short(row.text)} has {count} fields, separated by "
                f"{SEPARATORS[separator]}, where most lines have {width}; {WANTED}. Put a name or label that contains "
                f"{SEPARATORS[separator]} in double quotes"
            )


def has_video(root: Path, row: Row) -> bool:
    return any(is_video(root, field) for field in row.fields)


def is_video(root: Path, field: str) -> bool:
    """Whether a field is the name of a video, which may be missing."""
    return field.lower().endswith(SUFFIXES) or exists(root, field)


def exists(root: Path, field: str) -> bool:
    """Whether a field is the path of a file or a folder of frames below `root`, perhaps with Windows' backslashes."""
    if not field:
        return False
    return is_there(root / field) or ("\\" in field and is_there(root / field.replace("\\", "/")))


def sample_of(rows: list) -> list:
    """About `SAMPLED` rows of all, evenly spread."""
    return rows[:: len(rows) // SAMPLED + 1]


def some(values: Iterable[str]) -> str:
    """The first three different values, for a message."""
    different = list(dict.fromkeys(values))
    return ", ".join(map(_bare, different[:3])) + (", ..." if len(different) > 3 else "")


def _bare(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "..."


def short(text: str) -> str:
    """A text in quotes, cut if it is long, for a message."""
    return repr(_bare(text))
