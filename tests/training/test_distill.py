"""Distillation: what a teacher sees, what is learnt from it, and runs that are stopped."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from shapes import DIRECTIONS, write_shapes
from torch import nn
from torch.nn import functional

from etmamba_timm.checkpoints.save import save_checkpoint
from etmamba_timm.cli import main
from etmamba_timm.data import Annotations, EvalTransform
from etmamba_timm.features import read_features
from etmamba_timm.predict import load_model, predict
from etmamba_timm.training.distill import Distillation, match_classes, soft_loss
from etmamba_timm.training.recipe import Recipe
from etmamba_timm.training.teacher import TeacherError, load_teacher

transformers = pytest.importorskip("transformers")

RECIPE = """
model: etmamba_ti
model_args: {embed_dim: 16, depth: 1, patch_size: 16}
pretrained: false
num_frames: 2
stride: 1
size: 32
epochs: 3
warmup_epochs: 1
batch_size: 8
lr: 1e-2
precision: "no"
rand_augment:
num_clips: 1
num_crops: 1
"""
CLASSES = sorted(DIRECTIONS)
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state()  # of `Accelerator` in a test; a run may have another precision


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 videos for training, 3 updates an epoch; one of them is damaged beyond reading."""
    root = tmp_path_factory.mktemp("data")
    write_shapes(root / "train", 6, seed=0)
    write_shapes(root / "val", 1, seed=1)
    path = root / "train" / "up" / "4.webm"
    path.write_bytes(path.read_bytes()[:80])
    (root / "recipe.yaml").write_text(RECIPE)
    return root


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """A model with other frames and another size, and with one class more, in another order and writing."""
    torch.manual_seed(0)
    arguments = {"embed_dim": 32, "depth": 1, "patch_size": 16, "num_frames": 3, "img_size": 48}
    model = timm.create_model("etmamba_ti", num_classes=5, **arguments)
    nn.init.normal_(model.head.weight, std=2.0)
    folder = tmp_path_factory.mktemp("ours") / "model"
    save_checkpoint(model, folder, label_names=["U_p", "RIGHT", "other", "left ", "Down"], stride=1)
    return folder


def save_teacher(folder: Path, kind: str, **settings) -> Path:
    """A small video classifier of transformers, saved as transformers saves it, with its processor."""
    configs = {
        "VideoMAE": {"image_size": 32, "num_frames": 4, **WIDTHS},
        "Timesformer": {"image_size": 32, "num_frames": 4, **WIDTHS},
        "Vivit": {"image_size": 32, "num_frames": 4, "tubelet_size": [2, 16, 16], **WIDTHS},
        "VJEPA2": {
            **{"crop_size": 32, "frames_per_clip": 4, "hidden_size": 24, "pred_hidden_size": 24},
            **{"num_hidden_layers": 1, "pred_num_hidden_layers": 1, "num_pooler_layers": 1},
            **{"num_attention_heads": 2, "pred_num_attention_heads": 2},
        },
    }
    torch.manual_seed(0)
    labels = dict(enumerate(["up", "down", "left", "right"]))
    config = getattr(transformers, f"{kind}Config")(**configs[kind], id2label=labels, initializer_range=0.5, **settings)
    transformers.AutoModelForVideoClassification.from_config(config).save_pretrained(folder)
    processor = getattr(transformers, f"{kind}VideoProcessor")
    processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videomae(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("videomae"), "VideoMAE")


def arguments(data: Path, folder: Path, teacher: object, *settings: str) -> list[str]:
    given = ["--set", *settings] if settings else []
    common = ["train", "--recipe", str(data / "recipe.yaml"), "--data", str(data), "-o", str(folder)]
    return [*common, "--workers", "0", "--teacher", str(teacher), *given]


def losses(run: Path) -> list[float]:
    with (run / "train.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def distillation(teacher: object, **settings) -> Distillation:
    recipe = Recipe(**{"teacher": str(teacher), "num_frames": 2, "size": 32, **settings})
    made = Distillation(recipe, Annotations([], CLASSES, []), Accelerator(cpu=True))
    model = timm.create_model("etmamba_ti", embed_dim=16, depth=1, num_classes=4)
    made.attach(model, EvalTransform())
    made.student = model
    return made


def test_soft_loss():
    torch.manual_seed(0)
    logits, taught = torch.randn(2, 5, 4, dtype=torch.float64)
    wanted = (taught / 3).softmax(1)
    by_hand = 9 * (wanted * (wanted.log() - (logits / 3).softmax(1).log())).sum(1)
    torch.testing.assert_close(soft_loss(logits, taught, 3.0), by_hand.mean())
    assert soft_loss(taught + 1, taught, 3.0).abs() < 1e-12
    untaught = taught.clone()
    untaught[[1, 3]] = torch.nan
    logits.requires_grad_()
    loss = soft_loss(logits, untaught, 3.0)
    torch.testing.assert_close(loss, by_hand[[0, 2, 4]].sum() / 5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert not gradient[[1, 3]].any()
    impossible = torch.tensor([[0.0, -torch.inf]])  # log probabilities of one certain class
    torch.testing.assert_close(soft_loss(torch.zeros(1, 2), impossible, 1.0), torch.tensor(2.0).log())


def test_classes_are_matched_by_name():
    assert match_classes(["b", "a"], ["a", "c", "b"], "t") == [2, 0]
    assert match_classes(["salsa dancing", "Clap"], ["clap", "salsa_dancing"], "t") == [1, 0]
    assert match_classes(["a b", "ab"], ["ab", "a b"], "t") == [1, 0]
    with pytest.raises(TeacherError, match="teacher t lacks 2 of 3 classes, first d, e; it has 2: a, b, ..."):
        match_classes(["a", "d", "e"], ["a", "b"], "t")
    with pytest.raises(TeacherError, match="lacks 2 of 2 classes"):  # two that differ in spaces alone
        match_classes(["A b", "a"], ["a b", "ab", "a"], "t")


def test_what_a_teacher_sees(ours, videomae):
    """The student's own clip, in the teacher's frames, size and normalisation."""
    frames = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    clip = EvalTransform(size=(32, 32))(frames)
    pictures = frames.permute(3, 0, 1, 2)[None] / 255  # [1, C, T, H, W]
    expected = (pictures[:, :, [0, 0, 1, 1]] - 0.5) / 0.5
    torch.testing.assert_close(distillation(videomae).view(clip), expected, rtol=0, atol=1e-5)
    seen = distillation(ours).view(clip)
    larger = functional.interpolate(clip[0].transpose(0, 1), (48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen[0].transpose(0, 1), larger[[0, 1, 1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["VideoMAE", "Timesformer", "Vivit", "VJEPA2"])
def test_teachers_of_transformers(kind, tmp_path):
    """The same logits as by transformers' own processor, whose pictures are rounded where they are resized."""
    folder = save_teacher(tmp_path, kind)
    teacher = load_teacher(str(folder))
    assert (teacher.classes, teacher.clip.num_frames) == (["up", "down", "left", "right"], 4)
    frames = torch.randint(0, 256, (4, 32, 40, 3), dtype=torch.uint8)
    processor = transformers.AutoVideoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForVideoClassification.from_pretrained(folder).eval()
    inputs = processor([frames.permute(0, 3, 1, 2)], return_tensors="pt")
    clip = teacher.transform(frames)
    with torch.no_grad():
        theirs = inputs[model.main_input_name].transpose(1, 2)
        torch.testing.assert_close(clip, theirs, rtol=0, atol=0.05 if kind == "VJEPA2" else 1e-5)
        logits = model(**inputs).logits
        torch.testing.assert_close(teacher(theirs), logits)
        features = functional.linear(teacher.features, model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(features, logits)


def test_the_loss(ours):
    made = distillation(ours, teacher_weight=0.3, temperature=2.0, feature_weight=0.1)
    torch.manual_seed(0)
    clips, target = torch.randn(3, 3, 2, 32, 32), torch.tensor([0, 3, 1])
    logits = made.student(clips)
    loss = made.loss(functional.cross_entropy, logits, target, clips, torch.arange(3))
    teacher = load_model(f"local-dir:{ours}")
    with torch.no_grad():
        seen = made.view(clips)
        taught, features = teacher(seen)[:, [4, 3, 1, 0]], teacher.forward_head(teacher.forward_features(seen), True)
    student = made.student.forward_head(made.student.forward_features(clips), True)
    likeness = functional.cosine_similarity(made.student.teacher_projection(student), features)
    expected = 0.3 * soft_loss(logits, taught, 2.0) + 0.7 * functional.cross_entropy(logits, target)
    torch.testing.assert_close(loss, expected + 0.1 * (1 - likeness).mean())
    loss.backward()
    assert made.student.teacher_projection.weight.grad.any()
    assert made.student.patch_embed.proj.weight.grad.any()
    assert all(p.grad is None for p in made.teacher.parameters())


SETTINGS = (
    "feature_weight=1",
    "ema=0.9",
    "accumulate=2",
    "precision=bf16",
    "mixup=0.8",
    "drop_path=0.1",
    "erasing=0.5",
)


@pytest.fixture(scope="module")
def done(data, ours, tmp_path_factory) -> Path:
    """A run from the start to the end."""
    run = tmp_path_factory.mktemp("runs") / "done"
    os.environ["ACCELERATE_USE_CPU"] = "true"
    assert main(arguments(data, run, ours, *SETTINGS)) == 0
    return run


def kill_after(command: list[str], run: Path, update: int) -> None:
    """Kills a run, and the processes that it started, once the state after `update` updates is there."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / f"state-{update}").exists():
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL


def same_weights(run: Path, other: Path) -> bool:
    names = ("best.safetensors", "last.safetensors", "model/model.safetensors")
    return all((run / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_killed_it_ends_as_if_it_had_not_been(done, data, ours, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "etmamba_timm", *arguments(data, run, ours, *SETTINGS), "--save-updates", "2"]
    kill_after(command, run, 4)
    assert main(command[3:]) == 0
    assert same_weights(run, done)
    assert not any("teacher" in key for key in load_file(done / "last.safetensors"))
    assert load_model(f"local-dir:{done / 'model'}").num_classes == 4
    card = json.loads((done / "model" / "config.json").read_text())["card"]
    assert card["recipe"]["teacher"] == "model"
    assert card["source"].startswith("trained from scratch, with the teacher model, on 24 videos")


def test_another_teacher_does_not_continue_a_run(data, ours, tmp_path, capsys):
    teacher, run = shutil.copytree(ours, tmp_path / "teacher"), tmp_path / "run"
    command = arguments(data, run, teacher, "epochs=1", "warmup_epochs=0")
    assert main(command) == 0
    shutil.rmtree(run / "model")  # as if it had been stopped before the end
    weights = load_file(teacher / "model.safetensors")
    weights["head.bias"] += 1
    model = load_model(f"local-dir:{teacher}")
    model.load_state_dict(weights)
    shutil.rmtree(teacher)
    save_checkpoint(model, teacher, label_names=["up", "right", "other", "left", "down"], stride=1)
    assert main(command) == 2
    assert f"teacher {teacher} has changed since the run began" in capsys.readouterr().err


def test_two_processes(data, videomae, tmp_path):
    """They learn as one does, and end with the same weights if they are killed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    same = ("drop_path=0", "feature_weight=1", "epochs=4", "eval_epochs=4")
    assert main(arguments(data, tmp_path / "one", videomae, *same)) == 0
    whole, killed = (
        [*launch, "etmamba_timm", *arguments(data, tmp_path / name, videomae, *same, "batch_size=4")]
        for name in ("whole", "killed")
    )
    subprocess.run(whole, check=True, capture_output=True, timeout=200)
    kill_after(killed, tmp_path / "killed", 6)
    subprocess.run(killed, check=True, capture_output=True, timeout=200)
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.fixture(scope="module")
def stored(data, ours, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("stored") / "scores.safetensors"
    command = [
        "teach",
        "--model",
        str(ours),
        "--data",
        str(data),
        "--num-clips",
        "2",
        "-o",
        str(file),
        "--workers",
        "0",
    ]
    assert main(command) == 1  # for the damaged video
    return file


def test_stored_scores(stored, data, ours, tmp_path, caplog):
    scores, names = read_features(stored)
    assert names[0] == "train/down/0.mp4"
    assert len(names) == 23
    expected = predict(load_model(f"local-dir:{ours}"), data / names[5], num_clips=2)
    torch.testing.assert_close(scores[5], expected)
    moved = shutil.copytree(data, tmp_path / "moved")
    for name, teacher in (("here", stored), ("there", stored)):
        source = data if name == "here" else moved
        assert main(arguments(source, tmp_path / name, teacher, "ema=0.9")) == 0
    assert "lacks 1 of 24 training videos, which have no teacher: first" in caplog.text
    assert same_weights(tmp_path / "here", tmp_path / "there")


def test_scores_belong_to_their_videos(stored, data):
    scores, names = read_features(stored)
    samples = [(data / name, 0) for name in reversed(names)]
    recipe = Recipe(teacher=str(stored), teacher_weight=1, temperature=1)
    made = Distillation(recipe, Annotations(samples, CLASSES, []), Accelerator(cpu=True))
    logits, indices = torch.randn(3, 4), torch.tensor([0, 22, 5])
    loss = made.loss(functional.cross_entropy, logits, torch.zeros(3), torch.empty(0), indices)
    taught = scores.flip(0)[indices][:, [4, 3, 1, 0]].log()
    torch.testing.assert_close(loss, soft_loss(logits, taught, 1.0))


def test_unlabelled_videos(data, videomae, tmp_path, capsys):
    """The student has the teacher's classes, and comes to agree with it, whatever the videos show."""
    (tmp_path / "train" / "any" / "depth").mkdir(parents=True)
    for i, path in enumerate(sorted((data / "train").rglob("*.mp4"))):
        shutil.copy(path, tmp_path / "train" / "any" / "depth" / f"{i}.mp4")
    shutil.copytree(data / "val", tmp_path / "val")
    shutil.copy(data / "recipe.yaml", tmp_path)
    settings = ("dataset=unlabelled", "mixup=0.1", "epochs=60", "eval_epochs=60", "erasing=0", "lr=0.3", "scale=[1, 1]")
    run = tmp_path / "run"
    assert main(arguments(tmp_path, run, videomae, *settings)) == 0
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["label_names"] == ["up", "down", "left", "right"]
    first, *_, last = losses(run)
    assert last < first / 2
    capsys.readouterr()
    assert main(arguments(tmp_path, tmp_path / "alone", "", *settings)) == 2
    assert "the training videos have no labels; set teacher" in capsys.readouterr().err


def test_only_features(data, ours, tmp_path):
    """Of a teacher with other classes."""
    model = load_model(f"local-dir:{ours}")
    save_checkpoint(model, tmp_path / "teacher", label_names=list("abcde"), stride=1)
    assert main(arguments(data, tmp_path / "run", tmp_path / "teacher", "teacher_weight=0", "feature_weight=1")) == 0


def no_processor(folder: Path, videomae: Path) -> str:
    shutil.copytree(videomae, folder, ignore=shutil.ignore_patterns("*processor*"))
    return "has no processor, which says how pixels are normalised"


def no_classifier(folder: Path, videomae: Path) -> str:
    config = transformers.VideoMAEConfig(image_size=32, num_frames=4, **WIDTHS)
    transformers.VideoMAEModel(config).save_pretrained(folder)
    return "isn't trained as a classifier: classifier.bias isn't in its weights"


def no_videos(folder: Path, videomae: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return "is no video classifier that transformers loads"


def no_config(folder: Path, videomae: Path) -> str:
    folder.mkdir()
    return "has no config.json; name the folder of a model, such as RUN/model of a run"


def no_json(folder: Path, videomae: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{")
    return "can't be read as JSON"


def other_classes(folder: Path, videomae: Path) -> str:
    save_teacher(folder, "VideoMAE", num_labels=4)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(4)}
    (folder / "config.json").write_text(json.dumps(config))
    return "lacks 4 of 4 classes, first down, left, right; it has 4: 0, 1, 2"


@pytest.mark.parametrize("make", [no_processor, no_classifier, no_videos, no_config, no_json, other_classes])
def test_folders_that_are_no_teachers(make, data, videomae, tmp_path, capsys):
    said = make(tmp_path / "teacher", videomae)
    assert main(arguments(data, tmp_path / "run", tmp_path / "teacher")) == 2
    told = capsys.readouterr().err
    assert f"teacher {tmp_path / 'teacher'} " in told or f"teacher {tmp_path / 'teacher'}: " in told
    assert said in told


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("resnet50", "teacher 'resnet50': unknown model 'resnet50'"),
        ("etmamba_ti_ebs", "teacher 'etmamba_ti_ebs': 'etmamba_ti_ebs' has no trained weights"),
        ("nowhere.safetensors", "nowhere.safetensors"),
        ("no/where", "teacher no/where is no folder here, and not on the Hub either"),
    ],
)
def test_names_that_are_no_teachers(teacher, said, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(arguments(data, tmp_path / "run", teacher)) == 2
    assert said in capsys.readouterr().err


def test_stored_scores_that_do_not_fit(stored, data, done, tmp_path, capsys):
    for setting in ("mixup=0.8", "feature_weight=1"):
        assert main(arguments(data, tmp_path / "run", stored, setting)) == 2
        assert f"{stored} holds class probabilities of whole videos, which fit neither" in capsys.readouterr().err
    assert main(arguments(data, tmp_path / "run", done / "last.safetensors")) == 2
    assert "A teacher's stored probabilities are written by `etmamba teach`" in capsys.readouterr().err
    with pytest.raises(TeacherError, match="has none of the training videos"):
        Distillation(
            Recipe(teacher=str(stored)), Annotations([(data / "val" / "up" / "0.mp4", 3)], CLASSES, []), Accelerator()
        )


def test_without_transformers(data, videomae, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(arguments(data, tmp_path / "run", videomae)) == 2
    assert "pip install 'etmamba-timm[teacher]'" in capsys.readouterr().err
