"""What a model with `motion=True` sees, and that it doesn't see colours."""

import json
import shutil

import pytest
import timm
import torch

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.checkpoints import CheckpointError
from etmamba_timm.checkpoints.save import save_checkpoint
from etmamba_timm.export import export_model
from etmamba_timm.layers import Motion
from etmamba_timm.layers.motion import SCALE

SMALL = {"img_size": 32, "num_frames": 3, "embed_dim": 16, "depth": 1, "num_classes": 4}


def test_channels_are_luminance_and_its_changes_to_either_side():
    clip = torch.randn(2, 3, 4, 5, 6)
    grey, after, before = Motion()(clip).unbind(1)
    wanted = clip.mean(1)
    torch.testing.assert_close(grey, SCALE[0] * wanted)
    torch.testing.assert_close(after[:, :-1], SCALE[1] * wanted.diff(dim=1))
    torch.testing.assert_close(before[:, 1:], SCALE[2] * wanted.diff(dim=1))
    assert not after[:, -1].any()
    assert not before[:, 0].any()


def test_a_still_has_no_motion():
    channels = Motion()(torch.randn(1, 3, 1, 4, 4).expand(-1, -1, 5, -1, -1))
    assert channels[:, 0].any()
    assert not channels[:, 1:].any()


def test_the_model_sees_no_colours():
    torch.manual_seed(0)
    model = timm.create_model("etmamba_ti", motion=True, **SMALL).eval()
    clip = torch.randn(1, 3, 3, 32, 32)
    logits = model(clip)
    torch.testing.assert_close(model(clip.roll(1, 1)), logits)  # the mean of the channels is the same
    assert model(clip[:, :, 0]).shape == (1, 4)  # an image is a clip of one frame


def test_it_is_saved_with_the_model(tmp_path, caplog):
    """Also with the weights alone, without a config.json beside them."""
    model = timm.create_model("etmamba_ti", motion=True, **SMALL).eval()
    save_checkpoint(model, tmp_path / "saved")
    weights = shutil.copy(tmp_path / "saved" / "model.safetensors", tmp_path / "best.safetensors")
    clip = torch.randn(1, 3, 3, 32, 32)
    for name, kwargs in (
        (f"local-dir:{tmp_path / 'saved'}", {}),
        ("etmamba_ti", {"pretrained_cfg_overlay": {"file": str(weights)}}),
    ):
        loaded = timm.create_model(name, pretrained=True, **kwargs).eval()
        assert isinstance(loaded.motion, Motion)
        assert torch.equal(loaded(clip), model(clip))
    assert "has to be trained" not in caplog.text


@pytest.mark.parametrize(
    ("has", "wants", "words"), [(False, True, ("colours", "motion")), (True, False, ("motion", "colours"))]
)
def test_weights_of_the_other_kind_can_start_it(has, wants, words, tmp_path, caplog):
    save_checkpoint(timm.create_model("etmamba_ti", motion=has, **SMALL), tmp_path / "saved")
    model = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, motion=wants)
    assert isinstance(model.motion, Motion) == wants
    assert model._model_args["motion"] == wants
    assert "the weights are for {}, the model sees {}: it has to be trained before use".format(*words) in caplog.text


def test_config_json_that_says_something_else_is_refused(tmp_path):
    save_checkpoint(timm.create_model("etmamba_ti", **SMALL), tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    config["model_args"]["motion"] = True
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="model_args.motion is True, but the weights have False"):
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)


def test_it_is_exported(tmp_path):
    model = timm.create_model("etmamba_ti", motion=True, **SMALL).eval()
    export_model(model, tmp_path / "model.pt2")
    clip = torch.randn(2, 3, 3, 32, 32)
    torch.testing.assert_close(
        torch.export.load(tmp_path / "model.pt2").module()(clip), model(clip), rtol=1e-4, atol=1e-5
    )


def test_it_can_be_made_on_meta():
    model = timm.create_model("etmamba_ti", motion=True, device="meta", **SMALL).to_empty(device="cpu")
    model.init_weights()
    assert tuple(model.motion.scale.tolist()) == pytest.approx(SCALE)


@pytest.mark.parametrize("value", [1, "false"])
def test_it_is_true_or_false(value):
    with pytest.raises(ValueError, match=f"motion is {value!r}; it must be True or False"):
        timm.create_model("etmamba_ti", motion=value, **SMALL)


@pytest.mark.parametrize("channels", [1, 4])
def test_it_needs_colours_to_begin_with(channels):
    with pytest.raises(ValueError, match=f"in_chans is {channels}; with motion=True it must be 3, for RGB"):
        timm.create_model("etmamba_ti", motion=True, in_chans=channels, **SMALL)
