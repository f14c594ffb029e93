"""A model into the Hub's layout and back."""

import json
import os

import pytest
import timm
import torch
from safetensors.torch import load_file

from etmamba_timm.checkpoints.save import KEPT_IN_FLOAT32, save_checkpoint
from etmamba_timm.clip import Clip
from etmamba_timm.models import VARIANTS
from etmamba_timm.zoo import etmamba_ti

SMALL = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "depth": 2, "num_classes": 5}


@pytest.fixture
def model():
    return timm.create_model("etmamba_ti", **SMALL).eval()


def loaded(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@pytest.mark.parametrize("name", [name for name in VARIANTS if "_ti" in name])
def test_float32_comes_back_bit_by_bit(name, tmp_path):
    model = timm.create_model(name, **SMALL).eval()
    save_checkpoint(model, tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    x = torch.randn(1, 3, 2, 32, 32)
    assert torch.equal(again(x), model(x))


@pytest.mark.skipif(os.name != "posix", reason="there are no such modes")
def test_files_are_readable_as_the_umask_has_it(model, tmp_path):
    before = os.umask(0o027)
    try:
        save_checkpoint(model, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", ["etmamba_ti", "etmamba_ti_ebs"])
def test_the_folded_form_goes_round(name, folded, tmp_path):
    model = timm.create_model(name, **SMALL, folded=folded).eval()
    save_checkpoint(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"].get("folded", False) == folded
    again = loaded(tmp_path / "out", num_classes=3)
    assert again.folded == folded
    assert again(torch.randn(1, 3, 2, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_halves_the_file(model, tmp_path, dtype, tolerance):
    save_checkpoint(model, tmp_path / "whole")
    save_checkpoint(model, tmp_path / "half", dtype=dtype)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    for key, value in model.state_dict().items():
        kept = key.endswith(KEPT_IN_FLOAT32)
        assert stored[key].dtype == (torch.float32 if kept else dtype)
        torch.testing.assert_close(stored[key].float(), value, rtol=0 if kept else tolerance, atol=0 if kept else 1e-7)
    again = loaded(tmp_path / "half")
    assert {v.dtype for v in again.state_dict().values()} == {torch.float32}
    halved = sum(v.numel() * v.element_size() for v in stored.values())
    assert halved < 0.6 * sum(v.numel() * v.element_size() for v in model.state_dict().values())


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_chans": 4},
        {"in_chans": 1},
        {"global_pool": "avg", "d_conv": 3, "d_state": 8, "expand": 4},
        {"img_size": (32, 64), "patch_size": 8},
        {"num_classes": 0},
        {"global_pool": "map"},
        {"stem": "none", "block": "bimamba"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "create", [lambda **k: timm.create_model("etmamba_ti", **k), etmamba_ti], ids=["timm", "direct"]
)
def test_constructor_arguments_are_saved_whoever_built_it(arguments, create, tmp_path):
    model = create(**(SMALL | arguments)).eval()
    save_checkpoint(model, tmp_path / "out")
    again = loaded(tmp_path / "out")
    x = torch.randn(1, model.in_chans, 2, *model.img_size)
    assert torch.equal(again(x), model(x))
    assert (again.img_size, again.num_classes, again.global_pool) == (
        model.img_size,
        model.num_classes,
        model.global_pool,
    )


@pytest.mark.parametrize("pools", [("token", "map"), ("map", "avg")])
def test_another_pooling_is_saved(pools, tmp_path):
    model = timm.create_model("etmamba_ti", **SMALL, global_pool=pools[0]).eval()
    model.reset_classifier(4, pools[1])
    save_checkpoint(model, tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert again.global_pool == pools[1]
    x = torch.randn(1, 3, 2, *model.img_size)
    assert torch.equal(again(x), model(x))


def test_labels_and_clips_come_back_and_go_round_again(model, tmp_path):
    names = ["run", "jump", "roll", "kick", "Größe"]
    save_checkpoint(model, tmp_path / "one", label_names=names, stride="spread", card={"licence": "MIT"})
    again = loaded(tmp_path / "one")
    assert list(again.pretrained_cfg["label_names"]) == names
    assert again.clip == Clip(2, "spread")
    again.set_input_size(img_size=48, num_frames=3)
    save_checkpoint(again, tmp_path / "two")
    third = loaded(tmp_path / "two")
    assert list(third.pretrained_cfg["label_names"]) == names
    assert third.clip == Clip(3, "spread")
    assert (third.img_size, third.num_frames, third.pretrained_cfg["input_size"]) == ((48, 48), 3, (3, 48, 48))
    other = loaded(tmp_path / "one", num_classes=2)
    assert "label_names" not in other.pretrained_cfg
    config = json.loads((tmp_path / "one" / "config.json").read_text(encoding="utf-8"))
    assert config["card"] == {"licence": "MIT"}
    assert "clip" not in config["pretrained_cfg"]


def test_a_model_resized_after_loading_a_tags_arguments(tmp_path):
    """What a tag adds to the caller's arguments is saved too."""
    model = timm.create_model("videomamba_ti.k400_f8", embed_dim=16, depth=1, img_size=32, num_classes=3).eval()
    save_checkpoint(model, tmp_path / "out")
    assert loaded(tmp_path / "out").num_frames == 8


class TestFailures:
    def test_a_folder_that_is_not_empty(self, model, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("keep")
        with pytest.raises(FileExistsError, match="out exists already; name another folder"):
            save_checkpoint(model, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]

    def test_an_empty_folder_is_fine(self, model, tmp_path):
        (tmp_path / "out").mkdir()
        save_checkpoint(model, tmp_path / "out")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "model.safetensors",
            "config.json",
            "video_preprocessor_config.json",
        }

    def test_nothing_is_half_written(self, model, tmp_path):
        with pytest.raises(TypeError, match="not JSON serializable"):
            save_checkpoint(model, tmp_path / "out", card={"recipe": object()})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("value", "dtype", "message"),
        [
            (1e5, torch.float16, "head.weight is too large for torch.float16; store it in bfloat16 or float32"),
            (float("nan"), None, "head.weight holds NaN or infinity; its training went wrong"),
        ],
    )
    def test_weights_that_can_not_be_stored(self, model, tmp_path, value, dtype, message):
        with torch.no_grad():
            model.head.weight[0, 0] = value
        with pytest.raises(ValueError, match=message):
            save_checkpoint(model, tmp_path / "out", dtype=dtype)
        assert list(tmp_path.iterdir()) == []

    def test_names_for_other_classes(self, model, tmp_path):
        with pytest.raises(ValueError, match="2 label names for 5 classes"):
            save_checkpoint(model, tmp_path / "out", label_names=["a", "b"])
