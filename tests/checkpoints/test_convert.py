"""`etmamba convert`: checkpoints of any origin into folders in the Hub's layout."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from etmamba_timm.checkpoints import CheckpointError
from etmamba_timm.checkpoints.convert import convert_checkpoint
from etmamba_timm.cli import main
from etmamba_timm.clip import Clip

GOLDEN = Path(__file__).parents[1] / "golden" / "videomamba_small_f4.safetensors"
SMALL = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "depth": 2, "num_classes": 5}


@pytest.fixture
def golden() -> dict:
    return load_file(GOLDEN)


@pytest.fixture
def upstream(golden, tmp_path) -> Path:
    """Upstream's weights in upstream's form."""
    path = tmp_path / "videomamba.pth"
    weights = {key: value for key, value in golden.items() if key.startswith("model.")}
    torch.save({"module": weights, "epoch": 3}, path)
    return path


def loaded(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def test_upstreams_checkpoint(upstream, golden, tmp_path):
    report = convert_checkpoint(upstream, tmp_path / "out")
    model = loaded(tmp_path / "out")
    with torch.no_grad():
        assert (model(golden["input"]) - golden["logits"]).abs().max() < 2e-6
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert {key: getattr(model, key) for key in ("embed_dim", "num_classes", "num_frames")} == {
        key: config[key] for key in ("embed_dim", "num_classes", "num_frames")
    }
    assert report.architecture == "videomamba_ti"
    assert (report.fresh, report.resampled, report.unused) == ([], [], ["epoch"])
    assert set(report.loaded) | set(report.converted) == set(model.state_dict())
    assert {"cls_token", "head.weight"} <= set(report.loaded)
    assert {"blocks.0.mixer.A_b_log", "norm.weight"} <= set(report.converted)


def test_every_key_is_accounted_for(upstream, golden, tmp_path):
    """An image checkpoint with something more in it, for other clips: each list has its own."""
    weights = {k.removeprefix("model."): v for k, v in golden.items() if k.startswith("model.")}
    del weights["temporal_pos_embedding"]
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].squeeze(2)
    torch.save({"model": weights, "optimizer": {"state": {}}, "args": None}, upstream)
    report = convert_checkpoint(upstream, tmp_path / "out", img_size=64, num_frames=3)
    assert report.fresh == ["temporal_pos_embedding"]
    assert report.resampled == ["pos_embed"]
    assert sorted(report.unused) == ["args", "optimizer"]
    assert "patch_embed.proj.weight" in report.converted
    kept = report.loaded + report.converted + report.resampled + report.fresh
    model = loaded(tmp_path / "out")
    assert sorted(kept) == sorted(model.state_dict())
    assert (model.img_size, model.num_frames) == ((64, 64), 3)
    assert "fresh         1: temporal_pos_embedding" in report.text()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["etmamba_ti", "etmamba_s_ebs", "videomamba_m_stfp"])
def test_training_checkpoints_of_our_own(name, dtype, tmp_path):
    source = timm.create_model(name, **SMALL).eval()
    torch.save({"epoch": 1, "state_dict": source.state_dict()}, tmp_path / "last.pth.tar")
    report = convert_checkpoint(tmp_path / "last.pth.tar", tmp_path / "out", dtype=dtype, stride=4, licence="MIT")
    assert sorted(report.loaded) == sorted(source.state_dict())
    model = loaded(tmp_path / "out")
    assert (
        model.pretrained_cfg["architecture"].rpartition("_ti")[2] == "" or "_ti" in model.pretrained_cfg["architecture"]
    )
    assert model.clip == Clip(2, 4)
    x = torch.randn(1, 3, 2, 32, 32)
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=0 if dtype is None else 0.05)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("stored in bfloat16" if dtype else "stored in float32") in text
    assert "license: mit" in text


def test_a_tag_gives_labels_licence_and_figures(tmp_path):
    source = timm.create_model("videomamba_ti", num_classes=400, img_size=32, num_frames=2)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    convert_checkpoint(tmp_path / "w.pth", tmp_path / "out", tag="videomamba_ti.k400_f8")
    model = loaded(tmp_path / "out")
    assert model.pretrained_cfg["label_names"][0] == "abseiling"
    assert model.clip == Clip(2, "spread")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| Kinetics-400 | top-1 | 76.9 | 8×3×4 | reported by upstream |" in text
    assert "non-commercial" in text
    assert "license: other" in text
    with pytest.raises(
        CheckpointError, match="is videomamba_ti with 400 classes; videomamba_s.k400_f8 is videomamba_s"
    ):
        convert_checkpoint(tmp_path / "w.pth", tmp_path / "other", tag="videomamba_s.k400_f8")
    for tag in ("videomamba_ti.k401", "videomamba_ti", "etmamba_ti.videomamba_in1k"):
        with pytest.raises(ValueError, match="is no checkpoint of the manifest"):
            convert_checkpoint(tmp_path / "w.pth", tmp_path / "other", tag=tag)


def test_a_picture_that_is_no_square(tmp_path):
    source = timm.create_model("etmamba_ti", **(SMALL | {"img_size": (32, 64)})).eval()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="which is no square, .* --img-size HEIGHT WIDTH"):
        convert_checkpoint(tmp_path / "w.safetensors", tmp_path / "out")
    convert_checkpoint(tmp_path / "w.safetensors", tmp_path / "out", img_size=(32, 64))
    x = torch.randn(1, 3, 2, 32, 64)
    assert torch.equal(loaded(tmp_path / "out")(x), source(x))


class TestCommand:
    def test_it_prints_the_report(self, upstream, tmp_path, capsys):
        (tmp_path / "labels.txt").write_text("\n".join("abcdefg") + "\n")
        options = ["--labels", str(tmp_path / "labels.txt"), "--dtype", "float16", "--img-size", "48"]
        assert main(["convert", str(upstream), str(tmp_path / "out"), *options]) == 0
        out = capsys.readouterr().out
        assert "architecture  videomamba_ti" in out
        assert "resampled     1: pos_embed" in out
        assert "unused        1: epoch" in out
        model = loaded(tmp_path / "out")
        assert list(model.pretrained_cfg["label_names"]) == list("abcdefg")
        assert model.img_size == (48, 48)

    def test_clips_that_are_spread_out_and_labels_from_windows(self, upstream, tmp_path, monkeypatch):
        (tmp_path / "labels.txt").write_bytes("\ufeffa \r\nb\r\nc\r\nd\r\ne\r\nf\r\ng\r\n\r\n".encode())
        (tmp_path / "out").mkdir()
        monkeypatch.chdir(tmp_path / "out")
        assert (
            main(["convert", str(upstream), ".", "--labels", str(tmp_path / "labels.txt"), "--stride", "spread"]) == 0
        )
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["label_names"] == list("abcdefg")
        assert config["clip"]["stride"] == "spread"
        assert (tmp_path / "out" / "README.md").read_text().count("# out") == 1

    @pytest.mark.parametrize("text", [b"", b"a\n\nb\n", b"\xff\xfe"])
    def test_labels_that_cannot_be(self, upstream, tmp_path, capsys, text):
        (tmp_path / "labels.txt").write_bytes(text)
        assert main(["convert", str(upstream), str(tmp_path / "out"), "--labels", str(tmp_path / "labels.txt")]) == 2
        assert f"etmamba: {tmp_path / 'labels.txt'} is" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p: p.unlink(), "no such checkpoint"),
            (lambda p: p.write_bytes(p.read_bytes()[:999]), "can't be read as a checkpoint"),
            (lambda p: torch.save({"model": {"a": torch.zeros(1)}}, p), "no tensor's name ends in"),
            (lambda p: torch.save({"model": Path}, p), "weights_only=True blocked"),
        ],
    )
    def test_a_bad_file_leaves_nothing_behind(self, upstream, tmp_path, capsys, change, message):
        change(upstream)
        assert main(["convert", str(upstream), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_missing_weights(self, upstream, tmp_path, capsys):
        weights = torch.load(upstream)["module"]
        del weights["model.layers.1.mixer.D"]
        torch.save(weights, upstream)
        assert main(["convert", str(upstream), str(tmp_path / "out")]) == 2
        assert "the checkpoint lacks blocks.1.mixer.D" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_is_there(self, upstream, tmp_path, capsys):
        assert main(["convert", str(upstream), str(tmp_path)]) == 2
        assert "exists already; name another folder" in capsys.readouterr().err
