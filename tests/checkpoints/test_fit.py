"""VideoMamba's weights in our model, and weights made for other clips."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from etmamba_timm.checkpoints import CheckpointError, fit, read_checkpoint, save_checkpoint
from etmamba_timm.checkpoints.fit import adapt_in_chans, adapt_stem
from etmamba_timm.layers import STEMS

GOLDEN = Path(__file__).parents[1] / "golden" / "videomamba_small_f4.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict:
    """Upstream's own weights, input and output: {"config", "weights", "input", "features", "logits"}."""
    tensors = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config.pop("kernel_size") == 1
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    return {"config": config, "weights": weights, **{k: tensors[k] for k in ("input", "features", "logits")}}


def build(golden: dict, **arguments) -> torch.nn.Module:
    return timm.create_model("videomamba_ti", **(golden["config"] | arguments)).eval()


def loaded(golden: dict, weights: dict | None = None, **arguments) -> torch.nn.Module:
    model = build(golden, **arguments)
    model.load_state_dict(fit(read_checkpoint(weights or golden["weights"]), model))
    return model


def test_upstream_outputs_are_reproduced(golden):
    model = loaded(golden)
    with torch.no_grad():
        assert (model.forward_features(golden["input"])[:, 0] - golden["features"]).abs().max() < 2e-6
        assert (model(golden["input"]) - golden["logits"]).abs().max() < 2e-6


def test_every_key_is_accounted_for(golden):
    model = build(golden)
    assert fit(read_checkpoint(golden["weights"]), model).keys() == model.state_dict().keys()


def test_our_own_state_dict_comes_back_as_it_is(golden):
    model = build(golden)
    own = model.state_dict()
    converted = fit(read_checkpoint(own), model)
    assert converted.keys() == own.keys()
    assert all(torch.equal(converted[k], own[k]) for k in own)


def test_image_checkpoint(golden):
    """2-D patch weights, no temporal embedding: an image gives what it gave."""
    weights = {k: v for k, v in golden["weights"].items() if k != "temporal_pos_embedding"}
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].squeeze(2)
    model = loaded(golden, weights)
    assert not model.temporal_pos_embedding.any()
    still = dict(golden["weights"], temporal_pos_embedding=torch.zeros(1, 1, 48))
    expected = loaded(golden, still, num_frames=1)
    image = golden["input"][:, :, 0]
    assert torch.equal(model(image), expected(image))


def test_positions_are_resampled_when_weights_load(golden):
    model = loaded(golden, img_size=(48, 64), num_frames=7)
    original = loaded(golden)
    x = torch.randn(1, 3, 7, 48, 64)
    torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize("in_chans", [1, 2, 6])
def test_other_channels_by_timms_rule(golden, in_chans):
    weight = golden["weights"]["patch_embed.proj.weight"]
    expected = timm.models.adapt_input_conv(in_chans, weight.squeeze(2)).unsqueeze(2)
    torch.testing.assert_close(adapt_in_chans(weight, in_chans), expected)
    assert loaded(golden, in_chans=in_chans)(torch.randn(1, in_chans, 4, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels_keep_all_but_the_stem(in_chans):
    kwargs = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "depth": 1, "num_classes": 5}
    source = timm.create_model("etmamba_ti", **kwargs)
    model = timm.create_model("etmamba_ti", in_chans=in_chans, **kwargs)
    model.load_state_dict(fit(read_checkpoint(source.state_dict()), model))
    assert torch.equal(model.blocks[0].fusion.weight, source.blocks[0].fusion.weight)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_stem_for_repeated_channels_repeats_what_it_gave(times):
    stem = STEMS["stfp"](3)
    adapted = STEMS["stfp"](3 * times)
    adapted.load_state_dict({k: adapt_stem(v, 3 * times) for k, v in stem.state_dict().items()})
    x = torch.randn(2, 3, 3, 8, 8)
    repeated = [1, times, 1, 1, 1]
    torch.testing.assert_close(adapted(x.repeat(repeated)), stem(x).repeat(repeated))


class TestGridsThatAreNoSquare:
    kwargs = {"num_frames": 2, "embed_dim": 16, "depth": 1, "num_classes": 5}  # noqa: RUF012

    def saved(self, img_size, folder):
        torch.manual_seed(1)
        model = timm.create_model("videomamba_ti", img_size=img_size, **self.kwargs).eval()
        args = self.kwargs | {"img_size": img_size}
        timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=args)
        return model

    @pytest.mark.parametrize("img_size", [(32, 64), (32, 128)])
    @pytest.mark.parametrize("target", [(32, 64), (32, 128), (128, 32), (64, 64)])
    def test_a_saved_model_tells_its_grid(self, img_size, target, tmp_path):
        source = self.saved(img_size, tmp_path)
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=target).eval()
        x = torch.randn(1, 3, 2, *target)
        torch.testing.assert_close(model(x), source(x))

    def test_a_bare_state_dict_of_the_same_grid(self, tmp_path):
        source = self.saved((32, 128), tmp_path)
        model = timm.create_model("videomamba_ti", img_size=(32, 128), **self.kwargs).eval()
        model.load_state_dict(fit(read_checkpoint(source.state_dict()), model))
        x = torch.randn(1, 3, 2, 32, 128)
        assert torch.equal(model(x), source(x))

    def test_one_of_a_grid_that_is_not_known_is_refused(self, tmp_path):
        source = self.saved((32, 64), tmp_path)
        model = timm.create_model("videomamba_ti", img_size=64, **self.kwargs)
        with pytest.raises(CheckpointError, match="picture of 8 patches, which is no square, and doesn't state"):
            fit(read_checkpoint(source.state_dict()), model)


def test_a_resized_model_is_saved_and_loaded(tmp_path):
    """Built, resized to other frames and another size, saved in the Hub's layout, loaded: the same."""
    model = timm.create_model("etmamba_ti", img_size=64, num_frames=4, embed_dim=16, depth=1, num_classes=5).eval()
    model.set_input_size(img_size=(32, 96), num_frames=7)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (loaded.img_size, loaded.num_frames) == ((32, 96), 7)
    x = torch.randn(1, 3, 7, 32, 96)
    assert torch.equal(loaded(x), model(x))


def test_through_timms_own_loader(golden, tmp_path):
    """`pretrained_cfg_overlay` with a file in upstream's form, and another number of classes."""
    path = tmp_path / "videomamba.pth"
    torch.save({"model": golden["weights"]}, path)
    model = build(golden, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 7})
    torch.testing.assert_close(model(golden["input"]), golden["logits"], rtol=0, atol=1e-5)
    config = golden["config"] | {"num_classes": 3}
    model = timm.create_model(
        "videomamba_ti", pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 7}, **config
    ).eval()
    assert model(golden["input"]).shape == (2, 3)
    features = model.forward_features(golden["input"])[:, 0]
    torch.testing.assert_close(features, golden["features"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("has", "wants"), [("avg", "map"), ("map", "avg")])
def test_attention_pooling_that_one_side_lacks(has, wants, tmp_path, caplog):
    """The rest loads, and a log line says what of the pooling is new or left out."""
    small = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "depth": 1, "num_classes": 5}
    source = timm.create_model("etmamba_ti", global_pool=has, **small).eval()
    save_checkpoint(source, tmp_path / "saved")
    model = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, global_pool=wants).eval()
    said = {"map": "the attention pooling is fresh", "avg": "attention pooling is left out: global_pool is 'avg'"}
    assert said[wants] in caplog.text
    assert model.global_pool == wants
    x = torch.randn(1, 3, 2, 32, 32)
    assert torch.equal(model.forward_features(x), source.forward_features(x))
    assert torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize(("has", "states"), [("avg", "map"), ("map", "avg")])
def test_a_config_that_states_another_pooling_is_refused(has, states, tmp_path):
    model = timm.create_model("etmamba_ti", global_pool=has, img_size=32, num_frames=2, embed_dim=16, depth=1)
    save_checkpoint(model, tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(path.read_text().replace(f'"global_pool": "{has}"', f'"global_pool": "{states}"'))
    with pytest.raises(CheckpointError, match=f"model_args.global_pool is '{states}', but the weights have"):
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
