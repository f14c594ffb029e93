"""Training on real encoded files: it learns, resumes after kill -9 with the same result, and exports the model."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from shapes import KINDS, write_shapes

from etmamba_timm.cli import main, parser
from etmamba_timm.clip import Clip
from etmamba_timm.models import EtMamba
from etmamba_timm.predict import load_model
from etmamba_timm.training.evaluate import Scores
from etmamba_timm.training.recipe import load_recipe
from etmamba_timm.training.train import build_model

RECIPE = """
model: etmamba_ti
model_args: {embed_dim: 64, depth: 4, patch_size: 8}
pretrained: false
num_frames: 4
stride: 1
size: 32
epochs: 3
warmup_epochs: 1
batch_size: 8
lr: 3e-2
clip_grad: 1
flip: 0
rand_augment:
erasing: 0
scale: [1, 1]
ratio: [1, 1]
precision: "no"
num_clips: 2
num_crops: 1
"""


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """A GPU's kernels add up in any order, so there the same run twice isn't the same to the last bit."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Few videos, not equally many of each class; two of them are damaged beyond reading."""
    root = tmp_path_factory.mktemp("data")
    write_shapes(root / "train", 11, seed=0)
    write_shapes(root / "val", 3, seed=1)
    for path in (root / "train" / "up" / "4.webm", root / "val" / "left" / "1.webm"):
        path.write_bytes(path.read_bytes()[:80])
    for i in range(4):
        (root / "train" / "down" / f"{i}.{KINDS[i % 3][0]}").rename(root / "train" / "right" / f"{20 + i}.mp4")
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "shapes.yaml"
    path.write_text(RECIPE)
    return path


def arguments(recipe: Path, data: Path, run: Path, *settings: str) -> list[str]:
    given = ["--set", *settings] if settings else []
    return ["train", "--recipe", str(recipe), "--data", str(data), "-o", str(run), "--workers", "0", *given]


def rows(path: Path) -> list[dict]:
    with path.open() as file:
        return [{k: v for k, v in row.items() if k != "clips_per_second"} for row in csv.DictReader(file)]


# Everything random at once: drop path, dropout, mixup, stills, random erasing, RandAugment, averaged weights.
RANDOM = ("drop_path=0.3", "drop=0.2", "mixup=0.8", "cutmix=1.0", "still=0.5", "erasing=0.5")
RANDOM += ("rand_augment=rand-m9-mstd0.5-inc1",)
FROZEN = ("freeze_backbone=true", "model_args={embed_dim: 64, depth: 4, patch_size: 8, global_pool: map}")
ALL = (*RANDOM, "balance=0.5", "ema=0.9", "accumulate=2", "precision=bf16", "layer_decay=0.8")


@pytest.fixture(scope="module")
def done(recipe, data, tmp_path_factory) -> Path:
    """A run from the start to the end."""
    run = tmp_path_factory.mktemp("runs") / "done"
    assert main(arguments(recipe, data, run, *ALL)) == 0
    return run


def test_settings_may_be_given_one_by_one():
    args = parser().parse_args(["train", "--data", "d", "-o", "o", "--set", "epochs=1", "lr=2", "--set", "size=32"])
    assert args.set == ["epochs=1", "lr=2", "size=32"]
    assert parser().parse_args(["train", "--data", "d", "-o", "o"]).set == []


def test_what_a_run_leaves(done, data, capsys, caplog):
    assert len(rows(done / "val.csv")) == 3
    assert [row["update"] for row in rows(done / "train.csv")] == ["10", "15"]  # 44 videos make 5 updates an epoch
    assert float(rows(done / "train.csv")[0]["loss"]) < 2 * math.log(4)
    assert any((done / "tensorboard").iterdir())
    assert [p.name for p in done.glob("state-*")] == ["state-15"]
    assert not [p for p in done.iterdir() if p.name.startswith(".")]
    scores = Scores.load(done / "scores.safetensors")
    assert (scores.failed, len(scores.labels), scores.classes) == (1, 11, ["down", "left", "right", "up"])
    config = json.loads((done / "model" / "config.json").read_text())
    assert config["card"]["figures"][0]["value"] == round(100 * scores.topk(1), 2)
    assert config["clip"] == {"stride": 1, "num_frames": 4}
    assert load_recipe(done / "recipe.yaml").mixup == 0.8
    card = (done / "model" / "README.md").read_text()
    assert "trained from scratch on 44 videos (folders)" in card
    assert "- processes: 1\n" in card
    assert main(["eval", "--model", f"local-dir:{done / 'model'}", "--data", str(data), "--num-clips", "2"]) == 0
    told = capsys.readouterr().out
    assert f"top-1 {scores.topk(1):.2%}" in told


def test_the_model_has_the_best_weights(done):
    model = timm.create_model(f"local-dir:{done / 'model'}", pretrained=True)
    best = load_file(done / "best.safetensors")
    assert all(torch.equal(value, best[key]) for key, value in model.state_dict().items())
    by_epoch = [float(row["top1"]) for row in rows(done / "val.csv")]
    config = json.loads((done / "model" / "config.json").read_text())
    latest = max(range(3), key=lambda epoch: (by_epoch[epoch], epoch))
    assert f"after epoch {1 + latest} of 3" in config["card"]["notes"]


def test_a_finished_run_is_left_alone(done, recipe, data, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    assert main(arguments(recipe, data, done, *ALL)) == 0
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before
    assert "top-1" in capsys.readouterr().out


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(done, recipe, data, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "etmamba_timm", *arguments(recipe, data, run, *ALL), "--save-updates", "2"]
    kills = 0
    for update in (1, 4, 7, 12):  # kills it somewhere after that update's state is there, also while one is written
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            states = [int(p.name.rpartition("-")[2]) for p in run.glob("*state-*")]
            if max(states, default=0) > update:
                time.sleep(0.02 * update)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    assert kills >= 3
    last = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert last.returncode == 0, last.stderr
    assert "resuming after" in last.stderr
    for name in ("best.safetensors", "last.safetensors", "scores.safetensors", "model/model.safetensors"):
        assert (run / name).read_bytes() == (done / name).read_bytes(), name
    for name in ("train.csv", "val.csv"):
        assert rows(run / name) == rows(done / name)
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


@pytest.mark.skipif(os.name != "posix", reason="no limit on the size of files")
def test_a_full_disk_loses_nothing(done, recipe, data, tmp_path):
    """Files can't grow beyond 64 KiB, as on a full disk; once there is room, the same command resumes."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "etmamba_timm", *arguments(recipe, data, run, *ALL), "--save-updates", "2"]
    full = ["sh", "-c", 'ulimit -f 128 && exec "$@"', "sh", *command]  # 128 blocks of 512 bytes
    stopped = subprocess.run(full, capture_output=True, text=True, timeout=200)
    assert stopped.returncode == 2
    assert f"the state after update 2 can't be saved in {run}" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not list(run.glob("state-*"))
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert (run / "last.safetensors").read_bytes() == (done / "last.safetensors").read_bytes()


def test_other_settings_are_another_run(done, recipe, data, tmp_path, capsys):
    assert main(arguments(recipe, data, done, *ALL, "lr=1")) == 2
    assert (
        "contains a run with other settings (lr: 0.03 there, 1.0 now); choose another folder" in capsys.readouterr().err
    )
    (tmp_path / "x").write_text("")
    assert main(arguments(recipe, data, tmp_path)) == 2
    assert "exists and contains no run" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), FROZEN], ids=["whole", "frozen"])
def test_two_processes_learn_as_one_does(recipe, data, tmp_path, more):
    """The same clips in the same order, half in each: the same but for rounding."""
    same = ("drop_path=0", "num_clips=1", "balance=1", *more)
    assert main(arguments(recipe, data, tmp_path / "one", *same)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launch, "etmamba_timm", *arguments(recipe, data, tmp_path / "two", *same, "batch_size=4")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    one, two = (rows(tmp_path / name / "train.csv") for name in ("one", "two"))
    assert [row["lr"] for row in one] == [row["lr"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)
    scores = [Scores.load(tmp_path / name / "scores.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(scores[0].probabilities, scores[1].probabilities, rtol=0, atol=0.02)


@pytest.mark.parametrize("more", [(), FROZEN], ids=["head", "pooling"])
def test_a_frozen_backbone_stays_as_it_is(recipe, data, tmp_path, more):
    settings = ("freeze_backbone=true", "drop_path=0.5", "drop=0.2", "epochs=2", "ema=0.9", *more)
    assert main(arguments(recipe, data, tmp_path / "run", *settings, "--save-updates", "3")) == 0
    torch.manual_seed(0)
    before = build_model(load_recipe(tmp_path / "run" / "recipe.yaml"), list("abcd")).state_dict()
    after = load_file(tmp_path / "run" / "last.safetensors")
    own = {key for key in after if key.startswith(("head.", "attn_pool."))}
    assert any(key.startswith("attn_pool.") for key in own) == bool(more)
    assert {key for key in after if not torch.equal(before[key], after[key])} == own
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    best = load_file(tmp_path / "run" / "best.safetensors")
    assert all(torch.equal(value, best[key]) for key, value in model.state_dict().items())
    command = [sys.executable, "-m", "etmamba_timm", *arguments(recipe, data, tmp_path / "killed", *settings)]
    process = subprocess.Popen([*command, "--save-updates", "3"], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "killed").glob("state-*")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() != 0
    assert subprocess.run([*command, "--save-updates", "3"], capture_output=True).returncode == 0
    assert (tmp_path / "killed" / "last.safetensors").read_bytes() == (
        tmp_path / "run" / "last.safetensors"
    ).read_bytes()


def test_a_frozen_backbone_builds_no_graph_and_stays_in_evaluation_mode(recipe, data, tmp_path, monkeypatch):
    seen = []

    def forward_head(self, tokens, pre_logits=False):
        on = {name for name, part in self.named_modules() if part.training and name}
        seen.append((tokens.requires_grad, {name.partition(".")[0] for name in on}))
        return head(self, tokens, pre_logits)

    head = EtMamba.forward_head
    monkeypatch.setattr(EtMamba, "forward_head", forward_head)
    assert main(arguments(recipe, data, tmp_path / "run", *FROZEN, "epochs=1", "warmup_epochs=0")) == 0
    assert [parts for _, parts in seen if parts] == [{"attn_pool", "head_drop", "head"}] * 5
    assert not any(graph for graph, _ in seen)


def test_pictures_that_are_no_square(recipe, data, tmp_path):
    """A rectangular size and spread clips, from the recipe to the exported model and its evaluation."""
    settings = (
        "epochs=1",
        "warmup_epochs=0",
        "size=[24, 40]",
        "stride=spread",
        "model_args={embed_dim: 8, patch_size: 8}",
    )
    assert main(arguments(recipe, data, tmp_path / "run", *settings)) == 0
    model = load_model(f"local-dir:{tmp_path / 'run' / 'model'}")
    assert (model.img_size, model.clip) == ((24, 40), Clip(4, "spread"))
    assert main(["eval", "--model", f"local-dir:{tmp_path / 'run' / 'model'}", "--data", str(data)]) == 0


def test_it_starts_from_a_checkpoint(done, recipe, data, tmp_path):
    start = done / "best.safetensors"
    settings = (f"checkpoint={start}", "lr=0", "warmup_lr=0", "min_lr=0", "epochs=2", "ema=0")
    assert main(arguments(recipe, data, tmp_path / "run", *settings)) == 0
    before, after = load_file(start), load_file(tmp_path / "run" / "last.safetensors")
    assert all(torch.equal(before[key], value) for key, value in after.items())


def test_gradients_that_explode_stop_it(recipe, data, tmp_path, capsys):
    settings = ("lr=1e30", "clip_grad=0", "epochs=12")
    assert main(arguments(recipe, data, tmp_path / "run", *settings, "eval_epochs=12")) == 2
    told = capsys.readouterr().err
    assert "20 updates in a row weren't finite; lower lr, set clip_grad" in told
    assert str(tmp_path / "run") in told
    assert main(arguments(recipe, data, tmp_path / "run2", *settings)) == 2
    assert "validation after update 5: the scores aren't finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("batch_size=64",), "too few videos (44) for a batch of 64 in each process (1); lower batch_size"),
        (("checkpoint=nowhere.pth",), "nowhere.pth: no such checkpoint"),
        (("dataset=kinetics",), "holds no train.csv"),
        (("epoch=1",), "unknown settings epoch"),
        (("balance=2",), "balance is 2.0; it must be between 0 and 1"),
        (("opt=adamx",), "opt 'adamx' with opt_args {}: "),
        (
            ("model_args={num_frames: 4}",),
            "model_args can't contain num_frames (set num_frames)",
        ),
        (("model_args={widht: 4}",), "model 'etmamba_ti' with model_args {'widht': 4}: "),
        (("opt=muon", "opt_args={momentun: 0.9}"), "opt 'muon' with opt_args {'momentun': 0.9}: "),
    ],
)
def test_runs_that_cannot_be(recipe, data, tmp_path, settings, said, capsys):
    assert main(arguments(recipe, data, tmp_path / "run", *settings)) == 2
    assert said in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(recipe, data, tmp_path):
    code = (
        "import sys; sys.modules['accelerate'] = None; from etmamba_timm.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments(recipe, data, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "accelerate isn't installed; pip install 'etmamba-timm[train]'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_see_each_other_are_refused(recipe, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(recipe, data, tmp_path / "run")) == 2
    assert "2 processes were started, but accelerate sees 1" in capsys.readouterr().err


def test_from_scratch_it_tells_held_out_directions_apart(recipe, tmp_path):
    write_shapes(tmp_path / "train", 256, seed=0)
    write_shapes(tmp_path / "val", 50, seed=1)
    settings = ("epochs=7", "batch_size=24", "lr=6e-2", "label_smoothing=0", "drop_path=0", "ema=0.98", "opt=muon")
    others = "opt_args={fallback_no_weight_decay: true, fallback_lr_scale: 0.3}"
    assert main(arguments(recipe, tmp_path, tmp_path / "run", *settings, others, "eval_epochs=7")) == 0
    assert Scores.load(tmp_path / "run" / "scores.safetensors").topk(1) > 0.95
