"""Exported files give the model's results, for any batch, without the package; a file that doesn't isn't written."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm import export
from etmamba_timm.checkpoints import save_checkpoint
from etmamba_timm.checkpoints.manifest import sample_video
from etmamba_timm.cli import main
from etmamba_timm.export import ExportError, export_model
from etmamba_timm.models import EtMamba
from etmamba_timm.predict import load_model, predict
from etmamba_timm.runtime import load_exported

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="the scan's loop is exported by PyTorch 2.7 or newer"
)
EXAMPLE = Path(__file__).parents[1] / "examples" / "onnx_predict.py"


@pytest.fixture(scope="module", autouse=True)
def packages():
    for name in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(name)


def small(name: str = "etmamba_ti", **arguments) -> EtMamba:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "num_classes": 5, "depth": 1}
    model = timm.create_model(name, **sizes, **arguments).eval()
    torch.nn.init.normal_(model.head.weight)  # otherwise all classes are about as likely
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """A folder in the Hub's layout, and the file that the command makes of it."""
    folder = tmp_path_factory.mktemp("exported")
    save_checkpoint(small(), folder / "model", label_names=["jump", "run", "sit", "stand", "walk"], stride=3)
    assert main(["export", f"local-dir:{folder / 'model'}", "-o", str(folder / "small.onnx")]) == 0
    return folder / "model", folder / "small.onnx"


def test_info_shows_what_a_file_says_of_itself(exported, capsys):
    assert main(["info", str(exported[1])]) == 0
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert shown["classes"].strip() == "jump, run, sit, stand, walk"
    assert shown["clip C×T×H×W"].strip() == "3×2×32×32, frames 3 apart"
    assert main(["info", str(exported[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == ["jump", "run", "sit", "stand", "walk"]


def clips(batch: int, frames: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, frames, 32, 32, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize(("batch", "frames"), [(1, 2), (2, 2), (3, 1), (4, 3), (5, 8)])
def test_any_batch_and_number_of_frames(exported, batch, frames):
    expected = load_model(f"local-dir:{exported[0]}")(clips(batch, frames))
    found = load_exported(exported[1])(clips(batch, frames))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("name", "file", "global_pool"),
    [
        ("etmamba_ti", "small.pt2", "token"),
        ("etmamba_ti", "small.xml", "token"),
        ("etmamba_ti", "small.onnx", "map"),
        ("etmamba_ti_ebs", "small.onnx", "token"),
        ("videomamba_ti", "small.onnx", "token"),
    ],
)
def test_formats_and_blocks(tmp_path, name, file, global_pool):
    model = small(name, global_pool=global_pool)
    before = [p.clone() for p in model.parameters()]
    differences = export_model(model, tmp_path / file)
    assert differences.keys() == {"random", "video"}
    assert max(differences.values()) <= 1e-4
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    loaded = load_exported(tmp_path / file)
    for batch, frames in ((1, 2), (2, 3), (5, 1)):
        expected = model(clips(batch, frames))
        found = loaded(clips(batch, frames))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    names = {file} | ({"small.bin"} if file.endswith(".xml") else set())
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    ("dtype", "limit", "calibration"),
    [("float16", 2e-2, []), ("int8", 0.1, []), ("int8", 0.2, [sample_video(), sample_video()])],
)
def test_smaller_weights(tmp_path, exported, dtype, limit, calibration):
    model = small()
    export_model(model, tmp_path / "small.onnx", dtype=dtype, calibration=calibration)
    operators = {node.op_type for node in pytest.importorskip("onnx").load(tmp_path / "small.onnx").graph.node}
    assert ("DynamicQuantizeLinear" in operators) == (dtype == "int8" and not calibration)
    assert ("QuantizeLinear" in operators) == bool(calibration)
    expected = model(clips(3))
    found = load_exported(tmp_path / "small.onnx")(clips(3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=limit * expected.abs().max().item())
    assert not torch.equal(found, load_exported(exported[1])(clips(3)))


def test_frames(tmp_path):
    model = small()
    export_model(model, tmp_path / "frames.onnx", from_frames=True)
    loaded = load_exported(tmp_path / "frames.onnx")
    assert loaded.about["input"] == "frames"
    torch.testing.assert_close(predict(loaded, sample_video()), predict(model, sample_video()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("runtime", [None, "openvino"])
def test_predict_command(exported, capsys, runtime):
    options = ["--num-clips", "2", "--num-crops", "3", "--json"]
    assert main(["predict", str(sample_video()), "--model", f"local-dir:{exported[0]}", *options]) == 0
    expected = json.loads(capsys.readouterr().out)["predictions"]
    more = ["--runtime", runtime] if runtime else []
    assert main(["predict", str(sample_video()), "--model", str(exported[1]), *options, *more]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert [p["label"] for p in found] == [p["label"] for p in expected]
    assert [p["score"] for p in found] == pytest.approx([p["score"] for p in expected], abs=1e-5)


def test_example_without_this_package(exported):
    blocked = f"import sys, runpy; sys.modules['etmamba_timm'] = sys.modules['torch'] = None; sys.argv = sys.argv[1:]; \
runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    command = [sys.executable, "-c", blocked, "onnx_predict", str(exported[1]), str(sample_video())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {label: float(score) / 100 for score, label in re.findall(r"([\d.]+)%  (\w+)", done.stdout)}
    model = load_model(f"local-dir:{exported[0]}")
    expected = dict(zip(["jump", "run", "sit", "stand", "walk"], predict(model, sample_video()).tolist(), strict=True))
    assert found == pytest.approx(expected, abs=0.03)  # another resize


def test_a_file_with_other_results_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setitem(export.BOUNDS, "float16", 1e-9)
    with pytest.raises(ExportError, match=r"isn't written: its results differ from the model's by .* float16"):
        export_model(small(), tmp_path / "small.pt2", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "etmamba_ti.mocap", "-o", "model.tflite"], r"ends in \.onnx, \.xml, \.pt2"),
        (["export", "etmamba_ti.mocap", "-o", "model.xml", "--dtype", "int8"], r"int8 is only for \.onnx"),
        (["export", "etmamba_ti.mocap", "-o", "none/model.onnx"], "none doesn't exist"),
        (["export", "etmamba_ti.mocap", "-o", "model.onnx", "--calibrate", "."], "--calibrate is for --dtype int8"),
        (["export", "etmamba_ti.mocap", "-o", "m.onnx", "--dtype", "int8", "--calibrate", "no"], "no: no videos there"),
        (["export", "etmamba_ti", "-o", "model.onnx"], "starting point"),
        (["predict", "clip.mp4", "--model", "none.onnx"], "none.onnx doesn't exist"),
        (["predict", "clip.mp4", "--model", "damaged.onnx"], "damaged.onnx isn't a file that `etmamba export` wrote"),
        (["predict", "clip.mp4", "--model", "damaged.pt2"], "damaged.pt2 isn't a file that `etmamba export` wrote"),
        (["predict", "clip.mp4", "--model", "damaged.xml"], "damaged.xml isn't a file that `etmamba export` wrote"),
        (["predict", "clip.mp4", "--model", "damaged.pt2", "--runtime", "onnxruntime"], "does not run it; choose"),
        (["predict", "clip.mp4", "--model", "etmamba_ti.mocap", "--runtime", "torch"], "isn't one; omit it"),
        (["predict", "clip.mp4", "--model", "damaged.onnx", "--dtype", "bfloat16"], "omit --checkpoint, --dtype"),
        (["features", "clip.mp4", "--model", "damaged.onnx", "-o", "f.safetensors"], "only gives class scores"),
    ],
)
def test_errors(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for suffix in (".onnx", ".pt2", ".xml"):
        (tmp_path / f"damaged{suffix}").write_bytes(b"damaged")
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)
