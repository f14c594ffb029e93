"""`etmamba train` on a folder of clips without any settings, and what it says before it starts."""

import csv
import json
import os
import re
from pathlib import Path

import pytest
from shapes import write_shapes

from etmamba_timm.cli import main
from etmamba_timm.training.recipe import load_recipe

SHORT = ("epochs=1", "epoch_updates=2", "warmup_epochs=0", "batch_size=2", "num_clips=1", "num_crops=1")
CLASSES = ["down", "left", "right", "up"]
SMALL = (*SHORT, "pretrained=false", "model_args={embed_dim: 16, depth: 1}", "opt=adamw", "opt_args={}")


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """`clips/<class>/*`: four classes of three videos."""
    return write_shapes(tmp_path_factory.mktemp("data") / "clips", 3, seed=0)


def train(clips: Path, run: Path, *more: str) -> int:
    return main(["train", "--data", str(clips), "-o", str(run), "--workers", "0", *more])


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(clips, tmp_path, capsys):
    assert train(clips, tmp_path / "run", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split(maxsplit=1) == ["data", f"{clips} (folders)"]
    assert "8 for training, 2 of each of 4 classes, and 4 for validation" in out
    assert "weights: etmamba_ti.mocap (in the package)" in out
    assert err == "etmamba: warning: only 4 videos for validation: each is 25 points of accuracy\n"
    assert not (tmp_path / "run").exists()


def test_a_folder_is_split_and_the_split_stays(clips, tmp_path, capsys):
    """The same command later, with one video more, is the same run; the lists are a dataset for `eval`."""
    data = tmp_path / "clips"
    for folder in clips.iterdir():
        (data / folder.name).mkdir(parents=True)
        for file in folder.iterdir():
            os.link(file, data / folder.name / file.name)
    run = tmp_path / "run"
    assert train(data, run, "--set", *SMALL) == 0
    assert f"model: {run / 'model'}" in capsys.readouterr().out
    recipe = load_recipe(run / "recipe.yaml")
    assert (recipe.dataset, recipe.model, recipe.num_frames, recipe.repeat) == ("folders", "etmamba_ti.mocap", 8, 1)
    weights = (run / "last.safetensors").read_bytes()
    os.link(data / "up" / "0.mp4", data / "up" / "new.mp4")
    assert train(data, run, "--set", *SMALL) == 0
    assert (run / "last.safetensors").read_bytes() == weights
    with (run / "split" / "val.csv").open() as file:
        held_out = [row["video"] for row in csv.DictReader(file)]
    assert sorted(Path(video).parent.name for video in held_out) == CLASSES
    model = ["--model", f"local-dir:{run / 'model'}", "--data", str(data)]
    capsys.readouterr()
    assert main(["eval", *model]) == 0
    out, err = capsys.readouterr()
    assert ", 13 videos, 1 clip × 1 crop of each" in out
    held_out = ["--dataset", "list", "--annotations", str(run / "split")]
    assert "the model was trained on 8 of 13 videos that it is evaluated on" in err
    assert f"add {' '.join(held_out)}\n" in err
    weights = ["--model", "etmamba_ti", "--checkpoint", str(run / "last.safetensors"), "--data", str(data)]
    assert main(["eval", *weights]) == 0
    assert "was trained on 8 of 13" in capsys.readouterr().err
    assert main(["eval", *model, *held_out]) == 0
    out, err = capsys.readouterr()
    assert ", 4 videos" in out
    assert "warning" not in err


def test_weights_beside_a_model_keep_its_names(clips, tmp_path, capsys):
    """`last.safetensors` in place of the folder's own weights."""
    run, video = tmp_path / "run", str(clips / "up" / "0.mp4")
    assert train(clips, run, "--set", *SMALL) == 0
    for more in (["--checkpoint", str(run / "last.safetensors")], []):
        capsys.readouterr()
        assert main(["predict", video, "--model", f"local-dir:{run / 'model'}", *more, "--topk", "4"]) == 0
        assert sorted(line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]) == CLASSES


def test_another_folder_for_the_same_run(clips, tmp_path, capsys):
    run, other = tmp_path / "run", write_shapes(tmp_path / "other", 5, seed=1)
    assert train(clips, run, "--set", *SMALL) == 0
    shared = sorted(path for path in other.glob("*/*.mp4") if (clips / path.relative_to(other)).exists())
    for gone in (shared[:4], shared[4:]):  # some of the run's videos are missing at first, and then all
        for path in gone:
            path.unlink()
        capsys.readouterr()
        assert train(other, run, "--set", *SMALL) == 2
        said = rf"{run} contains a run on other videos \(.*; choose another folder for the new run"
        assert re.search(said, capsys.readouterr().err)


def test_validation_is_taken_from_the_training_part_by_source(clips, tmp_path, capsys):
    """HMDB-51 has videos for training and for testing alone: no epoch is chosen on those for testing."""
    data, run = tmp_path / "hmdb51", tmp_path / "run"
    ending = "f_cm_np1_le_med"
    for label in ("up", "down"):
        names = [f"film{i // 2}_{label}_{ending}_{i}" for i in range(10)] + [f"other_{label}_{ending}_0"]
        (data / label).mkdir(parents=True)
        for name in names:
            os.link(clips / label / "0.mp4", data / label / f"{name}.avi")
        lines = [f"{name}.avi {2 if name.startswith('other') else 1}\n" for name in names]
        (data / f"{label}_test_split1.txt").write_text("".join(lines))
    assert train(data, run, "--set", *SMALL) == 0
    assert "and 4 for validation, taken from the training part by source" in capsys.readouterr().out
    with (run / "split" / "val.csv").open() as file:
        held_out = [Path(row["video"]).name.partition("_")[0] for row in csv.DictReader(file)]
    assert len(held_out) == 4
    assert len(set(held_out)) == 1  # the same film of either class
    card = json.loads((run / "model" / "config.json").read_text())["card"]
    assert card["figures"][0]["dataset"] == "4 validation videos (hmdb51, taken from the training part by source)"
    assert main(["eval", "--model", f"local-dir:{run / 'model'}", "--data", str(data)]) == 0
    assert ", 2 videos" in capsys.readouterr().out


def test_a_run_that_could_not_start_does_not_keep_its_split(clips, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(clips, run, "--set", "batch_size=64", "epoch_updates=0") == 2
    assert "too few videos (8) for a batch of 64" in capsys.readouterr().err
    write_shapes(tmp_path / "other", 5, seed=1)
    assert train(tmp_path / "other", run, "--set", *SMALL) == 0
    assert len((run / "split" / "train.csv").read_text().splitlines()) == 1 + 4 * 4


def test_other_files_are_left_alone(clips, tmp_path, capsys):
    (tmp_path / "x").touch()
    assert train(clips, tmp_path) == 2
    assert f"{tmp_path} exists and contains no run" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["x"]


def test_its_options_win_over_the_recipe(clips, tmp_path, capsys):
    options = ("--model", "videomamba_ti", "--checkpoint", "nowhere.pth")
    assert train(clips, tmp_path / "run", *options) == 2
    assert "nowhere.pth: no such checkpoint" in capsys.readouterr().err
    assert train(clips, tmp_path / "run", "--device", "cuda:77") == 2
    assert "device 'cuda:77' can't be used" in capsys.readouterr().err
    assert train(clips, tmp_path / "run", "--device", "cpu", "--model", "etmamba_s", "--dry-run") == 0
    assert "etmamba_s," in capsys.readouterr().out
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
    assert train(clips, tmp_path / "run", "--model", "etmamba_ti_ebs", "--dry-run") == 2
    assert "etmamba_ti_ebs has no weights to start from; give a file (--checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_the_weights_it_names_its_own_options(clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    small = ("num_frames=2", "size=32")
    assert train(clips, tmp_path / "run", "--model", "etmamba_ti", "--set", *SHORT, *small) == 2
    assert "--checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--checkpoint" in capsys.readouterr().out
