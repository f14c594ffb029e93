"""Each dataset's official files, in small trees of their official layout. Nothing is decoded, so files may be empty."""

import json
from pathlib import Path

import pytest

from etmamba_timm.data import (
    AnnotationError,
    read_breakfast,
    read_folders,
    read_hmdb51,
    read_kinetics,
    read_list,
    read_ssv2,
)


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def found(annotations, root: Path) -> list[tuple[str, str]]:
    """(path below root, class name) of each sample."""
    return [(path.relative_to(root).as_posix(), annotations.classes[label]) for path, label in annotations.samples]


def test_folders(tmp_path):
    root = tree(tmp_path, "run/b.mp4", "run/a.WEBM", "jump/x/c.avi", "jump/notes.txt", "loose.mp4")
    tree(tmp_path, ".cache/a.mp4", "run/._b.mp4", "run/.partial/c.mp4")  # what other programs leave
    read = read_folders(root)
    assert read.classes == ["jump", "run"]
    assert found(read, root) == [("jump/x/c.avi", "jump"), ("run/a.WEBM", "run"), ("run/b.mp4", "run")]
    assert found(read_folders(root, ["run", "jump"]), root)[0] == ("run/a.WEBM", "run")
    with pytest.raises(AnnotationError, match="holds no videos in folders of classes"):
        read_folders(tree(tmp_path / "empty", "class/readme.md"))
    with pytest.raises(AnnotationError, match="is no folder"):
        read_folders(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        "a b.mp4 0\nsub/c.mp4 2\n",
        "a b.mp4,0\nsub/c.mp4,2\n",
        "# a comment\n\nvideo,label\na b.mp4,0\nsub/c.mp4,2",
        '"a b.mp4"\t0\n"sub/c.mp4"\t2',
        "\ufeffa b.mp4 0\r\nsub/c.mp4 2\r\n",
        "path,class_id\na b.mp4,0\nsub/c.mp4,2\n",
    ],
)
def test_list_of_numbers(tmp_path, text):
    root = tree(tmp_path, "a b.mp4", "sub/c.mp4")
    (root / "list.txt").write_text(text, encoding="utf-8")
    read = read_list(root / "list.txt")
    assert [(p.relative_to(root).as_posix(), label) for p, label in read.samples] == [("a b.mp4", 0), ("sub/c.mp4", 2)]
    assert read.classes == ["0", "1", "2"]


def test_list_of_names(tmp_path):
    root = tree(tmp_path / "videos", "a.mp4", "b.mp4")
    path = tmp_path / "list.csv"
    path.write_text("a.mp4,walk\nb.mp4,run\n")
    assert found(read_list(path, root), root) == [("a.mp4", "walk"), ("b.mp4", "run")]
    assert read_list(path, root).classes == ["run", "walk"]
    assert read_list(path, root, ["walk", "run", "sit"]).classes == ["walk", "run", "sit"]
    with pytest.raises(AnnotationError, match=r"labels \['run'\] are none of the 1 classes"):
        read_list(path, root, ["walk"])
    path.write_text('a.mp4,"Putting a, b on c"\nb.mp4,run\n')
    assert found(read_list(path, root), root) == [("a.mp4", "Putting a, b on c"), ("b.mp4", "run")]


def test_names_with_commas_in_a_list_that_spaces_separate(tmp_path):
    root = tree(tmp_path, "a.mp4", "x,y.mp4")
    (root / "list.txt").write_text("a.mp4 0\nx,y.mp4 1\n")
    assert found(read_list(root / "list.txt"), root) == [("a.mp4", "0"), ("x,y.mp4", "1")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no videos"),
        ("a.mp4 0\nlonely.mp4\n", "line 2: 'lonely.mp4' has no label"),
        ("a.mp4 0\nb.mp4 7\n", r"labels \['7'\]"),
        ("a.mp4,0\nb.mp4,\n", "line 2: 'b.mp4,' has no label"),
        ("a.mp4,0\nb.mp4,1\nb.mp4 1\n", "line 3: 'b.mp4 1' has no label"),
        ("a.mp4 -1\nb.mp4 1\na.mp4 1\n", "line 1: the label '-1' is no whole number"),
        ("a.mp4 0\nb.mp4 1\na.mp4 -1\n", "line 3: the label '-1' is no whole number, as most others are"),
    ],
)
def test_bad_lists(tmp_path, text, message):
    root = tree(tmp_path, "a.mp4", "b.mp4")
    (root / "list.txt").write_text(text)
    with pytest.raises(AnnotationError, match=message):
        read_list(root / "list.txt", classes=["zero", "one"])


def test_a_number_too_large_for_a_class(tmp_path):
    root = tree(tmp_path, "a.mp4")
    (root / "list.txt").write_text("a.mp4,3,104857600\n")
    with pytest.raises(AnnotationError, match="104857600 is a label; numbered classes end below 100000"):
        read_list(root / "list.txt")


def test_links_are_followed_and_end(tmp_path, caplog):
    root = tree(tmp_path / "root", "run/a.mp4", "jump/b.wmv", "sit/notes.txt")
    tree(tmp_path / "disk", "c.mp4")
    (root / "run" / "more").symlink_to(tmp_path / "disk")
    (root / "run" / "back").symlink_to(root / "run")
    assert found(read_folders(root), root) == [("jump/b.wmv", "jump"), ("run/a.mp4", "run"), ("run/more/c.mp4", "run")]
    assert "in 1 of 3 classes, first sit" in caplog.text


def test_missing_videos_are_counted_and_too_many_are_an_error(tmp_path, caplog):
    root = tree(tmp_path, "a.mp4", "b.mp4")
    (root / "list.txt").write_text("a.mp4 0\nb.mp4 1\ngone.mp4 1\n")
    read = read_list(root / "list.txt")
    assert [label for _, label in read.samples] == [0, 1]
    assert [Path(name).name for name in read.missing] == ["gone.mp4"]
    assert "1 of 3 videos are missing and left out" in caplog.text
    (root / "list.txt").write_text("a.mp4 0\n" + "".join(f"gone{i}.mp4 1\n" for i in range(3)))
    with pytest.raises(AnnotationError, match="lists 4 videos, 3 of which aren't there"):
        read_list(root / "list.txt")


def test_kinetics(tmp_path):
    root = tree(tmp_path / "train", "abseiling/-3B32lodo2M_000059_000069.mp4", "x9_8_000001_000011.mkv", "plain_id.mp4")
    table = tmp_path / "train.csv"
    table.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "zumba,x9_8,1,11,train\nabseiling,-3B32lodo2M,59,69,train\n"
        '"riding, or walking, with horse",plain_id,5.0,15.0,train\nzumba,gone,0,10,train\n'
    )
    read = read_kinetics(table, root)
    assert read.classes == ["abseiling", "riding, or walking, with horse", "zumba"]
    assert found(read, root) == [
        ("x9_8_000001_000011.mkv", "zumba"),
        ("abseiling/-3B32lodo2M_000059_000069.mp4", "abseiling"),
        ("plain_id.mp4", "riding, or walking, with horse"),
    ]
    assert read.missing == ["gone_000000_000010"]
    for line in ("jump,b", "jump,b,,10"):
        table.write_text(f"label,youtube_id,time_start,time_end\n{line}\n")
        with pytest.raises(AnnotationError, match="train.csv, line 2: no start and end of a video"):
            read_kinetics(table, root)
    table.write_text("name,class\na,b\n")
    with pytest.raises(AnnotationError, match=r"has the columns \['name', 'class'\]"):
        read_kinetics(table, root)


def test_ssv2(tmp_path):
    root = tree(tmp_path / "20bn-something-something-v2", "78687.webm", "42.webm")
    labels = {"Holding something next to something": "1", "Closing something": "0"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    entries = [
        {
            "id": "78687",
            "label": "holding a potato next to a bottle",
            "template": "Holding [something] next to [something]",
        },
        {"id": "42", "label": "closing a book", "template": "Closing [something]", "placeholders": ["a book"]},
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    read = read_ssv2(tmp_path / "train.json", root)
    assert read.classes == ["Closing something", "Holding something next to something"]
    assert found(read, root) == [("78687.webm", read.classes[1]), ("42.webm", read.classes[0])]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "42"}]))
    with pytest.raises(AnnotationError, match=r"aren't Something-Something V2's \(KeyError: 'template'\)"):
        read_ssv2(tmp_path / "train.json", root)


def test_hmdb51(tmp_path):
    root = tree(tmp_path / "hmdb51", "wave/one.avi", "wave/two.avi", "brush_hair/April #1 (x).avi")
    splits = tmp_path / "splits"
    splits.mkdir()
    for n in (1, 2):
        (splits / f"wave_test_split{n}.txt").write_text(f"one.avi {n} \ntwo.avi {3 - n} \nthree.avi 0 \n")
        (splits / f"brush_hair_test_split{n}.txt").write_text("April #1 (x).avi 1 \n")
    assert found(read_hmdb51(root, splits), root) == [
        ("brush_hair/April #1 (x).avi", "brush_hair"),
        ("wave/one.avi", "wave"),
    ]
    assert found(read_hmdb51(root, splits, subset="test"), root) == [("wave/two.avi", "wave")]
    assert found(read_hmdb51(root, splits, split=2, subset="test"), root) == [("wave/one.avi", "wave")]
    with pytest.raises(AnnotationError, match="holds no <class>_test_split3.txt"):
        read_hmdb51(root, splits, split=3)
    with pytest.raises(AnnotationError, match="the subsets train, test"):
        read_hmdb51(root, splits, subset="val")


def test_breakfast(tmp_path):
    names = (
        *("P03/cam01/P03_cereals.avi", "P15/stereo/P15_tea_ch0.avi", "P15/stereo/P15_tea_ch1.avi"),
        *("P16/webcam01/P16_scrambledegg.avi", "P54/cam02/P54_juice.avi", "P54/cam02/P54_juice.avi.labels"),
    )
    root = tree(tmp_path / "BreakfastII_15fps_qvga_sync", *names)
    assert found(read_breakfast(root, subset="test"), root) == [(names[0], "cereals"), (names[1], "tea")]
    assert found(read_breakfast(root), root) == [(names[3], "scrambledegg"), (names[4], "juice")]
    assert found(read_breakfast(root, split=2, subset="test"), root) == [(names[3], "scrambledegg")]
    assert len(read_breakfast(root).classes) == 10
    with pytest.raises(AnnotationError, match="holds no videos of that part"):
        read_breakfast(root, split=3, subset="test")
    with pytest.raises(AnnotationError, match="splits 1 to 4"):
        read_breakfast(root, split=5)
