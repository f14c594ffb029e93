"""Each dataset's official files, in small trees of their official layout. Where nothing is decoded, files are empty."""

import json
import re

import pytest
from trees import found, tree
from videos import numbers, write_video

from etmamba_timm.data import (
    AnnotationError,
    VideoReader,
    read_breakfast,
    read_dataset,
    read_folders,
    read_hmdb51,
    read_kinetics,
    read_ssv2,
)
from etmamba_timm.data.annotations import SUFFIXES


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


# Of each suffix, a codec that such files may hold; the others are written as mp4 and renamed.
CODECS = {
    **dict.fromkeys((".gif", ".apng", ".dv"), None),
    **dict.fromkeys((".webm", ".ogv", ".ogm", ".ivf"), "libvpx"),
    **dict.fromkeys((".avi", ".divx", ".xvid"), "mpeg4"),
    **dict.fromkeys((".wmv", ".asf"), "wmv2"),
    **dict.fromkeys((".rm", ".rmvb"), "rv20"),
    **dict.fromkeys((".mjpeg", ".mjpg"), "mjpeg"),
    **dict.fromkeys((".hevc", ".h265", ".265"), "libx265"),
    **dict.fromkeys((".mpg", ".mpeg", ".mpe", ".mpv", ".m1v", ".m2v", ".m2p", ".vob", ".mxf"), "mpeg2video"),
}
WRITTEN_AS = {
    **{".mpe": ".mpg", ".mpv": ".m2v", ".m2p": ".mpg", ".m1v": ".m2v", ".m2t": ".ts", ".ogm": ".ogv", ".rmvb": ".rm"},
    **{".divx": ".avi", ".xvid": ".avi", ".mk3d": ".mkv", ".qt": ".mov", ".3gpp": ".3gp", ".264": ".h264"},
    **{".265": ".hevc", ".h265": ".hevc", ".mjpg": ".mjpeg"},
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_reader_reads_what_a_folder_takes(tmp_path, suffix):
    """Every suffix that is taken for a video, in a real file of that form."""
    (tmp_path / "class").mkdir()
    written = tmp_path / f"written{WRITTEN_AS.get(suffix, suffix)}"
    codec, form, size = CODECS.get(suffix, "libx264"), "yuv420p", (48, 64)
    if codec is None:
        codec, form = {".gif": ("gif", "rgb8"), ".apng": ("apng", "rgb24"), ".dv": ("dvvideo", "yuv420p")}[suffix]
    if suffix in (".dv", ".mxf"):
        size = (576, 720)  # these forms have fixed sizes
    write_video(written, 20, *size, codec=codec, pix_fmt="yuvj420p" if codec == "mjpeg" else form)
    written.rename(tmp_path / "class" / f"video{suffix.upper()}")
    ((path, _),) = read_folders(tmp_path).samples
    assert numbers(VideoReader(path).read([0, 7, 19])) == [0, 7, 19]


def test_files_that_are_left_out_are_counted(tmp_path, caplog):
    names = [
        "run/a.mp4",
        "run/a.json",
        "run/b.json",
        "jump/c.mp4",
        "jump/1.jpg",
        "jump/x/README",
        "loose.mp4",
        "list.csv",
    ]
    root = tree(tmp_path, *names, "run/.b.json")
    assert len(read_folders(root).samples) == 2
    assert "3 files" not in caplog.text
    assert "4 files in folders of classes left out, no video by the suffix: " in caplog.text
    assert "2 .json, 1 .jpg (pictures), 1 without suffix; first " + str(root / "jump/1.jpg") in caplog.text
    assert f"1 video in no folder of a class, first {root / 'loose.mp4'}" in caplog.text
    caplog.clear()
    read_folders(tree(tmp_path / "clean", "run/a.mp4", "jump/b.gif"))
    assert not caplog.text
    with pytest.raises(
        AnnotationError, match=r"they hold 2 .png \(pictures\): put the frames of each video in a folder"
    ):
        read_folders(tree(tmp_path / "frames", "run/1.png", "run/2.png"))


@pytest.mark.parametrize(
    ("files", "right"),
    [
        (["clips/run/a.mp4", "clips/walk/b.mp4"], "clips"),
        (["clips/train/run/a.mp4", "clips/val/run/b.mp4", "papers/x.pdf"], "clips"),
        (["a/b/c/run/a.mp4", "a/b/c/walk/b.mp4"], "a/b/c"),
        (["clips/run/a.mp4"], "clips"),
        (["train/clips/run/a.mp4", "train/clips/walk/a.mp4", "val/clips/run/b.mp4"], "train/clips"),
    ],
)
def test_a_folder_above_that_of_the_classes_is_refused(tmp_path, files, right):
    root = tree(tmp_path, *files)
    with pytest.raises(AnnotationError, match=rf"would be a single class, .*; give {re.escape(str(root / right))}$"):
        read_dataset("folders", root, "train")


def test_classes_in_folders_of_their_own_are_told_of(tmp_path, caplog):
    """They may be meant, as where each class has a folder for each person; then a line does no harm."""
    root = tree(tmp_path, "one/run/a.mp4", "one/walk/b.mp4", "two/run/c.mp4", "flat/d.mp4", "flat/more/e.mp4")
    assert read_folders(root).classes == ["flat", "one", "two"]
    assert "all videos of 2 of 3 classes, first one, lie in folders below the class's" in caplog.text
    assert f"give another folder, such as {root / 'one'}" in caplog.text


def test_folders_of_frames(tmp_path, caplog):
    """They are videos where a class has no video files; otherwise they may be thumbnails, and are told of."""
    names = ["run/a/1.jpg", "run/a/2.jpg", "run/b.x/img_1.PNG", "run/b.x/notes.txt", "run/c/.1.jpg", "run/d/e/1.jpg"]
    read = read_folders(tree(tmp_path, *names, "jump/a.mp4", "jump/thumbs/a.jpg"))
    assert found(read, tmp_path) == [("jump/a.mp4", "jump"), *((f"run/{name}", "run") for name in ("a", "b.x", "d/e"))]
    assert "2 files in folders of classes left out" in caplog.text
    assert "jump/thumbs/a.jpg" in caplog.text


def test_of_files_with_one_name_the_usual_suffix_is_taken(tmp_path):
    root = tree(tmp_path / "hmdb51", "wave/one.gif", "wave/one.avi", "wave/two.gif")
    tree(tmp_path, "splits/x")
    (tmp_path / "splits" / "wave_test_split1.txt").write_text("one.avi 1 \ntwo.avi 1 \n")
    assert [path for path, _ in found(read_hmdb51(root, tmp_path / "splits"), root)] == ["wave/one.avi", "wave/two.gif"]


def test_links_are_followed_and_end(tmp_path, caplog):
    root = tree(tmp_path / "root", "run/a.mp4", "jump/b.wmv", "sit/notes.txt")
    tree(tmp_path / "disk", "c.mp4")
    (root / "run" / "more").symlink_to(tmp_path / "disk")
    (root / "run" / "back").symlink_to(root / "run")
    assert found(read_folders(root), root) == [("jump/b.wmv", "jump"), ("run/a.mp4", "run"), ("run/more/c.mp4", "run")]
    assert "in 1 of 3 classes, first sit" in caplog.text


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
