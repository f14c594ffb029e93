"""Files of features: complete or absent, continued after an interruption, and read back."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from etmamba_timm import features
from etmamba_timm.features import FeatureFiles, check_features_path, read_features

SETTINGS = {"model": "m", "num_clips": "1"}
ROWS = {f"v{i}.mp4": torch.randn(5) for i in range(8)}


@pytest.fixture(params=["f.safetensors", "folder"])
def path(request, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(features, "SHARD_FILES", 3)
    return tmp_path / request.param


def write(path: Path, names: list[str], close: bool = True, finished: bool = True) -> FeatureFiles:
    output = FeatureFiles(path, SETTINGS)
    for name in output.missing(names):
        output.add(name, ROWS[name])
    if close:
        output.close(names, finished)
    return output


def check(path: Path, names: list[str]) -> None:
    rows, files = read_features(path)
    assert files == names
    assert torch.equal(rows, torch.stack([ROWS[name] for name in names]))


def test_what_is_written_is_read(path):
    names = list(ROWS)
    write(path, names)
    check(path, names)
    assert not list(path.parent.rglob("*.partial"))
    first = path / "features-00000.safetensors" if path.is_dir() else path
    with safe_open(first, "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("files") == json.dumps(names[:3] if path.is_dir() else names)
    assert metadata == SETTINGS
    if path.is_dir():
        assert sorted(part.name for part in path.iterdir()) == [f"features-0000{i}.safetensors" for i in range(3)]
        assert len(read_features(path / "features-00002.safetensors")[1]) == 2


@pytest.mark.parametrize("done", range(9))
def test_a_process_that_just_ends_loses_nothing(path, done):
    names = list(ROWS)
    write(path, names[:done], close=False)  # as if killed
    if path.is_dir():
        assert len(list(path.glob("*.safetensors"))) == done // 3
    else:
        assert not path.exists()
    output = FeatureFiles(path, SETTINGS)
    assert output.missing(names) == names[done:]
    for name in names[done:]:
        output.add(name, ROWS[name])
    assert output.missing(names) == []
    output.close(names, True)
    check(path, names)
    assert not list(path.parent.rglob("*.partial"))


def test_a_line_that_is_cut_off_is_done_again(path):
    names = list(ROWS)[:2]
    write(path, names, close=False)
    partial = next(path.parent.rglob("*.partial"))
    whole = partial.read_bytes()
    for length in range(len(whole) - 1, len(whole) - 40, -7):
        partial.write_bytes(whole[:length])
        assert FeatureFiles(path, SETTINGS).missing(names) == names[1:]
    for length in range(len(whole.splitlines(keepends=True)[0]) + 1):  # the settings
        partial.write_bytes(whole[:length])
        assert FeatureFiles(path, {"other": "settings"}).missing(names) == names
    partial.write_bytes(whole[:-3])
    write(path, names)
    check(path, names)


def test_killed_between_a_shard_and_its_partial_file(path):
    """The rows are in both; they count once."""
    names = list(ROWS)
    write(path, names[:2], close=False)
    partial = next(path.parent.rglob("*.partial"))
    shutil.copy(partial, partial.parent / "copy")
    write(path, names[:2])
    shutil.move(partial.parent / "copy", partial)
    write(path, names)
    check(path, names)


def test_interrupted_and_continued(path):
    names = list(ROWS)
    write(path, names[:5], finished=False)
    assert list(path.parent.rglob("*.partial"))
    check(path, names[:3] if path.is_dir() else names[:5])  # a folder has whole shards only
    write(path, names)
    check(path, names)


def test_a_single_file_has_the_order_of_the_command(tmp_path):
    names = list(ROWS)
    write(tmp_path / "f.safetensors", names[4:6], close=False)
    write(tmp_path / "f.safetensors", [names[1], names[4], names[5], names[0]])
    check(tmp_path / "f.safetensors", [names[1], names[4], names[5], names[0]])


def test_a_name_that_is_there_twice(path):
    names = ["v0.mp4", "v1.mp4", "v0.mp4"]
    write(path, names[:2], close=False)
    output = FeatureFiles(path, SETTINGS)
    assert output.missing(names) == ["v0.mp4"]
    output.add("v0.mp4", ROWS["v0.mp4"])
    output.close(names, True)
    check(path, names)


def test_new_videos_are_added_to_a_finished_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_FILES", 3)
    path = tmp_path / "folder"
    write(path, list(ROWS)[:4])
    write(path, list(ROWS))
    check(path, list(ROWS))
    write(path, list(ROWS))  # nothing to do
    check(path, list(ROWS))
    assert len(list(path.iterdir())) == 4


def test_a_finished_file_is_replaced(tmp_path):
    path = tmp_path / "f.safetensors"
    write(path, ["v0.mp4"])
    assert FeatureFiles(path, {"other": "settings"}).missing(["v0.mp4"]) == ["v0.mp4"]


@pytest.mark.parametrize("done", [1, 3, 4])
def test_other_settings_are_not_mixed(path, done):
    write(path, list(ROWS)[:done], close=False)
    with pytest.raises(ValueError, match=r"holds features of other settings \(model: m there, n now; num_clips: 1 the"):
        FeatureFiles(path, {"model": "n", "num_clips": "2"})
    write(path, list(ROWS))  # nothing was lost
    check(path, list(ROWS))


def test_nothing_leaves_nothing(path):
    write(path, [])
    assert not list(path.parent.rglob("f*.*"))
    write(path, ["v0.mp4"], close=False)
    FeatureFiles(path, SETTINGS).close([], False)
    assert list(path.parent.rglob("*.partial"))  # of videos that this command doesn't name


def test_names_that_are_no_text(path):
    name = b"bad\xff.mp4".decode(errors="surrogateescape")
    output = FeatureFiles(path, SETTINGS)
    output.add(name, torch.ones(2))
    assert FeatureFiles(path, SETTINGS).missing([name]) == []
    output.close([name], True)
    assert read_features(path)[1] == [name]


def test_a_full_disk(path, monkeypatch):
    write(path, ["v0.mp4"], close=False)
    output = FeatureFiles(path, SETTINGS)

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    output._log = Full()
    with pytest.raises(ValueError, match="can't be written .No space left on device"):
        output.add("v1.mp4", ROWS["v1.mp4"])
    assert FeatureFiles(path, SETTINGS).missing(["v0.mp4", "v1.mp4"]) == ["v1.mp4"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("f.npz", "features are written as .safetensors; change the suffix"),
        ("no/f.safetensors", "no: no such folder; create it first"),
        ("no/folder", "no: no such folder; create it first"),
        ("file", "features are written as .safetensors; change the suffix"),
        ("folder.safetensors", None),
    ],
)
def test_where_features_can_be_written(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    if message is None:
        check_features_path(tmp_path / name)  # a folder that exists may have any name
    else:
        with pytest.raises(ValueError, match=message):
            check_features_path(tmp_path / name)


def test_what_holds_no_features(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no finished shard"):
        read_features(tmp_path / "folder")
    (tmp_path / "folder" / "features-00000.safetensors").write_bytes(b"no")
    for do in (read_features, lambda path: FeatureFiles(path, SETTINGS)):
        with pytest.raises(ValueError, match="features-00000.safetensors can't be read"):
            do(tmp_path / "folder")
    with pytest.raises(FileNotFoundError):
        read_features(tmp_path / "none.safetensors")
