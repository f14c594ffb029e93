"""The same file gives the same answer, or the same error, at every door: one table."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from videos import write_video

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.checkpoints import CheckpointError, DownloadError, read_checkpoint, save_checkpoint
from etmamba_timm.checkpoints.convert import convert_checkpoint
from etmamba_timm.cli import main
from etmamba_timm.predict import UntrainedError, load_model
from etmamba_timm.training.recipe import Recipe
from etmamba_timm.training.train import build_model

REPO = Path(__file__).parents[2]
SMALL = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "depth": 2, "num_classes": 5}
CLASSES = ["a", "b", "c", "d", "e"]


def by_create_model(name: str, path: Path, folder: Path) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)})


def by_hub(name: str, path: Path, folder: Path) -> nn.Module:
    overlay = {"file": str(path)}
    return torch.hub.load(str(REPO), name, source="local", pretrained=True, pretrained_cfg_overlay=overlay)


def by_state_dict(name: str, path: Path, folder: Path) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": read_checkpoint(path)})


def by_load_model(name: str, path: Path, folder: Path) -> nn.Module:
    return load_model(name, path, need_classifier=False)


def by_convert(name: str, path: Path, folder: Path) -> nn.Module:
    report = convert_checkpoint(path, folder / "out")
    assert report.architecture == name
    return load_model(f"local-dir:{folder / 'out'}", need_classifier=False)


def by_train(name: str, path: Path, folder: Path) -> nn.Module:
    return build_model(Recipe(model=name, checkpoint=str(path), num_frames=2, size=32), CLASSES)


def by_the_warm_start_tag(name: str, path: Path, folder: Path) -> nn.Module:
    return by_create_model(f"{name}.videomamba_in1k", path, folder)


DOORS: list[Callable] = [
    *(by_create_model, by_hub, by_state_dict, by_load_model, by_convert, by_train, by_the_warm_start_tag),
]


class Code:
    """Pickled, it's a call that leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def weights_of(name: str = "etmamba_ti", **arguments) -> tuple[nn.Module, dict[str, Tensor]]:
    model = timm.create_model(name, **(SMALL | arguments)).eval()
    return model, dict(model.state_dict())


def truncated(weights: dict, path: Path) -> None:
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:-500])


def lightning(weights: dict) -> dict:
    beside = {"criterion.weight": torch.ones(5), "loss.pos_weight": torch.ones(5), "val_top1.total": torch.zeros(())}
    return {"epoch": 3, "state_dict": {"net." + k: v for k, v in weights.items()} | beside, "optimizer_states": []}


def averaged(weights: dict) -> dict:
    return {"model": {k: v * 2 for k, v in weights.items()}, "ema": weights, "epoch": 1}


def upstream(weights: dict) -> dict:
    names = {"blocks.": "layers.", "norm.": "norm_f."}
    out = {next((new + k.removeprefix(old) for old, new in names.items() if k.startswith(old)), k): k for k in weights}
    return {"model": {theirs: weights[ours] for theirs, ours in out.items()}}


# kind: (arguments of the source model, how it is written, its file's name, the error that every door gives)
TABLE = {
    "fine": ({}, save_file, "w.safetensors", None),
    "folded": ({"folded": True}, save_file, "w.safetensors", None),
    "not finite": ({}, lambda w, p: save_file(w | {"norm.bias": torch.full((16,), torch.nan)}, p), "w.safetensors",
                   "isn't finite: NaN or infinity in 1 weight, the first is norm.bias"),
    "truncated": ({}, truncated, "w.pth", "can't be read as a checkpoint: it is damaged"),
    "code": ({}, lambda w, p: torch.save({"model": w, "hook": Code(p.with_name("run"))}, p), "w.pth",
             "can't be read as a checkpoint: .*weights_only=True blocked"),
    "another width": ({"embed_dim": 24}, save_file, "w.safetensors", None),
    "no short convolution": ({"d_conv": 0}, save_file, "w.safetensors", None),
    "other classes": ({"num_classes": 7}, save_file, "w.safetensors", None),
    "attention pooling": ({"global_pool": "map"}, save_file, "w.safetensors", None),
    "half a pooling": ({"global_pool": "map"},
                       lambda w, p: save_file({k: v for k, v in w.items() if k != "attn_pool.kv.bias"}, p),
                       "w.safetensors", "the checkpoint lacks attn_pool.kv.bias"),
    "no classes": ({"num_classes": 0}, save_file, "w.safetensors", None),
    "Lightning": ({}, lambda w, p: torch.save(lightning(w), p), "w.ckpt", None),
    "averaged": ({}, lambda w, p: torch.save(averaged(w), p), "w.pth", None),
    "VideoMamba": ({"name": "videomamba_ti"}, lambda w, p: torch.save(upstream(w), p), "w.pth", None),
    "a weight too few": ({}, lambda w, p: save_file({k: v for k, v in w.items() if k != "norm.bias"}, p),
                         "w.safetensors", "the checkpoint lacks norm.bias"),
    "something else": ({}, lambda w, p: save_file({"weight": torch.ones(3)}, p), "w.safetensors",
                       "no tensor's name ends in 'patch_embed.proj.weight'"),
}  # fmt: skip


@pytest.fixture(params=TABLE)
def kind(request, tmp_path) -> tuple[str, nn.Module, Path, str | None]:
    """A file of one kind: the model's name, the source model, the file, and the error."""
    arguments, write, filename, error = TABLE[request.param]
    name = arguments.get("name", "etmamba_ti")
    source, weights = weights_of(**arguments)
    write(weights, tmp_path / filename)
    return name, source, tmp_path / filename, error


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door(kind, door, tmp_path):
    name, source, path, error = kind
    if door is by_the_warm_start_tag and name == "videomamba_ti":  # it starts another model
        model = by_the_warm_start_tag("etmamba_ti", path, tmp_path)
        assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)
        return
    if error is None:
        model = door(name, path, tmp_path).eval()
        x = torch.randn(1, 3, 2, 32, 32)
        assert torch.equal(model.forward_features(x), source.forward_features(x))
        assert model.num_classes == (5 if door is by_train else source.num_classes)
        if model.num_classes == source.num_classes:
            assert torch.equal(model(x), source(x))
        return
    with pytest.raises(CheckpointError, match=error) as raised:
        door(name, path, tmp_path)
    with pytest.raises(CheckpointError) as read:
        read_checkpoint(path)
    assert str(raised.value) == str(read.value)  # word by word
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]  # nothing was run, and nothing half-written


def test_the_command_line_says_the_same(kind, tmp_path, capsys):
    name, source, path, error = kind
    video = write_video(tmp_path / "clip.mp4", num_frames=4)
    output = tmp_path / "f.safetensors"
    status = main(["features", str(video), "--model", name, "--checkpoint", str(path), "-o", str(output)])
    if error is None:
        assert status == 0
        assert load_file(output)["features"].shape == (1, source.embed_dim)
        return
    assert status == 2
    with pytest.raises(CheckpointError, match=error) as read:
        read_checkpoint(path)
    assert capsys.readouterr().err == f"etmamba: {read.value}\n"


def test_a_config_beside_the_weights_is_heeded_at_every_door(tmp_path):
    """Pooling, class names and clips are in config.json: a folder and the file in it are one checkpoint."""
    source = timm.create_model("etmamba_ti", **SMALL, global_pool="avg").eval()
    save_checkpoint(source, tmp_path / "m", label_names=CLASSES, stride="spread")
    x = torch.randn(1, 3, 2, 32, 32)
    for model in (
        load_model(f"local-dir:{tmp_path / 'm'}"),
        load_model("etmamba_ti", tmp_path / "m"),
        load_model("etmamba_ti", tmp_path / "m" / "model.safetensors"),
        by_convert("etmamba_ti", tmp_path / "m" / "model.safetensors", tmp_path),
    ):
        assert torch.equal(model(x), source(x))
        assert list(model.pretrained_cfg["label_names"]) == CLASSES
        assert model.clip.is_spread


def test_training_reads_the_file_once(tmp_path, monkeypatch):
    _, weights = weights_of()
    torch.save(weights, tmp_path / "w.pth")
    calls = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: calls.append(args) or load(*args, **kwargs))
    by_train("etmamba_ti", tmp_path / "w.pth", tmp_path)
    assert len(calls) == 1


def test_loading_changes_nothing_behind_the_callers_back(tmp_path):
    """Neither timm's configurations nor what the caller gave; and nobody keeps the weights alive."""
    _, weights = weights_of(num_classes=7)
    save_file(weights, tmp_path / "w.safetensors")
    before = copy.deepcopy(timm.models.get_pretrained_cfg("etmamba_ti", allow_unregistered=False))
    checkpoint = read_checkpoint(tmp_path / "w.safetensors")
    overlay = {"state_dict": checkpoint}
    tensors = {key: value.clone() for key, value in checkpoint.tensors.items()}
    model = timm.create_model("etmamba_ti", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, img_size=48)
    assert timm.models.get_pretrained_cfg("etmamba_ti") == before
    assert overlay == {"state_dict": checkpoint}
    assert all(torch.equal(value, tensors[key]) for key, value in checkpoint.tensors.items())
    assert "state_dict" not in model.pretrained_cfg
    assert timm.create_model("etmamba_ti").num_classes == 400


class TestAFileInPlaceOfAnother:
    """The caller's file takes the place of a folder's, a repository's and a tag's: of its weights and its facts."""

    def saved(self, folder: Path, **arguments) -> nn.Module:
        model = timm.create_model("etmamba_ti", **(SMALL | arguments)).eval()
        save_checkpoint(model, folder)
        return model

    def test_of_a_folder(self, tmp_path):
        self.saved(tmp_path / "one")
        other = self.saved(tmp_path / "two", global_pool="avg", img_size=64, num_frames=3, embed_dim=24, num_classes=7)
        overlay = {"file": str(tmp_path / "two")}
        model = timm.create_model(f"local-dir:{tmp_path / 'one'}", pretrained=True, pretrained_cfg_overlay=overlay)
        x = torch.randn(1, 3, 3, 64, 64)
        assert torch.equal(model.eval()(x), other(x))
        assert torch.equal(load_model(f"local-dir:{tmp_path / 'one'}", tmp_path / "two")(x), other(x))
        save_checkpoint(model, tmp_path / "three")
        assert torch.equal(load_model("etmamba_ti", tmp_path / "three")(x), other(x))

    @pytest.mark.parametrize("overlay", [{"file": "/nowhere/w.pth"}, {"state_dict": {}}, {"file": ""}])
    def test_that_is_none(self, tmp_path, overlay):
        self.saved(tmp_path / "one")
        for name in (f"local-dir:{tmp_path / 'one'}", "etmamba_ti.mocap", "etmamba_ti"):
            with pytest.raises((CheckpointError, FileNotFoundError)):
                timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)

    def test_by_an_address_that_does_not_answer(self):
        overlay = {"url": "http://127.0.0.1:9/w.pth"}
        with pytest.raises(DownloadError, match="http://127.0.0.1:9/w.pth can't be fetched"):
            timm.create_model("etmamba_ti.mocap", pretrained=True, pretrained_cfg_overlay=overlay)

    def test_class_names_of_the_caller(self, tmp_path):
        self.saved(tmp_path / "one")
        overlay = {"file": str(tmp_path / "one"), "label_names": CLASSES}
        model = timm.create_model("etmamba_ti", pretrained=True, pretrained_cfg_overlay=overlay)
        assert list(model.pretrained_cfg["label_names"]) == CLASSES
        timm.models.save_for_hf(model, tmp_path / "hf", safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True)
        assert list(again.pretrained_cfg["label_names"]) == CLASSES


def test_a_started_model_is_no_classifier(tmp_path):
    """A VideoMamba by a warm start's tag: its classes would mean nothing."""
    _, weights = weights_of("videomamba_ti")
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UntrainedError, match="'etmamba_ti.videomamba_in1k' is a starting point"):
        load_model("etmamba_ti.videomamba_in1k", tmp_path / "w.safetensors")
    assert load_model("etmamba_ti.videomamba_in1k", tmp_path / "w.safetensors", allow_untrained=True).training is False


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.to(torch.int8),
        lambda v: v.to(torch.complex64),
        lambda v: v.to(torch.float8_e4m3fn),
        lambda v: v.to("meta"),
        lambda v: v.to_sparse(),
    ],
)
def test_weights_that_cannot_be_computed_with(change):
    _, weights = weights_of()
    weights["blocks.0.fusion.weight"] = change(weights["blocks.0.fusion.weight"])
    with pytest.raises(CheckpointError, match="1 weight can't be used, the first is blocks.0.fusion.weight"):
        read_checkpoint(weights)


def test_saving_again_changes_nothing(tmp_path):
    model = timm.create_model("etmamba_ti", **SMALL, d_state=8).eval()
    save_checkpoint(model, tmp_path / "one", label_names=CLASSES, stride=3)
    save_checkpoint(load_model(f"local-dir:{tmp_path / 'one'}"), tmp_path / "two")
    save_checkpoint(load_model("etmamba_ti", tmp_path / "two"), tmp_path / "three")
    one, two, three = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two", "three"))
    assert one["model_args"] == two["model_args"] == three["model_args"]
    assert one["clip"] == three["clip"]
    assert one["label_names"] == three["label_names"]
    model = load_model(f"local-dir:{tmp_path / 'one'}")
    model.reset_classifier(3)
    save_checkpoint(model, tmp_path / "four")
    assert "label_names" not in json.loads((tmp_path / "four" / "config.json").read_text())
