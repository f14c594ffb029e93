"""Lists in the forms in which people and programs write them. Nothing is decoded, so videos may be empty files."""

import csv
import io
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import found, tree

from etmamba_timm.data import AnnotationError, read_dataset, read_list
from etmamba_timm.data.annotations import classes_of, each
from etmamba_timm.data.lists import parse_list


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
    with pytest.raises(AnnotationError, match=r"labels \['run'\] are none of the classes \["):
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
    for label in ("104857600", "9" * 5000):
        (root / "list.txt").write_text(f"a.mp4,{label}\n")
        with pytest.raises(
            AnnotationError, match="line 1: (104857600|9{30}) is a label; numbered classes end below 1000"
        ):
            read_list(root / "list.txt")


def test_missing_videos_are_counted_and_too_many_are_an_error(tmp_path, caplog):
    root = tree(tmp_path, "a.mp4", "b.mp4")
    (root / "list.txt").write_text("a.mp4 0\nb.mp4 1\ngone.mp4 1\n")
    read = read_list(root / "list.txt")
    assert [label for _, label in read.samples] == [0, 1]
    assert [Path(name).name for name in read.missing] == ["gone.mp4"]
    assert "1 of 3 videos missing and left out" in caplog.text
    (root / "list.txt").write_text("a.mp4 0\n" + "".join(f"gone{i}.mp4 1\n" for i in range(3)))
    with pytest.raises(AnnotationError, match="lists 4 videos, 3 of which aren't there"):
        read_list(root / "list.txt")


VIDEOS = [f"v/{i}.mp4" for i in range(6)]
LABELS = ["walk", "run", "walk", "run", "sit down", "walk"]
ROWS = list(zip(VIDEOS, LABELS, strict=True))


@pytest.fixture
def root(tmp_path) -> Path:
    return tree(tmp_path, *VIDEOS)


def listed(folder: Path, text: str, **arguments) -> list[tuple[str, str]]:
    """(path, class) of each video of a list `folder/list.csv` with this text."""
    (folder / "list.csv").write_text(text)
    return found(read_list(folder / "list.csv", **arguments), folder)


def test_plain_lists_are_read_without_a_word(root, caplog):
    plain = "".join(f"{video},{label}\n" for video, label in ROWS)
    for header in ("", "video,class\n", "filename,action\n", "video,label\n"):
        assert listed(root, header + plain) == ROWS
    assert not caplog.text


@pytest.mark.parametrize(
    ("line", "header", "told"),
    [
        ("{n},{video},{label}", ",video,label", "column 1 is left out: it numbers the rows, as pandas' index does"),
        ("{n},{video},{label}", None, "column 1 is left out: it numbers the rows"),
        ("{shuffled},{video},{label}", "Unnamed: 0,video,label", "column 1 ('unnamed: 0') is left out: it numbers"),
        ('"{n}","{video}","{label}"', '"video","label"', "column 1 is left out: it numbers the rows"),  # R
        ("{label},{video}", "label,video", "column 1 is taken for the label and column 2 for the video"),
        ("{label},{video}", None, "column 1 is taken for the label and column 2 for the video"),
        ("{video},{label},train", "video,label,split", "column 3 ('split') is left out: it says 'train' in every row"),
        ("{video},validation,{label}", None, "column 2 is left out: it says 'validation' in every row"),
        ("{video};{label}", None, "its fields are separated by ';'"),
        ("{video};{label}", "Video;Klasse", "its fields are separated by ';'"),
        ("{video} {frames} {label}", None, "column 2 is left out: its numbers (30, 31, 32, ...) are taken for numbers"),
        ("{video},{label},{frames}", "path,label,num_frames", "column 3 ('num_frames') is left out: its numbers (30"),
        (
            "{video},{label},{frames}",
            "path,label,seconds",
            "column 3 ('seconds') left out: column 2 ('label') is the",
        ),
        ("{windows},{label}", "video,label", r"'\' is read as '/' in 6 paths (v\0.mp4, v\1.mp4, v\2.mp4, ...)"),
        ("{windows} {label}", None, r"'\' is read as '/' in 6 paths"),
        ("{video} {label}", "video label", "all that follows the video is taken for its label (sit down)"),
        ("{video},{label},,", "video,label", None),
        ("{video}, {label}", "file, class", None),
        ("{video}\t{label}", "file\tclass", None),
    ],
)
def test_other_forms_are_recognised_and_told(root, caplog, line, header, told):
    lines = [header] if header else []
    for n, (video, label) in enumerate(ROWS):
        fields = {"n": n, "video": video, "label": label, "shuffled": [5, 2, 4, 0, 1, 3][n], "frames": 30 + n}
        lines.append(line.format(**fields, windows=video.replace("/", "\\")))
    assert listed(root, "\n".join(lines)) == ROWS
    assert (told in caplog.text) if told else not caplog.text
    read = read_list(root / "list.csv", root)
    assert read.classes == ["run", "sit down", "walk"]


def test_a_header_that_only_the_label_tells(tmp_path, caplog):
    """Names of videos that look like no files: a first row whose label comes again isn't a header."""
    root = tree(tmp_path, "0", "1", "2", "3")
    rows = "0 walk\n1 run\n2 walk\n3 run\n"
    assert len(listed(root, "video class\n" + rows)) == 4
    assert "line 1 ('video class') is taken for a header" in caplog.text
    caplog.clear()
    assert len(listed(root, "7 run\n" + rows)) == 4
    assert "1 of 5 videos missing" in caplog.text
    assert "taken for a header" not in caplog.text


def test_a_missing_first_video_is_no_header(root):
    (root / "list.csv").write_text("v/gone.mp4,jump\n" + "".join(f"{v},{label}\n" for v, label in ROWS))
    read = read_list(root / "list.csv")
    assert read.classes == ["jump", "run", "sit down", "walk"]
    assert [Path(name).name for name in read.missing] == ["gone.mp4"]


def test_a_header_in_the_middle(root, caplog):
    """As `cat` of two lists makes it."""
    text = "video,class\nv/0.mp4,walk\nvideo,class\nv/1.mp4,run\n"
    assert listed(root, text) == [("v/0.mp4", "walk"), ("v/1.mp4", "run")]
    assert "lines that repeat the header are left out (1)" in caplog.text


def test_a_name_that_begins_like_a_comment(tmp_path):
    root = tree(tmp_path, "#437_ride.avi", "a.avi")
    text = "#437_ride.avi ride\na.avi walk\n# a.avi walk\n#a.avi run\n"
    assert listed(root, text) == [("#437_ride.avi", "ride"), ("a.avi", "walk")]


def test_names_with_separators(tmp_path, caplog):
    root = tree(tmp_path, "x, y/0.mp4", "x, y/1.mp4", "a; b.mp4", "c d 7.mp4")
    assert listed(root, "x, y/0.mp4,3\nx, y/1.mp4,0\n") == [("x, y/0.mp4", "3"), ("x, y/1.mp4", "0")]
    rows = [("x, y/0.mp4", "sit, down"), ("a; b.mp4", "run"), ("c d 7.mp4", "walk")]
    assert listed(root, 'x, y/0.mp4,"sit, down"\na; b.mp4,run\nc d 7.mp4,walk\n') == rows
    assert listed(root, 'x, y/0.mp4;sit, down\n"a; b.mp4";run\nc d 7.mp4;walk\n') == rows
    caplog.clear()
    rows = [("x, y/0.mp4", "3"), ("c d 7.mp4", "0"), ("x, y/1.mp4", "0")]
    assert listed(root, "x, y/0.mp4 3\nc d 7.mp4 0\nx, y/1.mp4 0\n", classes=list("0123")) == rows
    assert not caplog.text
    assert listed(root, "3 x, y/0.mp4\n0 c d 7.mp4\n0 x, y/1.mp4\n") == rows


def test_labels_from_one_are_told(root, caplog):
    read = listed(root, "v/0.mp4 1\nv/1.mp4 2\nv/2.mp4 3\n")
    assert [label for _, label in read] == ["1", "2", "3"]
    assert "the labels are 1 to 3, but classes count from 0: the model gets 4 classes" in caplog.text
    assert "subtract 1 from the labels for 3" in caplog.text
    caplog.clear()
    listed(root, "v/0.mp4 0\nv/1.mp4 5\n")
    assert "4 of the 6 numbered classes, 0 to 5, have no videos" in caplog.text
    caplog.clear()
    listed(root, "v/0.mp4 1\nv/1.mp4 2\n", classes=["a", "b", "c"])  # a part needn't hold all classes
    listed(root, "v/0.mp4 0\nv/1.mp4 2\nv/2.mp4 1\n")
    assert "subtract" not in caplog.text


def test_numbers_that_pandas_wrote_with_a_point(root, caplog):
    assert listed(root, "video,label\nv/0.mp4,1.0\nv/1.mp4,0.0\n") == [("v/0.mp4", "1"), ("v/1.mp4", "0")]
    assert "the labels (1.0, 0.0) are read as whole numbers" in caplog.text


def test_the_same_video_with_other_labels_is_told(root, caplog):
    assert len(listed(root, "v/0.mp4,walk\nv/1.mp4,run\nv/0.mp4,run\n")) == 3
    assert "each row a sample of its own: 1, first v/0.mp4 with 'walk' and 'run'" in caplog.text


MANY = "v/1.mp4,2\n" * 20  # so many that a field of several labels is a mistake


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v/0.mp4 3 7\nv/1.mp4 0 4\n", "line 1: 'v/0.mp4 3 7' has 2 columns beside the video.*with one label for each"),
        ("v/0.mp4,3\nv/1.mp4,0\nv/2.mp4,0,4\n", "line 3: 'v/2.mp4,0,4' has 3 fields, separated by ',', where most"),
        ("v/0.mp4,3 7\n" + MANY, "line 1: the label '3 7' looks like 2 labels \\(3, 7\\).*with one label for each"),
        (MANY + 'v/1.mp4,"[3, 7]"\n', r"line 21: the label '\[3, 7\]' looks like 2 labels"),
        ("v/0.mp4,walk|2\n" + MANY, "line 1: the label 'walk|2' looks like 2 labels .walk, 2.*keep the.*'labels' in a"),
        ('v/0.mp4,walk\nv/1.mp4,"[3, 7]"\n', "line 1: the label 'walk' is no whole number, as most others are"),
        ("v/0.mp4,walk,outdoors\nv/1.mp4,run,street\n", "column 2 with 'walk', column 3 with 'outdoors'"),
        ("video,start,end\nv/0.mp4,3,9\n", "column 2 .'start'. with '3'.*name the columns in a header"),
        ("My list\nvideo,label\nv/0.mp4,walk\nv/1.mp4,run\n", "line 1: 'My list' has no label"),
        ("v/0.mp4\nv/1.mp4\n", "line 1: 'v/0.mp4' has no label; wanted `video,label`"),
        ("v/0.mp4,walk\nv/1.mp4;run\nv/2.mp4,run", "line 2: 'v/1.mp4;run' has no label .the fields of other lines are"),
        ("v/0.mp4,walk\n,run\nv/2.mp4,run", "line 2: ',run' has no video"),
        ("a,b,c,d\ne,f,g,h\n", "line 2: 'e,f,g,h' has 4 fields, and none is a video below"),
        ("v/0.mp4,3,104857600\n", "line 1: .* has 2 columns beside the video"),
        ("v/0.mp4,\x00\0\nv/9\0.mp4,a\nv/8.mp4,b\n", "."),
        ('""\n', "line 1: .* has no label"),
        ("# nothing\n", "lists no videos"),
        ("video,label\n", "lists 1 video, 1 of which aren't there"),
    ],
)
def test_what_cannot_be_read_is_told_by_line(root, text, message):
    with pytest.raises(AnnotationError, match=message):
        listed(root, text)


def several(folder: Path, text: str, **arguments) -> dict[str, set[str]]:
    """The labels of each video, by number, of a list of several labels a video."""
    (folder / "list.csv").write_text(text)
    read = read_list(folder / "list.csv", folder, **arguments)
    assert read.is_multilabel
    assert all(label == tuple(sorted(set(label))) for _, label in read.samples)
    return {path.stem: {read.classes[i] for i in label} for path, label in read.samples}


WALKS = {"0": {"walk", "run"}, "1": {"run"}}


@pytest.mark.parametrize(
    ("text", "labels", "is_told"),
    [
        ("path,labels\nv/0.mp4,walk;run\nv/1.mp4,run\n", WALKS, False),
        ("path,labels\nv/0.mp4,walk|run\nv/1.mp4,run|\n", WALKS, False),
        ("path,labels\nv/0.mp4,walk\nv/1.mp4,run\nv/0.mp4,run\n", WALKS, False),
        ("path labels\nv/0.mp4 walk;run\nv/1.mp4 run\n", WALKS, False),
        ("tags,path\nwalk;run,v/0.mp4\nrun,v/1.mp4\n", WALKS, True),  # the label first
        ("path,frames,actions\nv/0.mp4,20,walk;run\nv/1.mp4,30,run\n", WALKS, True),  # frames
        ("v/0.mp4,walk;run\nv/1.mp4,run\n", WALKS, True),
        ("path,label\nv/0.mp4,walk | run\nv/1.mp4,run\n", WALKS, True),
        ("v/0.mp4;walk|run\nv/1.mp4;run\n", WALKS, True),
        ("v/0.mp4\twalk; run\nv/1.mp4\trun\n", WALKS, True),
        ("""v/0.mp4,"['walk', 'run']"\nv/1.mp4,['run']\n""", WALKS, True),  # pandas, of lists
        ("v/0.mp4,3 7\nv/1.mp4,2\n", {"0": {"3", "7"}, "1": {"2"}}, True),
        ('v/0.mp4,"[3, 7]"\nv/1.mp4,[2]\nv/2.mp4,[]\n', {"0": {"3", "7"}, "1": {"2"}, "2": set()}, True),
        ("path,labels\nv/0.mp4,0;1;1\nv/1.mp4,\n", {"0": {"0", "1"}, "1": set()}, True),
    ],
)
def test_several_labels_a_video(root, caplog, text, labels, is_told):
    assert several(root, text) == labels
    assert bool(caplog.text) == is_told


def test_what_looks_like_several_labels_and_is_one(root, caplog):
    rows = [("v/0.mp4", "walk;run"), ("v/1.mp4", "sit"), ("v/2.mp4", "walk;run")]
    assert listed(root, "v/0.mp4,walk;run\nv/1.mp4,sit\nv/2.mp4,walk;run\n") == rows
    assert listed(root, "path,labels\nv/0.mp4,walk\nv/1.mp4,sit\n") == [("v/0.mp4", "walk"), ("v/1.mp4", "sit")]
    assert not caplog.text


def test_a_video_without_a_label_among_several_is_told(root, caplog):
    assert several(root, "path,labels\nv/0.mp4,a;b\nv/1.mp4,\n") == {"0": {"a", "b"}, "1": set()}
    assert "no label means none of the classes: 1 video, first v/1.mp4" in caplog.text
    with pytest.raises(AnnotationError, match="line 3: 'v/1.mp4,' has no label"):
        listed(root, "path,label\nv/0.mp4,a\nv/1.mp4,\n")


def test_validation_has_several_labels_where_training_has(root):
    (root / "train.csv").write_text("path,labels\nv/0.mp4,a;b\nv/1.mp4,c\n")
    (root / "val.csv").write_text("v/2.mp4,c\nv/3.mp4,a\n")
    val = read_dataset("list", root, "val")
    assert (val.classes, [label for _, label in val.samples]) == (["a", "b", "c"], [(2,), (0,)])
    (root / "val.csv").write_text("v/2.mp4,c;d\n")
    with pytest.raises(AnnotationError, match=r"labels \['d'\] are none of the classes \['a', 'b', 'c'\]"):
        read_dataset("list", root, "val")


@settings(max_examples=200, deadline=None)
@given(
    labels=st.lists(st.sets(st.sampled_from(["walk", "sit down", "a, b", "é", "7 up"])), min_size=2, max_size=6),
    separator=st.sampled_from([",", ";", "\t"]),
    between=st.sampled_from(["|", " | ", ";", "rows"]),
    label_first=st.booleans(),
    numbers=st.booleans(),
)
def test_several_labels_in_any_form(tmp_path_factory, labels, separator, between, label_first, numbers):
    """Joined in one field, or in rows of their own, under a header that says so."""
    root = tree(tmp_path_factory.getbasetemp() / "several", *VIDEOS)
    wanted = {
        str(i): {str(len(name) % 5) for name in names} if numbers else names for i, names in enumerate(labels) if names
    }
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator="\n")
    writer.writerow(["labels", "path"] if label_first else ["path", "labels"])
    for i, names in wanted.items():
        fields = sorted(names) if between == "rows" else [between.join(sorted(names))]
        writer.writerows([field, VIDEOS[int(i)]] if label_first else [VIDEOS[int(i)], field] for field in fields)
    if any(len(names) > 1 for names in wanted.values()):
        assert several(root, out.getvalue()) == wanted
    elif wanted:
        assert listed(root, out.getvalue()) == [(VIDEOS[int(i)], *names) for i, names in wanted.items()]


def test_a_list_in_another_encoding(root):
    (root / "list.csv").write_text("v/0.mp4,walk\n", encoding="utf-16")
    with pytest.raises(AnnotationError, match="can't be read: .*; save it as text in UTF-8"):
        read_list(root / "list.csv")


@pytest.mark.parametrize(
    ("written", "folder", "remedy"),
    [
        ("v/{}.mp4", "elsewhere", "they lie beside the list: give {tmp} as the folder of the videos (root, --data)"),
        ("{}.mp4", ".", "{tmp}/v/0.mp4 exists: give {tmp}/v as the folder of the videos (root, --data)"),
        ("/data/v/{}.mp4", ".", "{tmp}/v/0.mp4 exists: write the paths in the list as they are below {tmp}"),
        (r"D:\data\v\{}.mp4", ".", "{tmp}/v/0.mp4 exists: write the paths in the list as they are below {tmp}"),
        ("v/{}", ".", "{tmp}/v/0.mp4 exists: write the names with their suffix"),
        ("empty/{}", ".", "it is a folder without pictures"),
        ("w/{}.avi", ".", "give the folder that holds them (root, --data)"),
    ],
)
def test_the_remedy_for_missing_videos(root, tmp_path, written, folder, remedy):
    tree(root, "elsewhere/x", "empty/0/x", "empty/1/x")
    with pytest.raises(AnnotationError) as raised:
        listed(root, f"{written.format(0)} 0\n{written.format(1)} 1\n", root=root / folder)
    assert "lists 2 videos, 2 of which aren't there" in str(raised.value)
    assert remedy.format(tmp=tmp_path) in str(raised.value)


FORMS = [  # header, line, of the training list
    ("video,class", "{video},{label}"),
    ("filename,action", "{video},{label}"),
    (",video,label", "{n},{video},{label}"),
    ("label,video", "{label},{video}"),
    ("video;y", "{video};{label}"),
    ("path frames label", "{video} {frames} {label}"),
    ("video,label,split", "{video},{label},{part}"),
]


@pytest.mark.parametrize(("header", "line"), FORMS)
@pytest.mark.parametrize("there", [True, False], ids=["", "without_the_training_videos"])
def test_validation_is_numbered_as_training(tmp_path, header, line, there):
    train, val = ROWS[:5], [("w/0.mp4", "walk"), ("w/1.mp4", "sit down")]
    for part, rows in (("train", train), ("val", val)):
        lines = [
            line.format(n=n, video=video, label=label, frames=24 + n, part=part)
            for n, (video, label) in enumerate(rows)
        ]
        (tmp_path / f"{part}.csv").write_text("\n".join([header, *lines]))
        if part == "val" or there:
            tree(tmp_path, *(video for video, _ in rows))
    read = read_dataset("list", tmp_path, "val")
    assert read.classes == ["run", "sit down", "walk"]
    assert found(read, tmp_path) == val
    if there:
        assert read_dataset("list", tmp_path, "train").classes == read.classes


def test_one_row_of_validation_under_a_header(tmp_path):
    tree(tmp_path, *VIDEOS)
    (tmp_path / "train.txt").write_text("video action\n" + "".join(f"{v} {label}\n" for v, label in ROWS[:4]))
    (tmp_path / "val.csv").write_text("video,action\nv/5.mp4,walk\n")  # another suffix than the training list's
    read = read_dataset("list", tmp_path, "val")
    assert (read.classes, found(read, tmp_path)) == (["run", "walk"], [("v/5.mp4", "walk")])
    (tmp_path / "val.csv").write_text("video,action\nv/5.mp4,jump\n")
    with pytest.raises(AnnotationError, match=r"val.csv: labels \['jump'\] are none of the classes \['run', 'walk'\]"):
        read_dataset("list", tmp_path, "val")


def test_a_list_of_all_parts(root, caplog):
    text = "video,label,split\nv/0.mp4,a,train\nv/1.mp4,b,Train\nv/2.mp4,a,validation\n"
    for part in ("train", "val", "test"):
        (root / f"{part}.csv").write_text(text)
    read = read_dataset("list", root, "val")
    assert (read.classes, found(read, root)) == (["a", "b"], [("v/2.mp4", "a")])
    assert "column 3 ('split') is left out: it names parts (train 2, val 1), and only the rows of 'val' are taken" in (
        caplog.text
    )
    assert found(read_dataset("list", root), root) == [("v/0.mp4", "a"), ("v/1.mp4", "b")]
    with pytest.raises(AnnotationError, match="names the parts train 2, val 1; wanted rows of 'test'"):
        read_dataset("list", root, "test")
    assert len(read_list(root / "val.csv").samples) == 3


# Any table in any of the forms gives the same rows.

NAMES = (
    st.text("abcxyz, \"'#&é._-", min_size=1, max_size=8)
    .map(lambda name: name.strip().lstrip("# "))
    .filter(lambda name: name.strip(' ."'))
)
TABLES = st.lists(st.tuples(st.integers(0, 5), NAMES), min_size=2, max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    table=TABLES,
    separator=st.sampled_from([",", ";", "\t", " "]),
    header=st.booleans(),
    index=st.booleans(),
    label_first=st.booleans(),
    split=st.booleans(),
    numbers=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_any_table_in_any_form(tmp_path_factory, table, separator, header, index, label_first, split, numbers, quoting):
    root = tree(tmp_path_factory.getbasetemp() / "forms", *VIDEOS)
    labels = [str(len(name) % 4) if numbers else name for _, name in table]
    if separator == " ":  # names that hold another separator could be another form
        labels = [label.translate(str.maketrans(",", "x")) for label in labels]
        index = split = False
    rows = [(VIDEOS[number], label) for (number, _), label in zip(table, labels, strict=True)]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, quoting=quoting, lineterminator="\n")
    columns = [("", [str(i) for i in range(len(rows))])] if index else []
    pair = [("file", [video for video, _ in rows]), ("what", labels)]
    columns += pair[::-1] if label_first else pair
    columns += [("split", ["train"] * len(rows))] if split else []
    if header:
        writer.writerow([name for name, _ in columns])
    writer.writerows(zip(*(values for _, values in columns), strict=True))
    (root / "list.csv").write_text(out.getvalue())
    assert parse_list(root / "list.csv", root).rows == rows


def test_damaged_lists_end_in_an_error_or_a_result(root):
    """Random changes to lists in all forms."""
    draw = random.Random(0)
    tokens = [
        ",",
        ";",
        "\t",
        " ",
        '"',
        "\n",
        "#",
        "\\",
        "|",
        "0",
        "-1",
        "9" * 30,
        "train",
        "v/0.mp4",
        "\0",
        "é",
        "\r",
        "",
    ]
    ends = {"read": 0, "refused": 0}
    for i in range(1500):
        header, line = FORMS[i % len(FORMS)]
        lines = [
            header,
            *(line.format(n=n, video=v, label=n % 3, frames=9 + n, part="train") for n, v in enumerate(VIDEOS)),
        ]
        text = "\n".join(lines[i % 2 :])
        for _ in range(draw.randint(1, 4)):
            start = draw.randrange(len(text) + 1)
            text = text[:start] + draw.choice(tokens) + text[start + draw.choice([0, 0, 1, 5]) :]
        (root / "list.csv").write_text(text)
        try:
            read = read_list(root / "list.csv")
            assert read.samples
            assert all(0 <= i < len(read.classes) for _, label in read.samples for i in each(label))
            classes_of(parse_list(root / "list.csv", root, "train").rows)
            ends["read"] += 1
        except AnnotationError:
            ends["refused"] += 1
    assert min(ends.values()) > 100
