"""The `etmamba` command on real files: output, exit status, and bad files among good ones."""

import argparse
import importlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from videos import write_video

from etmamba_timm.checkpoints import save_checkpoint
from etmamba_timm.cli import main, parser
from etmamba_timm.cli.options import in_options
from etmamba_timm.models import VARIANTS
from etmamba_timm.predict import extract_features, load_model, predict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos and a checkpoint: good.mp4, other.webm, text.mp4, weights.safetensors (videomamba_ti)."""
    folder = tmp_path_factory.mktemp("cli")
    write_video(folder / "good.mp4", num_frames=20)
    write_video(folder / "other.webm", num_frames=20, codec="libvpx-vp9")
    (folder / "text.mp4").write_text("no video\n" * 50)
    torch.manual_seed(0)
    model = timm.create_model("videomamba_ti", num_classes=6, num_frames=4, img_size=32)
    save_file(model.state_dict(), folder / "weights.safetensors")
    save_checkpoint(model, folder / "spread", stride="spread")
    return folder


@pytest.fixture
def trained(folder, monkeypatch):
    """Arguments that name the checkpoint; the working folder is the videos'."""
    monkeypatch.chdir(folder)
    return ["--model", "videomamba_ti", "--checkpoint", "weights.safetensors"]


def test_predict_prints_top_classes(trained, capsys):
    assert main(["predict", "good.mp4", *trained, "--topk", "2"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "good.mp4"
    assert len(lines) == 3
    assert all("%  class " in line for line in lines[1:])
    assert err == ""


def test_compiled_models_give_the_same(folder, tmp_path, monkeypatch, capsys):
    """One graph for all files, which TorchDynamo alone compiles here, and the same scores and features."""
    monkeypatch.chdir(folder)
    small = {"img_size": 32, "num_frames": 4, "embed_dim": 16, "depth": 1, "num_classes": 6}
    save_checkpoint(timm.create_model("etmamba_ti", **small), tmp_path / "small")
    counter, compile_function = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kw: compile_function(*args, backend=counter, **kw))
    arguments = ["good.mp4", "other.webm", "--model", f"local-dir:{tmp_path / 'small'}"]
    results = []
    for more in ([], ["--compile"]):
        assert main(["predict", *arguments, "--json", *more]) == 0
        scores = [json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines()]
        assert main(["features", *arguments, "-o", str(tmp_path / "f.safetensors"), *more]) == 0
        results.append((scores, load_file(tmp_path / "f.safetensors")["features"]))
        assert counter.frame_count == bool(more)
    (scores, features), (compiled_scores, compiled_features) = results
    assert [[p["label"] for p in file] for file in scores] == [[p["label"] for p in file] for file in compiled_scores]
    torch.testing.assert_close(compiled_features, features)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("features x.mp4 --model local-dir:none -o x.npy", "x.npy: features are written as .safetensors"),
        ("features x.mp4 --model local-dir:none -o no/x", "no: no such folder"),
        ("teach --model local-dir:none --data none -o x.npy", "x.npy: features are written as .safetensors"),
        ("eval --model local-dir:none --data none --scores no/s", "no: no such folder"),
        ("timeline x.mp4 --model local-dir:none -o x.txt", "x.txt: plots are written as"),
        ("timeline x.mp4 --model local-dir:none --segments x.txt", "x.txt: segments are written as"),
        ("analyze tsne --model local-dir:none --data none -o x.txt", "x.txt: plots are written as"),
        ("analyze erf x.mp4 --model local-dir:none -o x.txt", "x.txt: plots are written as"),
        ("analyze confusion none -o x.txt", "x.txt: plots are written as"),
        ("analyze cost --rows none -o x.txt", "x.txt: plots are written as"),
        ("export local-dir:none -o x.txt", "x.txt: choose a file name that ends in"),
        ("convert none.pth full", "full exists already; name another folder"),
        ("train --data none --dataset folders -o full", "full exists and contains no run"),
    ],
)
def test_the_output_is_checked_before_anything_is_read(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


def test_predict_alone_names_the_sample(capsys):
    """Its file name says what it shows; the documentation shows what is printed."""
    assert main(["predict"]) == 0
    out, err = capsys.readouterr()
    file, *best = out.splitlines()
    assert best[0].split("%  ")[1] == Path(file).stem.removeprefix("sample_")
    assert err == ""
    page = (Path(__file__).parents[2] / "docs" / "install.md").read_text(encoding="utf-8")
    shown = page.partition(f"{Path(file).name}\n")[2].splitlines()[: len(best)]
    for line, wanted in zip(best, shown, strict=True):
        assert float(line.split("%")[0]) == pytest.approx(float(wanted.split("%")[0]), abs=0.1)
    assert shown[0] == best[0]


def test_predict_without_a_model_takes_the_shipped_one_and_says_so(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["predict", "good.mp4", "--topk", "20"]) == 0
    out, err = capsys.readouterr()
    assert {line.split("%  ")[1] for line in out.splitlines()[1:]} >= {"cartwheel", "walk_backwards"}
    assert err.startswith(
        "etmamba: etmamba_ti.mocap only knows 20 actions of rendered characters; for real video, give --model"
    )


def test_predict_json_is_what_python_gives(trained, capsys):
    argv = ["predict", "good.mp4", "other.webm", *trained, "--json", "--num-clips", "2", "--num-crops", "3"]
    assert main([*argv, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = load_model("videomamba_ti", "weights.safetensors")
    for row, file in zip(rows, ("good.mp4", "other.webm"), strict=True):
        scores = predict(model, file, num_clips=2, num_crops=3, dtype=torch.bfloat16)
        assert (row["file"], row["model"]) == (file, "videomamba_ti")
        assert [p["index"] for p in row["predictions"]] == scores.topk(5).indices.tolist()
        assert row["predictions"][0]["score"] == pytest.approx(scores.max().item())


def test_bad_files_do_not_stop_the_others(trained, capsys):
    assert main(["predict", "text.mp4", "nothing.mp4", "good.mp4", *trained, "--json"]) == 1
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [("error" in r, r["file"]) for r in rows] == [(True, "text.mp4"), (True, "nothing.mp4"), (False, "good.mp4")]
    assert "text.mp4: is a text file" in err
    assert "nothing.mp4: no such file" in err
    assert "2 of 3 files failed" in err


def test_features_are_written_whole(trained, folder, capsys):
    output = folder / "features.safetensors"
    assert main(["features", "good.mp4", "text.mp4", "other.webm", *trained, "-o", str(output)]) == 1
    assert "features of 2 of 3 files" in capsys.readouterr().err
    features = load_file(output)["features"]
    model = load_model("videomamba_ti", "weights.safetensors")
    expected = torch.stack([extract_features(model, file) for file in ("good.mp4", "other.webm")])
    torch.testing.assert_close(features, expected)
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["files"]) == ["good.mp4", "other.webm"]
    assert metadata["model"] == "videomamba_ti"
    assert not list(folder.glob(".etmamba-*"))


def test_features_do_not_overwrite_an_input(trained, folder, capsys):
    before = (folder / "weights.safetensors").read_bytes()
    assert main(["features", "good.mp4", *trained, "-o", "weights.safetensors"]) == 2
    assert "is also an input; give another file" in capsys.readouterr().err
    assert (folder / "weights.safetensors").read_bytes() == before


def test_features_are_kept_when_interrupted(trained, folder, monkeypatch, capsys):
    import etmamba_timm.data.dataset

    class Interrupted(etmamba_timm.data.VideoReader):
        def __init__(self, path, warn):
            if path.name == "other.webm":
                raise KeyboardInterrupt
            super().__init__(path, warn)

    monkeypatch.setattr(etmamba_timm.data.dataset, "open_video", Interrupted)
    assert (
        main(["features", "good.mp4", "other.webm", "good.mp4", *trained, "-o", "kept.safetensors", "--workers", "0"])
        == 130
    )
    assert load_file(folder / "kept.safetensors")["features"].shape == (1, 192)
    assert "features of 1 of 3 files" in capsys.readouterr().err


def test_a_pipe_without_a_writer_does_not_hang(trained, folder, capsys):
    os.mkfifo(folder / "pipe.mp4")
    assert main(["predict", "pipe.mp4", "good.mp4", *trained]) == 1
    assert "is a pipe or a device, not a file" in capsys.readouterr().err


def test_an_endless_picture_does_not_take_the_memory(trained, folder, capsys):
    write_video(folder / "wide.mkv", num_frames=2, height=2, width=16384, codec="ffv1")
    assert main(["predict", "wide.mkv", "good.mp4", *trained]) == 1
    assert (
        "wide.mkv: frames are 2×16384 and would become 32×262144 to cover 32×32: too elongated"
        in capsys.readouterr().err
    )


def test_names_that_are_no_text(trained, folder, capsys):
    name = os.fsdecode(b"bad\xff.mp4")
    shutil.copy(folder / "good.mp4", folder / name)
    assert main(["predict", name, "good.mp4", *trained]) == 0


def test_standard_output_that_is_full(trained):
    command = [sys.executable, "-m", "etmamba_timm", "info", "etmamba_ti"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("etmamba: ")
    assert "Exception ignored" not in done.stderr


def test_features_of_nothing_write_nothing(trained, folder):
    assert main(["features", "text.mp4", *trained, "-o", "none.safetensors"]) == 1
    assert not (folder / "none.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["predict", "good.mp4", "--model", "etmamba_ti_ebs"], "has no trained weights"),
        (["predict", "good.mp4", "--model", "etmamba_ti"], "is a starting point for training"),
        (["predict", "good.mp4", "--model", "videomamba_ti_stfp"], "or pass --allow-untrained"),
        (
            ["timeline", "good.mp4", "--model", "videomamba_ti", "--checkpoint", "spread"],
            "set --clip-seconds to the length of the videos",
        ),
        (["features", "good.mp4", "--model", "etmamba_ti_ebs", "-o", "f.safetensors"], "has no trained weights"),
        (["predict", "good.mp4", "--model", "resnet999"], "unknown model 'resnet999'"),
        (["predict", "good.mp4", "--model", "videomamba_m.k400_f9"], "no tag 'k400_f9'; choose one of "),
        (["predict", "good.mp4", "--checkpoint", "weights.safetensors"], "--checkpoint needs --model"),
        (["predict", "--model", "etmamba_ti"], "no video files are given"),
        (["predict", "good.mp4", "--model", "etmamba_ti", "--device", "cuda:77"], "device 'cuda:77' can't be used"),
        (["predict", "good.mp4", "--model", "etmamba_ti", "--device", "gpu"], "device 'gpu' can't be used"),
        (["predict", "good.mp4", "--model", "etmamba_ti", "--checkpoint", "w.pth"], "w.pth: no such checkpoint"),
        (["features", "good.mp4", "--model", "etmamba_ti", "-o", "f.npz"], "features are written as .safetensors"),
        (["features", "good.mp4", "--model", "etmamba_ti", "-o", "no/f.safetensors"], "no: no such folder"),
        (["predict", "good.mp4", "--model", "etmamba_ti", "--device", "meta"], "device 'meta' can't be used"),
        (["info", "etmamba_x"], "unknown model 'etmamba_x' (did you mean etmamba_s?); choose one of videomamba_ti,"),
        (["info", "videomamba_ti.k"], "videomamba_ti has no tag 'k'; choose one of k400_f8, in1k,"),
        (["info", "etmamba_ti_ebs.k"], "etmamba_ti_ebs has no tag 'k'; it has none"),
        (["info", "local-dir:nowhere"], "there is no folder nowhere; name one that `etmamba train` or `convert` made"),
        (["info", "--checkpoint", "weights.safetensors"], "--checkpoint needs a MODEL"),
        (["info", "etmamba_ti", "--checkpoint", "weights.safetensors"], "looks like videomamba_ti"),
        (["info", "etmamba_ti", "--img-size", "100"], "must be a multiple of 16"),
    ],
)
def test_what_cannot_be_done_says_why_and_exits_2(argv, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("etmamba: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "argv",
    [
        ["features", "good.mp4", "-o", "f.safetensors"],
        ["features", "--model", "etmamba_ti", "-o", "f.safetensors"],
        ["predict", "good.mp4", "--model", "m", "--topk", "0"],
        ["predict", "good.mp4", "--model", "m", "--num-crops", "2"],
        ["predict", "good.mp4", "--model", "m", "--dtype", "int8"],
        ["timeline", "good.mp4", "--model", "m", "--smooth", "4"],
        ["nonsense"],
        ["analyze"],
    ],
)
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: etmamba" in capsys.readouterr().err


def test_a_command_alone_shows_the_help(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "classify the action in video files" in err


def test_untrained_when_allowed(folder, monkeypatch, capsys, caplog):
    monkeypatch.chdir(folder)
    assert main(["predict", "good.mp4", "--model", "videomamba_ti_stfp", "--allow-untrained", "--topk", "1"]) == 0
    assert "its results are random" in caplog.text


def test_info_of_all_counts_parameters(capsys):
    assert main(["info", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == list(VARIANTS)
    for row in rows:
        model = timm.create_model(row["model"], device="meta")
        assert row["params"] == sum(p.numel() for p in model.parameters())
        assert row["total_macs"] == row["macs"] + row["scan_macs"]
        assert row["videomamba_macs"] < row["macs"]
    assert main(["info"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(VARIANTS) + 1


def test_info_of_one(capsys):
    assert main(["info", "etmamba_m", "--num-frames", "8", "--img-size", "160"]) == 0
    out = capsys.readouterr().out
    assert "3×8×160×160" in out
    assert "91.33 M" in out


@pytest.mark.parametrize("arguments", [["local-dir:spread"], ["videomamba_ti", "--checkpoint", "weights.safetensors"]])
def test_info_of_weights(arguments, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["info", *arguments, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["classes"], row["clip"]) == (6, [3, 4, 32, 32])
    assert main(["info", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "3×4×32×32" in shown
    assert ("spread" in shown) == (arguments == ["local-dir:spread"])


def test_info_on_backends(capsys, monkeypatch):
    assert main(["info", "--backends", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reference"] is None
    assert main(["info", "--backends"]) == 0
    out = capsys.readouterr().out
    assert "reference" in out
    assert "Set ETMAMBA_SCAN to a name to have it tried first" in out
    selective_scan = importlib.import_module("etmamba_timm.ops.scan.selective_scan")  # not the function
    monkeypatch.setattr(selective_scan, "PREFERRED", "gpu")
    monkeypatch.setitem(selective_scan.BACKENDS, "gpu", SimpleNamespace(why_not=lambda: "there is no card"))
    assert main(["info", "--backends"]) == 0
    out = capsys.readouterr().out
    assert "ETMAMBA_SCAN=gpu is tried first" in out
    assert out.endswith("It can't run here: there is no card\n")
    monkeypatch.setattr(selective_scan, "PREFERRED", "cuda")
    assert main(["info", "--backends"]) == 2
    assert "the environment variable ETMAMBA_SCAN is 'cuda'; set it to" in capsys.readouterr().err


def test_as_a_command_into_a_closed_pipe(trained):
    """`etmamba … | head -c 1` ends without a traceback."""
    command = [sys.executable, "-m", "etmamba_timm", "predict", *["good.mp4"] * 3, *trained]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(60)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator")
def test_commands_reuse_the_memory_of_large_tensors():
    faults_of_eight = """
import resource, sys, torch
from etmamba_timm.cli import main
main(sys.argv[1:])
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for _ in range(9):
    torch.ones(2**24)
    counts.append(faults())
print(sorted(b - a for a, b in zip(counts, counts[1:])))
"""
    done = subprocess.run([sys.executable, "-c", faults_of_eight, "info"], capture_output=True, text=True, check=True)
    faults = json.loads(done.stdout.splitlines()[-1])
    pages = 64 * 2**20 // resource.getpagesize()  # of one tensor
    assert faults[4] < pages / 10, faults  # a small tensor may take a part of the memory, and then one more is new


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("set clip_seconds to 10", "set --clip-seconds to 10"),
        ("give clip_seconds=10.", "give --clip-seconds=10."),
        ("set batch_size, or a file: pretrained_cfg_overlay=dict(file=...)", None),
        ("clip_seconds/x.mp4, a.clip_seconds, clip_seconds.mp4 and 'clip_seconds'", None),
    ],
)
def test_messages_name_this_commands_options(message, shown):
    args = parser().parse_args(["timeline", "x.mp4", "--model", "m"])
    del args.batch_size, args.checkpoint  # as of a command without them
    assert in_options(message, args) == (shown or message)
    assert in_options(message, argparse.Namespace(file="x")) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--modle", "x"], "usage: etmamba predict .*arguments: --modle .did you mean --model?."),
        (["analyze", "tsne", "--model=a", "--data=b", "-o=c", "--dta", "x"], "did you mean --data?"),
        (["--nothing"], "usage: etmamba .*unrecognized arguments: --nothing$"),
    ],
)
def test_an_unknown_option_gets_the_usage_of_its_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert re.search(message.replace("?", r"\?"), capsys.readouterr().err.strip(), re.DOTALL)
