"""`etmamba predict` and `features` over many files: batches, workers, interruptions, and several processes."""

import glob
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from videos import write_video

from etmamba_timm import features
from etmamba_timm.cli import main
from etmamba_timm.features import read_features
from etmamba_timm.predict import extract_features, load_model
from etmamba_timm.words import number_of

MODEL = ["--model", "videomamba_ti", "--checkpoint", "w.safetensors"]
FILES = [f"{i}.mp4" for i in range(7)]
ETMAMBA = [sys.executable, "-m", "etmamba_timm"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "etmamba_timm",
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Seven videos, the third a text, and a small model's weights."""
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(FILES):
        write_video(folder / name, 20, first_number=100 * i)
    (folder / FILES[2]).write_text("no video\n")
    torch.manual_seed(0)
    model = timm.create_model("videomamba_ti", num_classes=6, num_frames=4, img_size=32)
    save_file(model.state_dict(), folder / "w.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _here(videos, monkeypatch) -> None:
    monkeypatch.chdir(videos)


@pytest.fixture(scope="module")
def expected(videos) -> torch.Tensor:
    """Features of the six good files, one by one."""
    model = load_model("videomamba_ti", videos / "w.safetensors")
    return torch.stack([extract_features(model, videos / name, num_crops=3) for name in FILES if name != FILES[2]])


def check(path: Path, expected: torch.Tensor, files: list[str] = FILES[:2] + FILES[3:]) -> None:
    """Tolerance: float32 sums in another order, as matrix products of other sizes have; features are of order 1."""
    rows, names = read_features(path)
    assert names == files
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feeding", [[], ["--workers", "0"], ["--workers", "3", "--batch-size", "4"]])
@pytest.mark.parametrize("output", ["f.safetensors", "folder"])
def test_features_are_those_of_one_by_one(feeding, output, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "SHARD_FILES", 4)
    assert main(["features", *FILES, *MODEL, "--num-crops", "3", *feeding, "-o", str(tmp_path / output)]) == 1
    check(tmp_path / output, expected)
    err = capsys.readouterr().err
    assert f"{FILES[2]}: is a text file, not a video" in err
    assert f"features of 6 of 7 files: {tmp_path / output}\n" in err
    assert not list(tmp_path.rglob("*.partial"))


def test_predictions_do_not_depend_on_workers_and_batches(capsys):
    lines = []
    for feeding in (["--workers", "0", "--batch-size", "1"], ["--workers", "2", "--batch-size", "5"]):
        assert main(["predict", *FILES, *MODEL, "--json", *feeding]) == 1
        lines.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [row["file"] for row in lines[0]] == FILES
    assert "error" in lines[0][2]
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        if "error" not in one:
            scores = [{p["index"]: p["score"] for p in row["predictions"]} for row in (one, other)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("output", ["f.safetensors", "folder"])
def test_features_continue_however_they_were_stopped(how, output, expected, tmp_path, capsys):
    """Four files are done when it is stopped; the sixth can't be read before."""
    code = f"""
import pathlib, signal, time
import etmamba_timm.data.dataset as dataset
from etmamba_timm.data import VideoReader
from etmamba_timm.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they run in the background
class Waiting(VideoReader):
    def __init__(self, path, warn):
        while path.name == {FILES[5]!r} and not pathlib.Path({str(tmp_path / "stopped")!r}).exists():
            time.sleep(0.05)
        super().__init__(path, warn)
dataset.open_video = Waiting
raise SystemExit(main({["features", *FILES, *MODEL, "--num-crops", "3", "-o", str(tmp_path / output)]!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    partials: list[Path] = []
    try:
        while process.poll() is None and not (partials and partials[0].read_bytes().count(b"\n") == 5):
            time.sleep(0.05)  # until settings and four files are there; pathlib's glob fails where a folder vanishes
            partials = [Path(name) for name in glob.glob(f"{tmp_path}/**/*.partial", recursive=True)]
        process.send_signal(how)
        process.wait(60)
    finally:
        (tmp_path / "stopped").touch()  # so that its workers see that it has ended
    err = process.communicate(timeout=60)[1]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "features of 4 of 7 files" in err
        assert "the same command continues" in err
        if output.endswith("safetensors"):
            check(tmp_path / output, expected[:4], FILES[:2] + FILES[3:5])
    else:
        assert process.returncode == -how
    assert main(["features", *FILES, *MODEL, "--num-crops", "3", "-o", str(tmp_path / output)]) == 1
    assert "features of 6 of 7 files" in capsys.readouterr().err
    check(tmp_path / output, expected)
    assert not list(tmp_path.rglob("*.partial"))


def test_features_of_another_model_are_not_mixed(tmp_path, capsys):
    arguments = ["features", *FILES[:2], *MODEL, "-o", str(tmp_path / "folder")]
    assert main(arguments) == 0
    assert main([*arguments, "--num-clips", "2"]) == 2
    assert "holds features of other settings (--num-clips: 1 there, 2 now)" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "features of 2 of 2 files" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 7])
def test_processes_share_the_files(expected, tmp_path, capfd, count):
    """One file leaves the second process without any."""
    command = ["features", *FILES[:count], *MODEL, "--num-crops", "3", "--workers", "1", "-o", str(tmp_path / "f")]
    done = subprocess.run([*TORCHRUN, *command], capture_output=True, text=True, timeout=200)
    assert done.stderr.count(f"features of {min(count, 6)} of {number_of(count, 'file')}:") == 1
    assert done.stderr.count("is a text file, not a video") == (count == 7)
    check(tmp_path / "f", expected[:count], [name for name in FILES[:count] if name != FILES[2]])
    assert not list(tmp_path.rglob("*.partial"))


def test_processes_predict_in_the_files_order():
    done = subprocess.run([*TORCHRUN, "predict", *FILES, *MODEL, "--json"], capture_output=True, text=True, timeout=200)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["file"] for row in rows] == FILES
    assert ["error" in row for row in rows] == [name == FILES[2] for name in FILES]
    assert done.stderr.count("1 of 7 files failed") == 1


def test_what_stops_one_process_stops_all(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "features-00000.safetensors").write_bytes(b"no")
    command = ["features", *FILES, *MODEL, "-o", str(tmp_path / "folder")]
    done = subprocess.run([*TORCHRUN, *command], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "features-00000.safetensors can't be read" in done.stderr
