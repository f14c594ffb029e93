"""Evaluation: scores are means over views, for any batch size and number of processes; failed videos are counted."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import DIRECTIONS, write_shapes
from torch import nn

from etmamba_timm.checkpoints.save import save_checkpoint
from etmamba_timm.cli import main
from etmamba_timm.data import Annotations, Clip, EvalClips, EvalTransform, read_folders
from etmamba_timm.training.evaluate import Scores, average_precision, evaluate

SMALL = {"embed_dim": 32, "depth": 2, "num_frames": 4, "img_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """`root/val/<class>`: 12 videos, two of which are damaged beyond reading."""
    root = tmp_path_factory.mktemp("data")
    write_shapes(root / "val", 3, seed=0)
    for name in ("left", "up"):
        (root / "val" / name / "1.webm").write_bytes(b"\x1aE\xdf\xa3" + bytes(100))
    return root


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("etmamba_ti", num_classes=4, **SMALL)
    nn.init.normal_(model.head.weight, std=2.0)  # scores that differ
    return model.eval()


@pytest.fixture
def clips(data) -> EvalClips:
    return EvalClips(read_folders(data / "val"), EvalTransform((32, 24)), Clip(4, 1), num_clips=2, num_crops=3)


def test_scores_are_the_mean_over_views(model, clips):
    scores = evaluate(model, clips, batch_size=4)
    assert scores.indices.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 11]
    assert (scores.failed, scores.missing) == (2, 0)
    for row, index in enumerate(scores.indices.tolist()):
        views = clips[index]["clip"]
        assert len(views) == 6
        with torch.no_grad():
            by_hand = sum(model(view[None])[0].softmax(-1) for view in views) / 6
        torch.testing.assert_close(scores.probabilities[row], by_hand)
        assert scores.labels[row] == clips.annotations.samples[index][1]


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_same_for_any_batch_size_and_workers(model, clips, batch_size):
    expected = evaluate(model, clips, batch_size=6)
    scores = evaluate(model, clips, batch_size=batch_size, workers=batch_size % 3)
    torch.testing.assert_close(scores.probabilities, expected.probabilities, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.labels, expected.labels)


def test_the_model_and_the_generators_are_left_as_they_were(model, clips):
    model.train()
    state = torch.get_rng_state()
    evaluate(model, clips)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_all_figures_take_the_same_of_equally_likely_classes(classes):
    """Scores under autocast to bfloat16 are often equal, and topk takes any of them."""
    labels = torch.arange(classes)
    scores = Scores(torch.ones(classes, classes), labels, labels, 0, 0, [str(i) for i in range(classes)])
    assert scores.per_class() == [1.0] + [0.0] * (classes - 1)
    assert [scores.topk(k) for k in range(1, classes + 1)] == [k / classes for k in range(1, classes + 1)]


def test_metrics():
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.9, 0.0, 0.1]])
    scores = Scores(probabilities, torch.tensor([0, 1, 1, 0]), torch.arange(4), 1, 2, ["a", "b", "c"])
    assert scores.per_class() == [1.0, 0.0, None]
    assert [scores.topk(k) for k in (1, 2, 3, 9)] == [0.5, 1.0, 1.0, 1.0]
    assert scores.metrics() == {
        "top1": 0.5,
        "top5": 1.0,
        "mean_class": 0.5,
        "videos": 4,
        "failed": 1,
        "missing": 2,
    }


def average_precision_by_hand(scores: list[float], labels: list[int]) -> float:
    """The sum, over thresholds from the highest score down, of the gain in recall times the precision."""
    value, before = 0.0, 0
    for threshold in sorted(set(scores), reverse=True):
        taken = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        value += (sum(taken) - before) / sum(labels) * sum(taken) / len(taken)
        before = sum(taken)
    return value


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.51, 1.0]) | st.floats(0, 1, width=32), st.booleans()))
)
def test_average_precision(videos):
    """Also of equal scores."""
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, labels = [score for score, _ in videos], [int(label) for _, label in videos]
    if not any(labels):
        return
    found = average_precision(np.array(scores, np.float32), np.array(labels, np.float32))
    assert found == pytest.approx(average_precision_by_hand(scores, labels), abs=1e-12)
    assert found == pytest.approx(sklearn.average_precision_score(labels, scores), abs=1e-12)


def test_metrics_of_several_labels(tmp_path):
    probabilities = torch.tensor([[0.9, 0.8, 0.1], [0.5, 0.4, 0.1], [0.1, 0.9, 0.7], [0.6, 0.1, 0.1]])
    labels = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]])
    scores = Scores(probabilities, labels, torch.arange(4), 1, 2, ["a", "b", "c"])
    by_class = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2]
    assert scores.per_class() == [*map(pytest.approx, by_class), None]
    assert scores.metrics() == {"map": pytest.approx(sum(by_class) / 2), "videos": 4, "failed": 1, "missing": 2}
    scores.save(tmp_path / "s.safetensors")
    assert Scores.load(tmp_path / "s.safetensors").metrics() == scores.metrics()


def test_scores_of_several_labels(model, clips):
    """Sigmoids, with the labels as zeros and ones."""
    samples = [(file, (0, label) if i else ()) for i, (file, label) in enumerate(clips.annotations.samples)]
    clips.annotations = Annotations(samples, clips.annotations.classes, [])
    assert clips[0]["label"].tolist() == [0, 0, 0, 0]
    model.is_multilabel = True
    scores = evaluate(model, clips, batch_size=4)
    model.is_multilabel = False
    for row, index in enumerate(scores.indices.tolist()):
        item = clips[index]
        with torch.no_grad():
            by_hand = sum(model(view[None])[0].sigmoid() for view in item["clip"]) / 6
        torch.testing.assert_close(scores.probabilities[row], by_hand)
        assert torch.equal(scores.labels[row], item["label"])
        assert item["label"].nonzero()[:, 0].tolist() == sorted(set(samples[index][1]))


def test_saved_scores_come_back(tmp_path):
    scores = Scores(torch.rand(2, 3), torch.tensor([0, 2]), torch.tensor([4, 5]), 1, 0, ["a", "ü", "c"])
    (tmp_path / "other").touch()
    scores.save(tmp_path / "s.safetensors")
    assert (tmp_path / "s.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "other").unlink()
    read = Scores.load(tmp_path / "s.safetensors")
    assert torch.equal(read.probabilities, scores.probabilities)
    assert (read.classes, read.failed, read.metrics()) == (scores.classes, 1, scores.metrics())
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(ValueError, match="holds no scores; `etmamba eval --scores` writes them"):
        Scores.load(tmp_path / "x")


def test_nothing_to_score(model, clips):
    bad = [sample for i, sample in enumerate(clips.annotations.samples) if i in (4, 10)]
    clips = EvalClips(Annotations(bad, clips.annotations.classes, []), clips.transform, clips.clip)
    with pytest.raises(ValueError, match="none of 2 videos can be decoded"):
        evaluate(model, clips)


def test_what_is_not_finite_is_no_score(clips):
    class Nan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(float("nan")))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight.expand(len(x), 4)

    with pytest.raises(ValueError, match="the scores aren't finite"):
        evaluate(Nan(), clips)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """The model in the Hub's layout, its classes in another order than the folders'."""
    folder = tmp_path_factory.mktemp("model") / "m"
    save_checkpoint(model, folder, label_names=sorted(DIRECTIONS, reverse=True), stride=1)
    return folder


def test_the_command(folder, data, tmp_path, capsys):
    arguments = ["eval", "--model", f"local-dir:{folder}", "--data", str(data), "--workers", "0"]
    assert main([*arguments, "--scores", str(tmp_path / "s.safetensors"), "--num-clips", "2"]) == 0
    told = capsys.readouterr().out.splitlines()
    scores = Scores.load(tmp_path / "s.safetensors")
    assert scores.classes == ["up", "right", "left", "down"]
    assert scores.labels.tolist() == [3, 3, 3, 2, 2, 1, 1, 1, 0, 0]
    assert [line.split()[0] for line in told[:4]] == scores.classes
    assert told[4].startswith(f"top-1 {scores.topk(1):.2%}, top-5 100.00%")
    assert told[4].endswith("10 videos, 2 clips × 1 crop of each (2 failed, not counted)")
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["per_class"].keys() == set(DIRECTIONS)


def test_several_processes_tell_the_same(folder, data, tmp_path):
    arguments = ["eval", "--model", f"local-dir:{folder}", "--data", str(data), "--workers", "0", "--num-crops", "3"]
    assert main([*arguments, "--scores", str(tmp_path / "1.safetensors")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launch, "etmamba_timm", *arguments, "--scores", str(tmp_path / "2.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 1
    one, two = (Scores.load(tmp_path / f"{n}.safetensors") for n in (1, 2))
    torch.testing.assert_close(one.probabilities, two.probabilities, rtol=1e-5, atol=1e-6)
    assert torch.equal(one.indices, two.indices)
    assert one.failed == two.failed == 2


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--subset", "dev"], "no subset 'dev'"),
        (["--subset", "test"], "has no folder 'test'"),
        (["--scores", "nowhere/s"], "nowhere: no such folder; create it first"),
        (["--dataset", "ucf"], "no layout 'ucf'"),
    ],
)
def test_the_commands_errors(folder, data, extra, said, capsys):
    assert main(["eval", "--model", f"local-dir:{folder}", "--data", str(data), *extra]) == 2
    assert said in capsys.readouterr().err
