"""The shipped checkpoint on videos of the test part that ship with the tests: five of each class, drawn by a seed."""

import json
from pathlib import Path

import pytest

from etmamba_timm.cli import main
from etmamba_timm.models import find_checkpoint

README = Path(__file__).parents[1] / "README.md"
VIDEOS = Path(__file__).with_name("mocap")


def test_it_is_as_good_on_them_as_on_all_test_videos(capsys):
    (figure,) = find_checkpoint("etmamba_ti.mocap").figures
    arguments = ["--data", str(VIDEOS), "--subset", "test", "--workers", "0", "--json"]
    assert main(["eval", "--model", "etmamba_ti.mocap", *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["videos"], told["failed"], len(told["per_class"])) == (100, 0, 20)
    assert f"right on **{figure['value']:.1f}%** of the test videos" in README.read_text(encoding="utf-8")
    assert told["top1"] == pytest.approx(figure["value"] / 100, abs=0.05)  # of so few videos
