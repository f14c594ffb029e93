"""Reads a part of a dataset, given the name of its layout and its folder; finds the layout of a folder."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..words import number_of
from .annotations import (
    BREAKFAST,
    AnnotationError,
    Annotations,
    class_folders,
    classes_of,
    kinetics_rows,
    read_breakfast,
    read_folders,
    read_hmdb51,
    read_kinetics,
    read_ssv2,
    read_text,
    video_files,
)
from .huggingface import classes_in, load_huggingface, read_huggingface
from .lists import PARTS, parse_list, read_list

SUBSETS = ("train", "val", "test")
LIST_SUFFIXES = (".csv", ".txt")


def read_dataset(
    layout: str, root: str | Path, subset: str = "train", *, split: int = 1, annotations: str | Path | None = None
) -> Annotations:
    """Reads a part of a dataset. The classes of the training part, if it is there, number those of all parts.

    Args:
        layout: a name of `LAYOUTS`:
            'folders': `root/<subset>/<class>/*.mp4`, or `root/<class>/*.mp4`, where every subset is all videos.
            'list': `<subset>.csv` or `.txt`, lines `video,label`; videos below `root`. If the training list has several
                labels a video, so have the others.
            'kinetics': `<subset>.csv` as published.
            'ssv2': labels.json, train.json, validation.json, with or without 'something-something-v2-' before.
            'hmdb51': <class>_test_split<n>.txt; there is no 'val' (see `SOURCES`).
            'breakfast': no annotation files; there is no 'val' (see `SOURCES`).
            'huggingface': a dataset that `datasets` loads from the folder, with the columns video and label.
            'unlabelled': videos at any depth of `root/train`, without classes, for distillation; other subsets are
                as in 'folders'.
        root: the folder of the videos.
        subset: 'train', 'val' or 'test'.
        split: of HMDB-51 (1 to 3) and Breakfast (1 to 4).
        annotations: the folder of the annotation files, at any depth; `root` by default.

    Raises:
        AnnotationError: an unknown layout, or files that don't exist or can't be read.
    """
    if layout not in LAYOUTS:
        raise AnnotationError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    if subset not in SUBSETS:
        raise AnnotationError(f"no subset {subset!r}; there are {', '.join(SUBSETS)}")
    if subset == "val" and layout in SOURCES:
        raise AnnotationError(
            f"the layout {layout} has no videos for validation: `train` takes some of those for training, and writes "
            "which into the run's folder split. Take the subset test"
        )
    return LAYOUTS[layout](Path(root), Path(annotations or root), subset, split)


def find_layout(root: str | Path, annotations: str | Path | None = None) -> str:
    """The layout of a dataset, by the files in its folders; arguments as in `read_dataset`.

    Files of annotations, in the folder or one below, come before folders of classes.

    Raises:
        AnnotationError: no layout is recognised, or several are.
    """
    root, lists = Path(root), Path(annotations or root)
    for folder in (root, lists):
        if not folder.is_dir():
            raise AnnotationError(f"{folder} is no folder")
    found = [(layout, file) for layout, file in _signs(root, lists) if file is not None]
    if len(found) > 1:
        held = " and ".join(f"{file} ({layout})" for layout, file in found)
        raise AnnotationError(f"{root} may be one of several datasets, as it has {held}; choose one by --dataset")
    if found:
        return found[0][0]
    if any(video_files(root / name) for name in class_folders(root)):
        return "folders"
    raise AnnotationError(
        f"{root} isn't recognised as a dataset. Looked for videos in {root}/<class>/ or {root}/train/<class>/ and "
        "val/<class>/; lists train.csv or train.txt; the files of Kinetics (train.csv), Something-Something V2 "
        "(labels.json), HMDB-51 (<class>_test_split1.txt), Breakfast (P03/cam01/P03_cereals.avi); and a dataset of "
        "Hugging Face's. Give another folder, the folder of the lists (--annotations), or the layout (--dataset)"
    )


def is_undivided(layout: str, root: str | Path, annotations: str | Path | None = None) -> bool:
    """Whether a dataset has videos for training and none for validation: one folder of classes, or one list."""
    if layout == "list":
        lists = Path(annotations or root)
        folder = _find(lists, _list_names("train")).parent
        # A val.csv that has another train.csv beside it may be the log or the split of an earlier run.
        found = _named(lists, _list_names("val"))
        return not any(file.parent == folder or not _train_list(file) for file in found)
    return layout in SOURCES or (layout == "folders" and is_one_folder(root))


def is_one_folder(root: str | Path) -> bool:
    """Whether a dataset of the layout 'folders' has no folders for its parts: `root/<class>/*.mp4`."""
    parts = {name for names in PARTS.values() for name in names}
    folders = class_folders(Path(root))
    return bool(set(folders) - parts) and not any(
        class_folders(Path(root, name)) for name in parts.intersection(folders)
    )


def with_classes(annotations: Annotations, classes: Sequence[str]) -> Annotations:
    """The same videos with their classes numbered as in `classes`, e.g. those of a trained model.

    If the dataset's classes are numbers and `classes` are names, the numbers are taken for indices of `classes`.

    Raises:
        AnnotationError: the dataset has a class that isn't in `classes`, or two of `classes` have the same name.
    """
    number = {name: i for i, name in enumerate(classes)}
    if len(number) < len(classes):
        double = next(name for i, name in enumerate(classes) if name in classes[:i])
        raise AnnotationError(f"two of the model's classes are called {double!r}; give them different names")
    if all(map(str.isdecimal, annotations.classes)) and not any(map(str.isdecimal, classes)):
        number = {str(i): i for i in range(len(classes))}
    if unknown := [name for name in annotations.classes if name not in number]:
        raise AnnotationError(
            f"{len(unknown)} of {number_of(len(annotations.classes), 'class')} of the dataset are none of the model's "
            f"{len(number)}: {', '.join(unknown[:5])}; the model has {', '.join(list(classes)[:5])}, ..."
        )
    return annotations.renumbered([number[name] for name in annotations.classes], classes)


def _folders(root: Path, annotations: Path, subset: str, split: int) -> Annotations:
    if root.is_dir() and is_one_folder(root):
        return read_folders(root)
    folder = next((root / name for name in PARTS[subset] if (root / name).is_dir()), None)
    if folder is None:
        raise AnnotationError(
            f"{root} has no folder {subset!r}; wanted {root}/{subset}/<class>/<video>.mp4, or one folder of classes, "
            "which `train` splits itself"
        )
    train = root / "train"
    classes = class_folders(train) if train.is_dir() else None
    own = class_folders(folder)
    if classes and (unknown := sorted(set(own) - set(classes))):
        raise AnnotationError(f"{folder} has classes that {train} lacks: {', '.join(unknown[:5])}")
    return read_folders(folder, classes)


def _list(root: Path, annotations: Path, subset: str, split: int) -> Annotations:
    file = _find(annotations, _list_names(subset))
    train = _train_list(file)
    if not train or train == file:
        return read_list(file, root, subset=subset)
    listed = parse_list(train, root, "train")  # its videos needn't exist
    return read_list(file, root, classes_of(listed.rows), subset, listed.is_multilabel)


def _list_names(*subsets: str) -> list[str]:
    return [f"{name}{suffix}" for subset in subsets for name in PARTS[subset] for suffix in LIST_SUFFIXES]


def _kinetics(root: Path, annotations: Path, subset: str, split: int) -> Annotations:
    file = _find(annotations, [f"{name}.csv" for name in PARTS[subset]])
    train = file.with_name("train.csv")
    return read_kinetics(file, root, classes_of(kinetics_rows(train)) if train.is_file() else None)


def _train_list(file: Path) -> Path | None:
    """The training list beside a list, if possible with the same suffix."""
    names = [file.with_name("train" + suffix) for suffix in (file.suffix, *LIST_SUFFIXES)]
    return next((path for path in names if path.is_file()), None)


def _ssv2(root: Path, annotations: Path, subset: str, split: int) -> Annotations:
    if subset == "test":
        raise AnnotationError("Something-Something V2's test labels aren't public; take the subset val")
    name = {"train": "train.json", "val": "validation.json"}[subset]
    file, labels = (_find(annotations, [n, f"something-something-v2-{n}"]) for n in (name, "labels.json"))
    return read_ssv2(file, root, labels)


def _hmdb51(root: Path, annotations: Path, subset: str, split: int) -> Annotations:
    file = next(iter(sorted(annotations.rglob(f"*_test_split{split}.txt"))), annotations / "x")
    return read_hmdb51(root, file.parent, split, subset)


def _breakfast(root: Path, annotations: Path, subset: str, split: int) -> Annotations:
    return read_breakfast(root, split, subset)


def _huggingface(root: Path, annotations: Path, subset: str, split: int) -> Annotations:
    parts = load_huggingface(root)
    name = next((name for name in PARTS[subset] if name in parts), None)
    if name is None:
        raise AnnotationError(f"{root} has the splits {', '.join(parts)}; there is no {subset!r} among them")
    classes = classes_in(parts["train"]) if "train" in parts else None
    return read_huggingface(parts[name], classes=classes)


def _unlabelled(root: Path, annotations: Path, subset: str, split: int) -> Annotations:
    folder = next((root / name for name in PARTS[subset] if (root / name).is_dir()), None)
    if folder is None:
        raise AnnotationError(f"{root} has no folder {subset!r}")
    if subset != "train":
        return read_folders(folder)
    if not (files := video_files(folder)):
        raise AnnotationError(f"{folder} holds no videos")
    return Annotations([(path, 0) for path in files], [], [])


def _film(path: Path, label: str) -> str:
    """Of a video of HMDB-51: `<source>_<class>_<body>_<camera>_<people>_<view>_<quality>_<number>`."""
    return path.stem.rpartition(f"_{label}_")[0] or path.stem


def _participant(path: Path, label: str) -> str:
    return next(part for part in reversed(path.parts[:-1]) if part[:1] == "P" and part[1:].isdigit())


# Layouts without videos for validation, and what tells the source of a video.
SOURCES: dict[str, Callable[[Path, str], str]] = {"hmdb51": _film, "breakfast": _participant}
LAYOUTS = {
    "folders": _folders,
    "list": _list,
    "kinetics": _kinetics,
    "ssv2": _ssv2,
    "hmdb51": _hmdb51,
    "breakfast": _breakfast,
    "huggingface": _huggingface,
    "unlabelled": _unlabelled,
}


def _signs(root: Path, annotations: Path) -> Iterator[tuple[str, Path | None]]:
    """Layouts and the file by which each is recognised, or None."""
    folders = [annotations, *(annotations / name for name in class_folders(annotations))]
    files = sorted((p for folder in folders for p in folder.iterdir() if p.is_file()), key=lambda p: len(p.parts))

    def first(*endings: str) -> Path | None:
        return next((file for file in files if file.name.endswith(endings)), None)

    listed = next((file for file in files if file.name in _list_names("train", "val")), None)
    is_kinetics = listed is not None and listed.suffix == ".csv" and _has_header(listed, "youtube_id")
    yield "ssv2", first("labels.json") and first("train.json", "validation.json")
    yield "hmdb51", first("_test_split1.txt")
    yield "kinetics", listed if is_kinetics else None
    yield "list", None if is_kinetics else listed
    yield "huggingface", first("dataset_dict.json", "state.json", ".parquet", "metadata.jsonl", "metadata.csv")
    yield "breakfast", next(_breakfast_videos(root), None)


def _has_header(file: Path, column: str) -> bool:
    return column in next(csv.reader(read_text(file).splitlines()), [])


def _breakfast_videos(root: Path) -> Iterator[Path]:
    for person in root.glob("P[0-9][0-9]"):
        yield from (p for p in video_files(person) if p.stem.removesuffix("_ch0").rpartition("_")[2] in BREAKFAST)


def _find(folder: Path, names: list[str]) -> Path:
    """The file of one of these names in the folder, or the shallowest below it."""
    if not folder.is_dir():
        raise AnnotationError(f"{folder} is no folder")
    found = _named(folder, names)
    if not found:
        raise AnnotationError(f"{folder} holds no {' or '.join(names[:2])}; name the folder of the annotation files")
    return min(found, key=lambda path: (len(path.parts), names.index(path.name), path))


def _named(folder: Path, names: list[str]) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name in names and path.is_file()]
