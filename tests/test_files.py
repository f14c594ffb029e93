"""Files are written completely or not at all, and a path that can't be written is an error before the work starts."""

import os
import re
from pathlib import Path

import pytest

from etmamba_timm.files import check_file, whole_file


def test_a_whole_file_replaces_the_old_one(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    with whole_file(tmp_path / "a.csv") as draft:
        draft.write_text("new")
        assert (tmp_path / "a.csv").read_text() == "old"
    assert (tmp_path / "a.csv").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_an_error_leaves_the_old_one(tmp_path):
    (tmp_path / "a.csv").write_text("old")

    def interrupted() -> None:
        with whole_file(tmp_path / "a.csv") as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a.csv").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.csv").symlink_to(tmp_path / "folder" / "b.csv")
    check_file(tmp_path / "a.csv")
    with whole_file(tmp_path / "a.csv") as draft:
        draft.write_text("new")
    assert (tmp_path / "folder" / "b.csv").read_text() == "new"
    assert (tmp_path / "a.csv").is_symlink()


def test_a_link_into_a_folder_that_is_not_there_names_that_folder(tmp_path):
    (tmp_path / "a.csv").symlink_to(tmp_path / "gone" / "b.csv")
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path / 'gone'}: no such folder")):
        check_file(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.txt", "a.txt: rows are written as .csv, .json or .npy; change the suffix"),
        ("nowhere/a.csv", "nowhere: no such folder; create it first"),
        ("folder.csv", "folder.csv: is a folder; give a file name"),
    ],
)
def test_what_cannot_be_written(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match="^" + re.escape(said) + "$"):
        check_file(name, (".csv", ".json", ".npy"), "rows")


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="can't be written"):
        check_file(tmp_path / "a.csv")


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no such device")
def test_a_device_is_not_replaced():
    with pytest.raises(ValueError, match="^/dev/null: not a regular file; give another path$"):
        check_file("/dev/null")


def test_checking_leaves_nothing(tmp_path):
    check_file(tmp_path / "A.CSV", (".csv",))
    assert os.listdir(tmp_path) == []
