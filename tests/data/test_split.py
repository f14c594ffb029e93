"""One folder of classes split into training and validation videos, and the split read back."""

from collections import Counter
from pathlib import Path

import pytest

from etmamba_timm.data import AnnotationError, Annotations, read_dataset, read_split, split_videos, write_split
from etmamba_timm.data.annotations import read_folders

CLASSES = {"10": 1, "2": 2, "a, b; c|d": 5, "walk": 12}


@pytest.fixture
def root(tmp_path) -> Path:
    """Empty files, as nothing is decoded; some names are hard to write into a list."""
    for name, count in CLASSES.items():
        (tmp_path / "clips" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "clips" / name / f'{i} "x", y.mp4').touch()
    return tmp_path / "clips"


def counts(part: Annotations) -> list[int]:
    return [sum(label == i for _, label in part.samples) for i in range(len(part.classes))]


def test_each_class_is_split(root):
    videos = read_folders(root)
    train, val = split_videos(videos)
    assert (counts(train), counts(val)) == ([1, 1, 4, 9], [0, 1, 1, 3])
    assert sorted(train.samples + val.samples) == sorted(videos.samples)
    assert train.classes == val.classes == videos.classes
    assert split_videos(videos) == (train, val)
    assert split_videos(videos, seed=1) != (train, val)


def test_several_labels_are_split_by_the_rarest_and_read_back(tmp_path):
    """Class 2 is rare, and its videos are all of class 0 too; five have no label."""
    labels = [(0,)] * 20 + [(0, 1)] * 10 + [(0, 2)] * 5 + [()] * 5
    files = [tmp_path / f"{i} x;y.mp4" for i in range(len(labels))]
    for file in files:
        file.touch()
    videos = Annotations(list(zip(files, labels, strict=True)), ["a", "b", "c"], [])
    parts = split_videos(videos)
    assert [Counter(label for _, label in part.samples) for part in parts] == [
        {(0,): 16, (0, 1): 8, (0, 2): 4, (): 4},
        {(0,): 4, (0, 1): 2, (0, 2): 1, (): 1},
    ]
    write_split(tmp_path / "split", tmp_path / "elsewhere", *parts)  # of a list of absolute paths
    write_split(tmp_path / "split", tmp_path, *parts)
    assert (tmp_path / "split" / "val.csv").read_text().startswith("video,labels\n")
    assert read_split(tmp_path / "split", tmp_path, videos.classes) == parts
    for subset, part in zip(("train", "val"), parts, strict=True):
        assert read_dataset("list", tmp_path, subset, annotations=tmp_path / "split") == part


def test_videos_of_one_source_stay_together():
    """Films of one to nine clips, some with both classes: the first 4 of 20 clips' worth of films that fits."""
    clips = [(Path(f"{film}_run_{i}.mp4"), 0) for film in range(8) for i in range(film + 1)]
    clips += [(Path(f"{film}_walk_{i}.mp4"), 1) for film in range(4, 12) for i in range(3)]
    videos = Annotations(clips, ["run", "walk"], ["gone.mp4"])

    def films(part: Annotations) -> set[str]:
        return {path.name.partition("_")[0] for path, _ in part.samples}

    for seed in range(10):
        train, val = split_videos(videos, seed, lambda path, label: path.stem.partition(f"_{label}_")[0])
        assert not films(train) & films(val)
        assert sorted(train.samples + val.samples) == sorted(clips)
        of_run, of_walk = counts(val)
        assert 1 <= of_run <= 8  # a fifth of 36, rounded up
        assert of_walk in (0, 3)  # a fifth of 24 is 5: one film
        assert train.missing == ["gone.mp4"]


def test_the_split_is_read_back(root, tmp_path):
    videos = read_folders(root)
    parts = split_videos(videos)
    write_split(tmp_path / "split", root, *parts)
    (root / "walk" / "new.mp4").touch()
    assert read_split(tmp_path / "split", root, videos.classes) == parts
    assert {p.name for p in (tmp_path / "split").iterdir()} == {"train.csv", "val.csv"}


def test_the_lists_are_a_dataset(tmp_path):
    for name in ("jump", "run"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "clips" / name / f"{i}.mp4").touch()
    root = tmp_path / "clips"
    parts = split_videos(read_folders(root))
    write_split(tmp_path / "split", root, *parts)
    for subset, part in zip(("train", "val"), parts, strict=True):
        assert read_dataset("list", root, subset, annotations=tmp_path / "split") == part


def test_damaged_lists(root, tmp_path):
    write_split(tmp_path / "split", root, *split_videos(read_folders(root)))
    (tmp_path / "split" / "val.csv").write_text("video,label\nwalk/1.mp4\n")
    with pytest.raises(AnnotationError, match="'walk/1.mp4' isn't video,label; start a run in another folder"):
        read_split(tmp_path / "split", root, list(CLASSES))
