"""The package's own checkpoint on a hundred test videos: five of each class, chosen by a seed."""

from pathlib import Path

import pytest
import torch

from etmamba_timm.checkpoints import find_checkpoint
from etmamba_timm.cli import main
from etmamba_timm.training.evaluate import Scores

ROOT = Path(__file__).parents[1]
VIDEOS = Path(__file__).with_name("mocap")
PUBLISHED = Scores.load(ROOT / "benchmarks" / "results" / "mocap_test.safetensors")  # on all test videos


def test_it_scores_them_as_when_it_was_evaluated(tmp_path):
    arguments = ["--data", str(VIDEOS), "--subset", "test", "--workers", "0", "--scores", str(tmp_path / "scores")]
    assert main(["eval", "--model", "etmamba_ti.mocap", *arguments]) == 0
    found = Scores.load(tmp_path / "scores")
    each = len(PUBLISHED.labels) // len(PUBLISHED.classes)  # in order of class and number
    videos = sorted((VIDEOS / "test").glob("*/*.mp4"))
    known = torch.tensor([PUBLISHED.classes.index(v.parent.name) * each + int(v.stem) for v in videos])
    assert len(known) == len(found.labels) == 100
    assert torch.equal(found.labels, PUBLISHED.labels[known])
    torch.testing.assert_close(found.probabilities, PUBLISHED.probabilities[known], rtol=0, atol=0.01)


def test_its_figure_is_that_of_the_scores():
    (figure,) = find_checkpoint("etmamba_ti.mocap").figures
    assert figure["value"] == pytest.approx(100 * PUBLISHED.topk(1), abs=0.005)
    page = (ROOT / "docs" / "mocap.md").read_text(encoding="utf-8")
    assert f"right on **{figure['value']:.1f}%** of the test videos" in page
    assert f"{figure['value']:.1f}% on held-out views" in (ROOT / "README.md").read_text(encoding="utf-8")
