"""Hugging Face datasets of real encoded videos: files that rows name, and videos within the rows."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader
from videos import numbers, write_video

from etmamba_timm.data import (
    AnnotationError,
    Clip,
    EvalClips,
    EvalTransform,
    VideoError,
    VideoReader,
    collate,
    find_layout,
    read_dataset,
    read_huggingface,
)

datasets = pytest.importorskip("datasets", reason="needs the package datasets")
FORMATS = {"a.mp4": "libx264", "b.webm": "libvpx-vp9", "c.avi": "mpeg4"}
LABELS = [1, 0, 1]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Videos of 20 frames that count from 0, 100 and 200."""
    folder = tmp_path_factory.mktemp("files")
    return [
        write_video(folder / name, 20, codec=codec, first_number=100 * i)
        for i, (name, codec) in enumerate(FORMATS.items())
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def dataset(files, cache) -> "datasets.Dataset":
    """Rows that name the files."""
    return of(video=[str(path) for path in files], label=LABELS)


def of(video: list, label: list, names: list[str] | None = ("sit", "run")) -> "datasets.Dataset":
    made = datasets.Dataset.from_dict({"video": video, "label": label}).cast_column("video", datasets.Video())
    return made.cast_column("label", datasets.ClassLabel(names=list(names))) if names else made


def parquet(files: list[Path], path: Path) -> Path:
    """A file of rows that hold the videos, as push_to_hub writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    of([{"path": file.name, "bytes": file.read_bytes()} for file in files], LABELS).to_parquet(path)
    return path


def firsts(annotations) -> list[int]:
    """The number painted on each video's first frame."""
    return [numbers(VideoReader(path).read([0]))[0] for path, _ in annotations.samples]


def test_rows_that_name_files(dataset, files):
    read = read_huggingface(dataset)
    assert read.samples == list(zip(files, LABELS, strict=True))
    assert (read.classes, read.missing) == (["sit", "run"], [])
    assert [label for _, label in read_huggingface(dataset, classes=["run", "jump", "sit"]).samples] == [0, 2, 0]


def test_saved_to_disk(dataset, tmp_path):
    """save_to_disk takes the files in."""
    parts = datasets.DatasetDict({"train": dataset, "validation": dataset.select([2])})
    parts.save_to_disk(tmp_path / "saved")
    assert find_layout(tmp_path / "saved") == "huggingface"
    assert firsts(read_dataset("huggingface", tmp_path / "saved")) == [0, 100, 200]
    assert firsts(read_dataset("huggingface", tmp_path / "saved", "val")) == [200]
    with pytest.raises(AnnotationError, match="splits train, validation; there is no 'test'"):
        read_dataset("huggingface", tmp_path / "saved", "test")
    dataset.save_to_disk(tmp_path / "alone")
    assert len(read_dataset("huggingface", tmp_path / "alone").samples) == 3


def test_folders_of_videos(files, dataset, tmp_path):
    for path, label in zip(files[::2], ("run", "sit"), strict=True):  # `datasets` overlooks webm there
        (tmp_path / "videos" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / label / path.name).write_bytes(path.read_bytes())
    read = read_huggingface(datasets.load_dataset("videofolder", data_dir=str(tmp_path / "videos"), split="train"))
    assert {(path.name, read.classes[label]) for path, label in read.samples} == {
        ("a.mp4", "run"),
        ("c.avi", "sit"),
    }


def test_videos_in_rows(files, cache, tmp_path, monkeypatch):
    folder = parquet(files, tmp_path / "hub" / "data" / "train-00000.parquet").parent.parent
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"not the one in the row")
    assert find_layout(folder) == "huggingface"
    read = read_dataset("huggingface", folder)
    assert firsts(read) == [0, 100, 200]
    assert [label for _, label in read.samples] == LABELS
    assert read.classes == ["sit", "run"]
    assert str(read.samples[1][0]) == "row 1 (b.webm)"
    for path, _ in read.samples:
        assert numbers(VideoReader(path).read([19, 3, 11])) == [100 * path.row + n for n in (19, 3, 11)]


def test_shuffled_and_selected_rows(files, cache, tmp_path):
    loaded = datasets.Dataset.from_parquet(str(parquet(files, tmp_path / "train.parquet")))
    assert firsts(read_huggingface(loaded.select([2, 0]))) == [200, 0]
    assert firsts(read_huggingface(loaded.filter(lambda label: label == 1, input_columns="label"))) == [0, 200]


def test_workers(files, cache, tmp_path):
    loaded = datasets.Dataset.from_parquet(str(parquet(files, tmp_path / "train.parquet")))
    read = read_huggingface(loaded)
    clips = EvalClips(read, EvalTransform((32, 32)), Clip(4, 2))
    there = list(DataLoader(clips, 1, num_workers=1, collate_fn=collate, multiprocessing_context="spawn"))
    here = list(DataLoader(clips, 1, collate_fn=collate))
    assert [b["label"].item() for b in there] == LABELS
    assert all((a["clip"] == b["clip"]).all() for a, b in zip(there, here, strict=True))
    assert firsts(pickle.loads(pickle.dumps(read))) == [0, 100, 200]


def test_pickling_leaves_the_bytes_on_disk(files, cache, tmp_path):
    loaded = datasets.Dataset.from_parquet(str(parquet(files, tmp_path / "train.parquet")))
    in_memory = len(pickle.dumps(read_huggingface(loaded.with_format("arrow").map(keep_in_memory=True))))
    assert len(pickle.dumps(read_huggingface(loaded))) < in_memory / 2


def test_a_damaged_video_is_told_by_its_row(files):
    made = of([{"path": "bad.mp4", "bytes": files[0].read_bytes()[:200]}, {"path": None, "bytes": b""}], [0, 1])
    (bad, _), (empty, _) = read_huggingface(made).samples
    with pytest.raises(VideoError, match=r"row 0 \(bad.mp4\): cannot be read as a video"):
        VideoReader(bad)
    with pytest.raises(VideoError, match=r"row 1: the file is empty"):
        VideoReader(empty)


def test_missing_videos_are_counted(files, caplog):
    made = of([str(files[0]), str(files[1]), "gone.mp4", None], [0, 1, 1, 0])
    read = read_huggingface(made)
    assert read.samples == [(files[0], 0), (files[1], 1)]
    assert read.missing == ["gone.mp4", "row 3, empty"]
    assert "2 of 4 videos missing and left out" in caplog.text
    with pytest.raises(AnnotationError, match="lists 3 videos, 2 of which aren't there.*save it with the videos in it"):
        read_huggingface(made.select([0, 2, 3]))


@pytest.mark.parametrize(
    ("labels", "classes", "numbered"),
    [(["walk", "run"], ["run", "walk"], [1, 0]), ([2, 0], ["0", "1", "2"], [2, 0]), (["7", "3"], None, [7, 3])],
)
def test_labels_that_are_no_classlabel(files, labels, classes, numbered):
    read = read_huggingface(of([str(path) for path in files[:2]], labels, None))
    assert [label for _, label in read.samples] == numbered
    assert read.classes == (classes or [str(i) for i in range(8)])


@pytest.mark.parametrize("names", [("sit", "run"), None])
def test_several_labels(names, files, cache, tmp_path):
    labels = [[1, 0], [], [1]] if names else [["run", "sit"], [], ["run"]]
    made = datasets.Dataset.from_dict({"video": [str(path) for path in files], "label": labels})
    made = made.cast_column("video", datasets.Video())
    if names:
        made = made.cast_column("label", datasets.Sequence(datasets.ClassLabel(names=list(names))))
    found = read_huggingface(made)
    assert found.is_multilabel
    named = [{found.classes[i] for i in label} for _, label in found.samples]
    assert named == [{"run", "sit"}, set(), {"run"}]
    datasets.DatasetDict(train=made, validation=made.select([2])).save_to_disk(tmp_path / "saved")
    other = read_dataset("huggingface", tmp_path / "saved", "val")
    assert other.classes == found.classes == (list(names) if names else ["run", "sit"])
    assert other.samples[0][1] == (found.classes.index("run"),)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [[0, 1, 0], [1, 0, 0], [1, 1, 0]],
            r"labels such as \[0, 1, 0\], ones and zeros for each class; give lists of",
        ),
        ([[True, False], [True, True], [False, False]], r"row 0 has the labels \[True, False\]; give lists of"),
        ([[0.0, 1.0], [], []], r"row 0 has the labels \[0.0, 1.0\]; give lists of"),
        ([[["run"]], [], []], r"row 0 has the labels \[\['run'\]\]; give lists of"),
    ],
)
def test_lists_that_hold_no_labels(labels, message, files, cache):
    with pytest.raises(AnnotationError, match=message):
        read_huggingface(of([str(path) for path in files], labels, None))


def test_other_parts_are_numbered_as_train(dataset, files, tmp_path):
    train = of([str(path) for path in files], ["sit", "run", "jump"], None)
    datasets.DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(tmp_path / "saved")
    read = read_dataset("huggingface", tmp_path / "saved", "test")
    assert (read.classes, [label for _, label in read.samples]) == (["jump", "run", "sit"], [2])


def test_what_is_no_labelled_video_dataset(dataset, tmp_path):
    with pytest.raises(AnnotationError, match="row 1 has the label None"):
        read_huggingface(of(["a.mp4", "b.mp4"], [0, None], None))
    with pytest.raises(AnnotationError, match="row 0 has the label -1"):
        read_huggingface(of(["a.mp4"], [-1], None))
    with pytest.raises(AnnotationError, match=r"columns {'video': 'Video', 'label': 'ClassLabel'}; wanted 'clip'"):
        read_huggingface(dataset, "clip")
    with pytest.raises(AnnotationError, match="is a IterableDataset; give one split"):
        read_huggingface(dataset.to_iterable_dataset())
    with pytest.raises(AnnotationError, match="is a DatasetDict; give one split"):
        read_huggingface(datasets.DatasetDict({"train": dataset}))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(AnnotationError, match="nothing can't be loaded as a Hugging Face dataset"):
        read_dataset("huggingface", tmp_path / "nothing")


def test_without_the_package(tmp_path):
    code = """
import sys
sys.modules["datasets"] = None  # not installed
from etmamba_timm.data import read_huggingface
read_huggingface(None)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "AnnotationError: Hugging Face datasets need the package datasets" in done.stderr
    assert "pip install 'etmamba-timm[datasets]'" in done.stderr
