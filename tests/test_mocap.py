"""The package's own checkpoint on a hundred test videos: five of each class, chosen by a seed."""

from pathlib import Path

import pytest
import torch

from etmamba_timm.checkpoints import find_checkpoint
from etmamba_timm.cli import main
from etmamba_timm.training.evaluate import Scores

ROOT = Path(__file__).parents[1]
VIDEOS = Path(__file__).with_name("mocap")
RESULTS = ROOT / "benchmarks" / "results"
PUBLISHED = Scores.load(RESULTS / "mocap_test.safetensors")  # on all test videos of held-out views


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


def test_its_figures_are_those_of_the_scores():
    page, weights, readme = (
        (ROOT / file).read_text(encoding="utf-8") for file in ("docs/mocap.md", "docs/weights.md", "README.md")
    )
    views, looks = find_checkpoint("etmamba_ti.mocap").figures
    for figure, scores, kind in (
        (views, PUBLISHED, "views"),
        (looks, Scores.load(RESULTS / "mocap_looks.safetensors"), "looks"),
    ):
        assert figure["dataset"].endswith(f"{len(scores.labels)} videos of held-out {kind}")
        assert figure["value"] == pytest.approx(100 * scores.topk(1), abs=0.005)
        top1, top5 = f"{figure['value']:.1f}%", f"{100 * scores.topk(5):.1f}%"
        assert f"| held-out {kind} | {top1} | {top5} |" in page
        assert f"right on **{top1}** of" in page
        assert f"| rendered | [{kind}](mocap.md#held-out-{kind}) | `etmamba_ti.mocap` | {top1} |" in weights
        assert f"{top1} on held-out {kind}" in readme
