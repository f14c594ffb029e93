"""Whole runs: their logs, what an update reads from the device, skipped updates, more epochs, compiled models."""

import csv
import itertools
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import tracking
from safetensors.torch import load_file
from shapes import write_shapes
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from etmamba_timm.cli import main
from etmamba_timm.training import progress
from etmamba_timm.training import train as training

RECIPE = """
model: etmamba_ti
model_args: {embed_dim: 16, depth: 1, patch_size: 16}
pretrained: false
num_frames: 2
stride: 1
size: 32
epochs: 6
warmup_epochs: 1
batch_size: 8
lr: 1e-2
clip_grad: 1
precision: "no"
rand_augment:
num_clips: 1
num_crops: 1
eval_epochs: 6
"""


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """44 videos for training: 5 updates an epoch, 30 in 6 epochs."""
    root = tmp_path_factory.mktemp("data")
    write_shapes(root / "train", 11, seed=0)
    write_shapes(root / "val", 1, seed=1)
    (root / "recipe.yaml").write_text(RECIPE)
    return root


def arguments(data: Path, folder: Path, *settings: str, save_updates: int = 500) -> list[str]:
    given = ["--set", *settings] if settings else []
    start = ["train", "--recipe", str(data / "recipe.yaml"), "--data", str(data), "-o", str(folder)]
    return [*start, "--workers", "0", "--save-updates", str(save_updates), *given]


def run(data: Path, folder: Path, *settings: str, save_updates: int = 500) -> int:
    return main(arguments(data, folder, *settings, save_updates=save_updates))


def rows(folder: Path) -> list[dict]:
    with (folder / "train.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "clips_per_second"} for row in csv.DictReader(file)]


def test_the_shortest_run_has_a_row(data, tmp_path):
    assert run(data, tmp_path / "run", "epochs=1", "warmup_epochs=0.2", "batch_size=14") == 0
    (row,) = rows(tmp_path / "run")
    assert (row["update"], row["skipped"]) == ("3", "0")
    assert float(row["loss"]) < 3


def test_lines_for_those_without_a_terminal(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "FIRST_LINE", 0)
    monkeypatch.setattr(progress, "LINES", 0)
    caplog.set_level(logging.INFO, "etmamba_timm")
    assert run(data, tmp_path / "run", "epochs=2", "eval_epochs=1") == 0
    line = r"epoch (\d)/2, update (\d+)/10: loss (\S+), rate (\S+), (\S+) clips/s, about \d+ s( and evaluation)? left"
    found = [re.fullmatch(line, record.message) for record in caplog.records if "clips/s" in record.message]
    assert [(m[1], int(m[2])) for m in found] == [("1" if n <= 5 else "2", n) for n in range(2, 11)]
    assert [m[6] is None for m in found] == [n > 5 for n in range(2, 11)]  # the first evaluation comes after update 5
    assert float(found[-1][3]) == pytest.approx(float(rows(tmp_path / "run")[0]["loss"]), abs=1e-3)
    assert "evaluation: 2 of 4 videos" in caplog.text
    caplog.clear()
    monkeypatch.setattr(progress, "FIRST_LINE", 1000)
    assert run(data, tmp_path / "quiet", "epochs=2") == 0
    assert "clips/s" not in caplog.text


def test_trackers_that_cannot_be(data, tmp_path, capsys):
    for name, said in (("tensorbord", "unknown tracker 'tensorbord'; accelerate "), (missing_tracker(), "pip install")):
        assert main([*arguments(data, tmp_path / "run"), "--trackers", name]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def missing_tracker() -> str:
    installed = set(map(str, tracking.get_available_trackers()))
    return next(name for name in tracking.LOGGER_TYPE_TO_CLASS if name not in installed)


def test_logs_go_to_trackers_by_name(data, tmp_path, monkeypatch):
    """To several; one that a program has registered is known too."""
    seen: list = []

    class Own(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "own", False, None

        def __init__(self, run_name, **kwargs):
            super().__init__()

        def store_init_configuration(self, values):
            seen.append(values["model"])

        def log(self, values, step=None, **kwargs):
            seen.append((step, sorted(values)[0]))

        def finish(self):
            seen.append("end")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "own", Own)
    command = arguments(data, tmp_path / "run", "epochs=3")
    assert main([*command, "--trackers", "own", "tensorboard"]) == 0
    assert seen == [
        "etmamba_ti",
        (10, "train/clips_per_second"),
        (15, "train/clips_per_second"),
        (15, "val/epoch"),
        "end",
    ]
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))


def test_more_epochs_for_a_finished_run(data, tmp_path):
    """It goes on from its last state, at the rate of the new schedule, and kill -9 changes nothing."""
    more = ("ema=0.9", "balance=1", "drop_path=0.3", "eval_epochs=1")
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(data, one, *more, "epochs=2") == 0
    shutil.copytree(one, two)
    before = load_file(one / "last.safetensors")
    assert run(data, one, *more, "epochs=5") == 0
    assert [row["update"] for row in rows(one)] == ["10", "20", "25"]
    assert float(rows(one)[0]["lr"]) < float(rows(one)[1]["lr"])  # the cosine is over five epochs now
    assert any(not torch.equal(before[name], value) for name, value in load_file(one / "last.safetensors").items())
    assert '"epochs": 5' in (one / "model" / "config.json").read_text()

    command = [sys.executable, "-m", "etmamba_timm", *arguments(data, two, *more, "epochs=5", save_updates=3)]
    for update in (12, 18):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(two.glob(f"*state-{update}")):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert (two / "model").exists()  # the earlier one
    assert run(data, two, *more, "epochs=5", save_updates=3) == 0
    assert rows(two) == rows(one)
    for name in ("last.safetensors", "best.safetensors", "scores.safetensors", "val.csv", "model/config.json"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    assert not [path for path in two.iterdir() if path.name.startswith(".")]


class Reads(TorchDispatchMode):
    """Counts the values that are read from tensors, each of which waits for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2")
        self.count += func.overloadpacket.__name__ in names
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("opt", "expected"), [("adamw", 0), ("sgd", 1)])
def test_what_an_update_reads(data, tmp_path, monkeypatch, opt, expected):
    """Nothing; with an optimiser that can't skip on the device, whether the gradient is finite."""
    counts = []
    update = training._Training.update

    def counted(self, batches):
        batch = [next(batches) for _ in range(self.recipe.accumulate)]  # decoding reads tensors, on the host alone
        with Reads() as reads:
            update(self, iter(batch))
        counts.append(reads.count)

    monkeypatch.setattr(training._Training, "update", counted)
    settings = (f"opt={opt}", "ema=0.9", "accumulate=2", "mixup=0.8", "drop_path=0.1", "epochs=2", "eval_epochs=2")
    assert run(data, tmp_path / "run", *settings) == 0
    assert counts == [expected] * 10


def poison(monkeypatch, updates: range, seen: list | None = None) -> None:
    """Makes the clips of some updates NaN; `seen` gets the weights and averages after each update."""
    take, update = training._Training.take, training._Training.update

    def taken(self, batch, part):
        clips, target = take(self, batch, part)
        return (clips * torch.nan if self.progress.update + 1 in updates else clips), target

    def updated(self, batches):
        update(self, batches)
        if seen is not None:
            states = (self.model, self.ema.module)
            seen.append([p.clone() for state in states for p in state.state_dict().values()])

    monkeypatch.setattr(training._Training, "take", taken)
    monkeypatch.setattr(training._Training, "update", updated)


class Stop(Exception):
    """Stops a run."""


def stop_at(monkeypatch, update: int, data: Path, folder: Path, *settings: str) -> None:
    """Runs until the state after `update` is saved, or goes on to there."""
    save = training._Training.save

    def saved(self):
        save(self)
        if self.progress.update == update:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(training._Training, "save", saved)
        with pytest.raises(Stop):
            run(data, folder, *settings, save_updates=4)


def test_a_run_with_skipped_updates(data, tmp_path, monkeypatch, caplog):
    seen: list = []
    poison(monkeypatch, range(12, 15), seen)
    assert run(data, tmp_path / "run", "ema=0.9") == 0
    assert [row["skipped"] for row in rows(tmp_path / "run")] == ["0", "3", "3"]
    assert all(0 < float(row["loss"]) < 3 and float(row["grad_norm"]) > 0 for row in rows(tmp_path / "run"))
    assert "3 of the 10 updates before update 21 were skipped: their gradients weren't finite" in caplog.text
    same = [all(map(torch.equal, before, after)) for before, after in itertools.pairwise(seen)]
    assert [i + 2 for i, is_same in enumerate(same) if is_same] == [12, 13, 14]

    for update in (8, 12):
        stop_at(monkeypatch, update, data, tmp_path / "again", "ema=0.9")
    assert run(data, tmp_path / "again", "ema=0.9", save_updates=4) == 0
    assert rows(tmp_path / "again") == rows(tmp_path / "run")
    last = [load_file(tmp_path / name / "last.safetensors") for name in ("run", "again")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


@pytest.mark.parametrize("updates", [range(2, 22), range(3, 40)])
def test_twenty_skipped_in_a_row_stop_it_at_the_next_row(data, tmp_path, monkeypatch, capsys, updates):
    """Also if later ones were finite again."""
    poison(monkeypatch, updates)
    assert run(data, tmp_path / "run") == 2
    assert "the gradients of 20 updates in a row weren't finite; lower lr" in capsys.readouterr().err
    assert [row["update"] for row in rows(tmp_path / "run")] == ["10", "20"]


def test_nineteen_in_a_row_do_not(data, tmp_path, monkeypatch):
    poison(monkeypatch, range(2, 21))
    assert run(data, tmp_path / "run") == 0
    assert [row["skipped"] for row in rows(tmp_path / "run")] == ["9", "19", "19"]


def test_a_compiled_run_has_the_same_names_and_resumes(data, tmp_path, monkeypatch):
    """Compiled by TorchDynamo alone; what becomes of its graphs is tested with the models."""
    counter = CompileCounter()
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_in_place(self, backend=counter, **kw))
    settings = ("epochs=2", "ema=0.9", "accumulate=2", "grad_checkpointing=2", "precision=bf16", "eval_epochs=1")
    assert run(data, tmp_path / "plain", *settings) == 0
    assert counter.frame_count == 0
    settings = (*settings, "compile=true")
    assert run(data, tmp_path / "whole", *settings) == 0
    assert counter.frame_count == 2  # one graph in training, one in evaluation
    stop_at(monkeypatch, 8, data, tmp_path / "again", *settings)
    assert run(data, tmp_path / "again", *settings, save_updates=4) == 0
    plain, whole, again = (load_file(tmp_path / name / "last.safetensors") for name in ("plain", "whole", "again"))
    torch.testing.assert_close(whole, plain, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
