"""Whole datasets by the name of their layout: official trees with real encoded files, damaged ones among them."""

import json
from pathlib import Path

import pytest
from videos import write_frames, write_video

from etmamba_timm.data import (
    SOURCES,
    AnnotationError,
    Clip,
    EvalClips,
    EvalTransform,
    find_layout,
    is_one_folder,
    is_undivided,
    read_dataset,
    with_classes,
)


def video(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".mp4": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4"}[path.suffix]
    write_video(path, 9, codec=codec)


def kinetics(root: Path) -> None:
    for part in ("train", "val"):
        rows = [f"{label},{part}{label[0]}id,3,13,{part}" for label in ("zumba", "archery")][
            : 2 if part == "train" else 1
        ]
        (root / f"{part}.csv").write_text("label,youtube_id,time_start,time_end,split\n" + "\n".join(rows) + "\n")
        for label in ("zumba", "archery"):
            video(root / part / label / f"{part}{label[0]}id_000003_000013.mp4")


def ssv2(root: Path) -> None:
    (root / "labels").mkdir()
    (root / "labels" / "labels.json").write_text(json.dumps({"Closing something": "0", "Opening something": "1"}))
    for name, ids in (("train", ("1", "2")), ("validation", ("3",))):
        entries = [{"id": i, "label": "x", "template": "Opening [something]"} for i in ids]
        (root / "labels" / f"{name}.json").write_text(json.dumps(entries))
        for i in ids:
            video(root / "20bn-something-something-v2" / f"{i}.webm")


def hmdb51(root: Path) -> None:
    for label in ("wave", "brush_hair"):
        for split in (1, 2, 3):
            file = root / "testTrainMulti_7030_splits" / f"{label}_test_split{split}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{label}_a.avi 1 \n{label}_b.avi 2 \n{label}_c.avi 0 \n")
        for letter in "abc":
            video(root / label / f"{label}_{letter}.avi")


def breakfast(root: Path) -> None:
    for person in ("P03", "P20"):
        video(root / person / "cam01" / f"{person}_tea.avi")


def folders(root: Path) -> None:
    for part in ("train", "val"):
        for label in ("a", "b"):
            video(root / part / label / "1.mp4")
        (root / part / ".cache").mkdir()


def listed(root: Path) -> None:
    for part in ("train", "val"):
        video(root / f"{part}.mp4")
        (root / f"{part}.csv").write_text(f"{part}.mp4 {'7' if part == 'train' else '3'}\n")


TREES = {
    "kinetics": (kinetics, 2, 1, ["archery", "zumba"]),
    "ssv2": (ssv2, 2, 1, ["Closing something", "Opening something"]),
    "hmdb51": (hmdb51, 2, 2, ["brush_hair", "wave"]),
    "breakfast": (breakfast, 1, 1, None),
    "folders": (folders, 2, 2, ["a", "b"]),
    "list": (listed, 1, 1, [str(i) for i in range(8)]),
}


@pytest.mark.parametrize("frames", [False, True], ids=["files", "frames"])
@pytest.mark.parametrize("layout", TREES)
def test_official_trees(layout, frames, tmp_path, caplog):
    """Each video is a file, or a folder of its frames, in a list by the name that it gives."""
    make, num_train, num_val, classes = TREES[layout]
    make(tmp_path)
    for path in [path for path in tmp_path.rglob("*") if frames and path.suffix in (".mp4", ".webm", ".avi")]:
        path.unlink()
        write_frames(path if layout == "list" else path.with_suffix(""), 9)
    train, val = (read_dataset(layout, tmp_path, part) for part in ("train", "test" if layout in SOURCES else "val"))
    assert (len(train.samples), len(val.samples)) == (num_train, num_val)
    assert train.classes == val.classes
    assert classes is None or train.classes == classes
    if layout == "kinetics":  # numbered as in training, though the list of this part has one class alone
        assert val.samples[0][1] == 1
    clips = EvalClips(val, EvalTransform((32, 32)), Clip(4, 2))
    assert clips[0]["clip"].shape == (1, 3, 4, 32, 32)
    path = val.samples[0][0]
    for file in path.iterdir() if frames else [path]:
        file.write_bytes(file.read_bytes()[:100])
    assert clips[0] is None
    assert str(path) in caplog.text


@pytest.mark.parametrize("layout", TREES)
def test_layouts_are_found(layout, tmp_path):
    """Kinetics' official tree has folders of classes too, and HMDB-51's is one folder of classes with lists."""
    TREES[layout][0](tmp_path)
    assert find_layout(tmp_path) == layout


def test_lists_elsewhere_decide_the_layout(tmp_path):
    folders(tmp_path / "videos")
    assert find_layout(tmp_path / "videos") == "folders"
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text("train/a/1.mp4 0\n")
    assert find_layout(tmp_path / "videos", tmp_path / "lists") == "list"
    (tmp_path / "lists" / "wave_test_split1.txt").touch()
    with pytest.raises(
        AnnotationError, match=r"wave_test_split1.txt \(hmdb51\) and .*train.txt \(list\); choose one by"
    ):
        find_layout(tmp_path / "videos", tmp_path / "lists")


def test_one_folder_of_classes(tmp_path):
    for name in ("bus", "train"):  # a class may be called like a part
        video(tmp_path / name / "1.mp4")
    assert find_layout(tmp_path) == "folders"
    assert is_one_folder(tmp_path)
    for subset in ("train", "val"):
        assert [path.parent.name for path, _ in read_dataset("folders", tmp_path, subset).samples] == ["bus", "train"]


def test_one_list(tmp_path):
    video(tmp_path / "1.mp4")
    (tmp_path / "train.csv").write_text("1.mp4,a\n")
    (tmp_path / "run" / "split").mkdir(parents=True)
    for folder in (tmp_path / "run", tmp_path / "run" / "split"):  # logs and split of a run in the same folder
        for name in ("train.csv", "val.csv"):
            (folder / name).touch()
    assert is_undivided("list", tmp_path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "validation.txt").write_text("1.mp4,a\n")
    assert not is_undivided("list", tmp_path)
    with pytest.raises(AnnotationError, match=r"lists holds no train.csv or train.txt"):
        is_undivided("list", tmp_path, tmp_path / "lists")


def test_parts_without_classes_are_no_classes(tmp_path):
    for name in ("train", "val"):
        video(tmp_path / name / "1.mp4")
    assert not is_one_folder(tmp_path)
    with pytest.raises(AnnotationError, match="holds no videos in folders of classes"):
        read_dataset("folders", tmp_path)


def test_what_is_no_dataset(tmp_path):
    video(tmp_path / "1.mp4")
    with pytest.raises(AnnotationError, match=f"{tmp_path} isn't recognised as a dataset. Looked for videos in"):
        find_layout(tmp_path)
    with pytest.raises(AnnotationError, match="x is no folder"):
        find_layout(tmp_path / "x")


def test_lists_may_lie_elsewhere(tmp_path):
    kinetics(tmp_path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "train.csv").rename(tmp_path / "lists" / "train.csv")
    read = read_dataset("kinetics", tmp_path / "train", annotations=tmp_path / "lists")
    assert len(read.samples) == 2
    with pytest.raises(AnnotationError, match="holds no test.csv"):
        read_dataset("kinetics", tmp_path, "test")


def test_splits(tmp_path):
    breakfast(tmp_path)
    assert read_dataset("breakfast", tmp_path, "test", split=1).samples[0][0].name == "P03_tea.avi"
    assert read_dataset("breakfast", tmp_path, "test", split=2).samples[0][0].name == "P20_tea.avi"


def test_sources():
    hmdb51, breakfast = SOURCES["hmdb51"], SOURCES["breakfast"]
    assert hmdb51(Path("x/walk/A_walk_in_walk_f_cm_np1_le_med_33.avi"), "walk") == "A_walk_in"
    assert hmdb51(Path("x/brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi"), "brush_hair") == "April_09"
    assert breakfast(Path("P99/Breakfast/P03/cam01/P03_cereals.avi"), "cereals") == "P03"


def test_what_cannot_be(tmp_path):
    folders(tmp_path)
    for layout, subset, said in (
        ("ucf101", "train", "no layout 'ucf101'; there are folders, list, kinetics"),
        ("folders", "dev", "no subset 'dev'; there are train, val, test"),
        ("folders", "test", f"wanted {tmp_path}/test/<class>/<video>.mp4"),
        ("ssv2", "test", "labels aren't public"),
        ("ssv2", "val", "holds no validation.json"),
        ("hmdb51", "test", "holds no <class>_test_split1.txt"),
        ("hmdb51", "val", "the layout hmdb51 has no videos for validation: .* Take the subset test"),
    ):
        with pytest.raises(AnnotationError, match=said):
            read_dataset(layout, tmp_path, subset)
    (tmp_path / "val" / "c").mkdir()
    with pytest.raises(AnnotationError, match="has classes that .*train lacks: c"):
        read_dataset("folders", tmp_path, "val")


def test_classes_as_the_models(tmp_path):
    folders(tmp_path)
    read = with_classes(read_dataset("folders", tmp_path, "val"), ["b", "x", "a"])
    assert [(path.parent.name, label) for path, label in read.samples] == [("a", 2), ("b", 0)]
    assert read.classes == ["b", "x", "a"]
    with pytest.raises(AnnotationError, match="1 of 2 classes of the dataset are none of the model's 2: b"):
        with_classes(read_dataset("folders", tmp_path, "val"), ["a", "x"])
    with pytest.raises(AnnotationError, match="two of the model's classes are called 'a'"):
        with_classes(read, ["a", "b", "a"])


def test_videos_without_labels(tmp_path):
    video(tmp_path / "train" / "x" / "y" / "1.mp4")
    video(tmp_path / "train" / "2.mp4")
    video(tmp_path / "val" / "a" / "3.mp4")
    read = read_dataset("unlabelled", tmp_path)
    assert [(path.name, label) for path, label in read.samples] == [("2.mp4", 0), ("1.mp4", 0)]
    assert read.classes == []
    assert read_dataset("unlabelled", tmp_path, "val").classes == ["a"]
    with pytest.raises(AnnotationError, match="has no folder 'test'"):
        read_dataset("unlabelled", tmp_path, "test")
    (tmp_path / "val" / "a" / "3.mp4").rename(tmp_path / "3.mp4")
    (tmp_path / "val").rename(tmp_path / "train" / "z")
    for path in (tmp_path / "train").rglob("*.mp4"):
        path.unlink()
    with pytest.raises(AnnotationError, match="train holds no videos"):
        read_dataset("unlabelled", tmp_path)


def test_numbers_are_places_among_the_models_names(tmp_path):
    listed(tmp_path)
    read = with_classes(read_dataset("list", tmp_path, "val"), [f"class {i}" for i in range(9)])
    assert [label for _, label in read.samples] == [3]
    assert read.classes[3] == "class 3"
