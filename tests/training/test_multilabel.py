"""Videos with several labels, from a list to a trained model and its scores."""

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from shapes import DIRECTIONS, write_several, write_shapes
from torch.nn import functional as F

from etmamba_timm.checkpoints import save_checkpoint
from etmamba_timm.checkpoints.convert import convert_checkpoint
from etmamba_timm.cli import main
from etmamba_timm.predict import load_model, predict
from etmamba_timm.runtime import ExportedModel, describe
from etmamba_timm.training.evaluate import Scores
from etmamba_timm.training.recipe import load_recipe
from etmamba_timm.training.train import _criterion, build_model

TINY = ("model=etmamba_ti", "model_args={embed_dim: 64, depth: 4, patch_size: 8}", "pretrained=false", "num_frames=4")
PLAIN = ("stride=1", "size=32", "batch_size=8", "epoch_updates=0", "opt=adamw", "opt_args={}", "lr=1e-3", "ema=0")
SETTINGS = (*TINY, *PLAIN, "scale=[1,1]", "ratio=[1,1]", "flip=0", "precision=no", "num_crops=1", "num_clips=2")
# Everything that touches the labels, and everything random.
ALL = ("mixup=0.4", "cutmix=0.5", "balance=0.5", "accumulate=2", "drop_path=0.2", "erasing=0.3", "epochs=1")


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Lists of several directions a video; one of the videos for validation is damaged beyond reading."""
    root = tmp_path_factory.mktemp("data")
    write_several(root, 48, 0, "train")
    write_several(root, 16, 1, "val")
    (root / "val" / "3.mp4").write_bytes((root / "val" / "3.mp4").read_bytes()[:80])
    return root


def train(data: Path, run: Path, *settings: str, options: tuple = ()) -> int:
    given = ["--set", *SETTINGS, "warmup_epochs=0", *settings]
    return main(["train", "--data", str(data), "-o", str(run), "--workers", "0", *options, *given])


@pytest.fixture(scope="module")
def done(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert train(data, run, "epochs=8", "repeat=4") == 0
    return run


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_it_learns_and_says_how_it_was_measured(done, data, capsys):
    scores = Scores.load(done / "scores.safetensors")
    assert (scores.failed, scores.classes, scores.labels.shape) == (1, sorted(DIRECTIONS), (15, 4))
    assert scores.metrics()["map"] > 0.75  # at random about 0.4
    with (done / "val.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["update", "epoch", "map", "videos", "failed"]
    by_epoch = [float(row["map"]) for row in rows]
    best = max(range(8), key=lambda epoch: (by_epoch[epoch], epoch))
    stated = config(done / "model")
    assert stated["problem_type"] == "multi_label_classification"
    assert f"after epoch {1 + best} of 8" in stated["card"]["notes"]
    (figure,) = stated["card"]["figures"]
    assert (figure["metric"], figure["value"]) == ("mAP", round(100 * scores.metrics()["map"], 2))
    card = (done / "model" / "README.md").read_text()
    assert f"| mAP | {figure['value']} |" in card
    assert "a video may be of several" in card
    assert json.loads((done / "run.json").read_text())["multilabel"] is True
    assert train(data, done, "epochs=8", "repeat=4") == 0  # it is finished
    told = capsys.readouterr().out
    assert "48 for training with several labels (1.5 on average)" in told
    assert f"mAP {scores.metrics()['map']:.2%}, 15 videos, 2 clips × 1 crop of each (1 failed, not counted)" in told


def test_eval_and_predict(done, data, capsys):
    """The model's classes don't exclude each other: scores are sigmoids."""
    name = f"local-dir:{done / 'model'}"
    model, video = load_model(name), data / "val" / "0.mp4"
    assert model.is_multilabel
    capsys.readouterr()
    assert main(["eval", "--model", name, "--data", str(data), "--num-clips", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = Scores.load(done / "scores.safetensors")
    assert found["map"] == pytest.approx(scores.metrics()["map"])
    assert list(found["per_class"].values()) == pytest.approx(scores.per_class())
    assert main(["eval", "--model", name, "--data", str(data)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("mAP ")
    torch.testing.assert_close(predict(model, video, num_clips=2), scores.probabilities[0])
    sums = [predict(load_model(name), file).sum().item() for file in (data / "val").glob("1*.mp4")]
    assert any(abs(total - 1) > 0.2 for total in sums)
    assert main(["predict", str(video), "--model", name, "--num-clips", "2", "--json"]) == 0
    (best, *_) = json.loads(capsys.readouterr().out)["predictions"]
    assert best["score"] == pytest.approx(scores.probabilities[0].max().item(), abs=1e-6)


def test_videos_with_one_label_each_are_measured_too(done, tmp_path, capsys):
    write_shapes(tmp_path / "val", 1, seed=3)
    assert main(["eval", "--model", f"local-dir:{done / 'model'}", "--data", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("mAP ")


def test_the_same_run_twice_with_all_that_touches_labels(data, tmp_path):
    for name in ("a", "b"):
        assert train(data, tmp_path / name, *ALL) == 0
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("a", "b"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_one_list_is_split_and_resumes(data, tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "train").symlink_to(data / "train")
    (tmp_path / "clips" / "train.csv").write_text((data / "train.csv").read_text())
    run = tmp_path / "clips" / "run"
    assert train(tmp_path / "clips", run, "epochs=1") == 0
    lists = ((run / "split" / f"{name}.csv").read_text().splitlines() for name in ("train", "val"))
    (header, *kept), (_, *held_out) = lists
    assert header == "video,labels"
    assert sorted([*kept, *held_out]) == sorted((data / "train.csv").read_text().splitlines()[1:])
    assert train(tmp_path / "clips", run, "epochs=2") == 0
    model = ["--model", f"local-dir:{run / 'model'}", "--data", str(tmp_path / "clips")]
    capsys.readouterr()
    assert main(["eval", *model, "--dataset", "list", "--annotations", str(run / "split")]) == 0
    assert f", {len(held_out)} videos" in capsys.readouterr().out


@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss(mixed):
    """Binary cross entropy, averaged over classes, with labels that are smoothed towards a half."""
    recipe = load_recipe("k400", label_smoothing=0.2, mixup=0.8 * mixed)
    model = build_model(load_recipe("k400", model="etmamba_ti", pretrained=False), ["a", "b", "c"], True)
    mixup, criterion = _criterion(recipe, model)
    logits, labels = torch.randn(4, 3), torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]])
    wanted = 0.8 * labels + 0.1
    if mixup is not None:
        clips, targets = mixup(torch.arange(4.0).view(4, 1, 1, 1).repeat(1, 1, 8, 8), labels)
        share = clips[0, 0, 0, 0].item() / 3  # of the last clip in the first
        torch.testing.assert_close(targets, (1 - share) * wanted + share * wanted.flip(0))
        wanted = targets
    else:
        targets = labels
    by_hand = F.softplus(-logits) * wanted + F.softplus(logits) * (1 - wanted)
    torch.testing.assert_close(criterion(logits, targets), by_hand.mean())


def test_the_model_stays_what_it_is(done, tmp_path):
    """However it is loaded, saved and exported; but a new classifier starts anew."""
    folder = done / "model"
    convert_checkpoint(folder, tmp_path / "converted")
    model = load_model(f"local-dir:{tmp_path / 'converted'}")
    assert model.is_multilabel
    assert load_model("etmamba_ti", folder).is_multilabel
    about = json.loads(describe(model, "float32", False))
    assert ExportedModel(lambda x: x, about).is_multilabel
    assert not ExportedModel(lambda x: x, {**about, "problem_type": "single_label_classification"}).is_multilabel
    fresh = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    assert not fresh.is_multilabel
    save_checkpoint(fresh, tmp_path / "fresh")
    assert "problem_type" not in config(tmp_path / "fresh")
    model.reset_classifier(4)
    assert not model.is_multilabel
    recipe = load_recipe("k400", model="etmamba_ti", checkpoint=str(folder), num_frames=4, size=32)
    assert not build_model(recipe, list("abcd")).is_multilabel  # new videos may have one label each


def test_what_needs_one_label_of_each_video(done, data, tmp_path, capsys):
    model = ["--model", f"local-dir:{done / 'model'}"]
    plots = {
        "several labels, so one class isn't confused": ["confusion", str(done / "scores.safetensors")],
        "the videos have several labels, and a plot of features": ["tsne", *model, "--data", str(data)],
    }
    for message, arguments in plots.items():
        assert main(["analyze", *arguments, "-o", str(tmp_path / "plot.png")]) == 2
        assert message in capsys.readouterr().err
    assert train(data, tmp_path / "run", options=("--probe", "linear")) == 2
    assert "videos have several labels, and a probe learns one of each" in capsys.readouterr().err
    assert train(data, tmp_path / "run", options=("--teacher", "etmamba_ti.mocap")) == 2
    assert "leave teacher out, or learn its features alone: teacher_weight=0" in capsys.readouterr().err
    assert main(["teach", *model, "--data", str(data), "-o", str(tmp_path / "taught")]) == 2
    assert "the teacher gives a video several labels; give one whose" in capsys.readouterr().err
    write_shapes(tmp_path / "val", 2, seed=0)
    single = timm.create_model("etmamba_ti", num_classes=4, embed_dim=16, depth=1, num_frames=2, img_size=32)
    save_checkpoint(single, tmp_path / "single", label_names=sorted(DIRECTIONS))
    assert main(["eval", "--model", f"local-dir:{tmp_path / 'single'}", "--data", str(data)]) == 2
    assert "the videos have several labels, and the model's classes exclude each other" in capsys.readouterr().err


def test_a_timeline_has_the_models_own_scores(done, data):
    from etmamba_timm.seeing.timeline import timeline

    model = load_model(f"local-dir:{done / 'model'}")
    times = {"clip_seconds": 0.5, "hop": 0.5}  # one clip
    sigmoids = timeline(model, data / "val" / "0.mp4", **times).probabilities
    model.is_multilabel = False
    torch.testing.assert_close(
        sigmoids.logit().softmax(1), timeline(model, data / "val" / "0.mp4", **times).probabilities
    )
