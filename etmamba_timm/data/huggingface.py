"""Videos of a Hugging Face dataset, whose rows name files or contain the videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .annotations import AnnotationError, Annotations, classes_of, from_rows
from .embedded import EmbeddedVideo, VideoFile

if TYPE_CHECKING:
    import datasets

AT_ONCE = 1000  # rows read at a time
_LISTS = "give lists of numbers or names, as by map: [i for i, value in enumerate(row) if value]"


def read_huggingface(
    dataset: datasets.Dataset, video: str = "video", label: str = "label", classes: list[str] | None = None
) -> Annotations:
    """A split of a Hugging Face dataset. torchcodec, with which `datasets` would decode, isn't needed.

    Videos inside the rows (as in Parquet files) stay there until they are read; the file of such a sample is an
    `EmbeddedVideo`.

    Args:
        dataset: one split, not streamed.
        video: its column of the type `Video`.
        label: its column of classes: `ClassLabel`, whole numbers, or names; or lists of these, for videos with several
            labels.
        classes: names of the classes; by default those of `ClassLabel`, or the labels in alphabetical order.

    Raises:
        AnnotationError: not a split of a dataset, other columns, a row without a label, or most videos missing.
    """
    library = _library()
    if not isinstance(dataset, library.Dataset):
        raise AnnotationError(f"the dataset is a {type(dataset).__name__}; give one split of it, not streamed")
    source = f"the Hugging Face dataset {dataset.info.dataset_name or ''}".rstrip()
    kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    if kinds.get(video) != "Video" or label not in kinds:
        raise AnnotationError(
            f"{source} has the columns {kinds}; wanted {video!r} of the type Video, and {label!r}: name them, and make "
            "one of paths a Video by cast_column"
        )
    classes = classes or _names(dataset.features[label])
    videos = _videos(dataset.select_columns(video).with_format("arrow"))
    return from_rows(
        list(zip(videos, labels_of(dataset, label), strict=True)),
        classes,
        lambda found: found,
        source,
        lambda: "prepare the dataset again, or save it with the videos in it",
    )


def labels_of(dataset: datasets.Dataset, label: str) -> list[str | tuple[str, ...]]:
    """The label of each row, or a tuple of its labels: the names from `ClassLabel`, or the values as text."""
    values = dataset.select_columns(label).with_format(None)[:][label]
    names = _names(dataset.features[label])
    for row, value in enumerate(values):
        for one in value if isinstance(value, list) else [value]:
            if one is None or (isinstance(one, int) and one < 0):
                raise AnnotationError(
                    f"row {row} has the label {value}: it isn't labelled; leave such rows out by filter"
                )
            if isinstance(value, list) and (isinstance(one, bool) or not isinstance(one, (int, str))):
                raise AnnotationError(f"row {row} has the labels {value}; {_LISTS}")
    lengths = {len(value) if isinstance(value, list) else 0 for value in values}
    if not names and len(lengths) == 1 and max(lengths) > 1 and {one for value in values for one in value} <= {0, 1}:
        raise AnnotationError(f"rows have labels such as {values[0]}, ones and zeros for each class; {_LISTS}")

    def named(value: int | str) -> str:
        return str(names[int(value)] if names else value)

    return [tuple(map(named, value)) if isinstance(value, list) else named(value) for value in values]


def load_huggingface(root: str | Path) -> dict[str, datasets.Dataset]:
    """The splits in a folder that save_to_disk wrote, or that load_dataset reads (Parquet files, videos).

    `datasets` copies the latter to its cache (HF_DATASETS_CACHE), including videos inside the rows.
    """
    library, root = _library(), Path(root)
    if not root.is_dir():
        raise AnnotationError(f"{root} is no folder; of a dataset on the Hub, give a split to read_huggingface")
    try:
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            loaded = library.load_from_disk(root)
        else:
            loaded = library.load_dataset(str(root.absolute()))
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        raise AnnotationError(f"{root} can't be loaded as a Hugging Face dataset: {error}") from error
    return {str(loaded.split or "train"): loaded} if isinstance(loaded, library.Dataset) else dict(loaded)


def classes_in(dataset: datasets.Dataset, label: str = "label") -> list[str]:
    """The classes of a split, in the order of their numbers."""
    return _names(dataset.features.get(label)) or classes_of([(None, found) for found in labels_of(dataset, label)])


def _names(feature: Any) -> list[str] | None:
    """The names of a `ClassLabel`, or of a list of them."""
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return list(names) if names else None


def _videos(rows: datasets.Dataset) -> list[VideoFile]:
    """The video of each row; the rows are Arrow tables of the column of videos."""
    videos: list[VideoFile] = []
    for start in range(0, len(rows), AT_ONCE):
        for part in rows[start : start + AT_ONCE].column(0).chunks:
            held = part.field("bytes").is_valid().to_pylist()  # without reading the bytes
            for has_bytes, path in zip(held, part.field("path").to_pylist(), strict=True):
                row = len(videos)
                # A row with neither is a file that isn't there, to be counted as missing.
                videos.append(EmbeddedVideo(rows, row, path) if has_bytes else Path(path or f"row {row}, empty"))
    return videos


def _library():
    try:
        import datasets
    except ImportError as error:
        raise AnnotationError(
            "Hugging Face datasets need the package datasets: pip install 'etmamba-timm[datasets]'"
        ) from error
    return datasets
