"""Files of weights: what is read, what is refused and why."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from etmamba_timm.checkpoints import CheckpointError, read_checkpoint
from etmamba_timm.checkpoints.read import architecture_of, nearest_variant, variant_of

SMALL = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "depth": 2, "num_classes": 5}


@pytest.fixture
def source():
    return timm.create_model("etmamba_ti", **SMALL).eval()


@pytest.fixture
def file(source, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    return path


def create(path, name="etmamba_ti", **kwargs):
    """The public way to load a file that is at hand."""
    overlay = {"file": str(path), **kwargs.pop("overlay", {})}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **(SMALL | kwargs)).eval()


def same_outputs(a, b, *shape):
    x = torch.randn(1, *(shape or (3, 2, 32, 32)))
    return torch.equal(a(x), b(x))


class Code:
    """Pickled, it's a call that leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"model": w, "epoch": 3, "optimizer": {"state": {}}},
        lambda w: {"module": w},
        lambda w: {"model_state": w},
        lambda w: {"state_dict": {"module." + k: v for k, v in w.items()}},
        lambda w: {"model": {"_orig_mod." + k: v for k, v in w.items()}},
        lambda w: {"model": {k: v * 0 for k, v in w.items()}, "model_ema": w},
        lambda w: {"model": w, "model_ema": None},
        lambda w: {"epoch": 3, "model_state_dict": w, "optimizer_state_dict": {"state": {}}},
        lambda w: {"n_averaged": torch.tensor(7)} | {"module." + k: v for k, v in w.items()},
    ],
    ids=["bare", "model", "module", "model_state", "state_dict.module", "compiled", "ema", "no ema", "tutorial", "swa"],
)
def test_wrapped_weights(source, tmp_path, wrap):
    path = tmp_path / "weights.pth"
    torch.save(wrap(source.state_dict()), path)
    read = read_checkpoint(path)
    assert read.tensors.keys() == source.state_dict().keys()
    assert same_outputs(create(path), source)


def test_a_file_of_the_old_format(source, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
    assert same_outputs(create(path), source)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, zipped):
    path = tmp_path / "weights.pth"
    torch.save({"model": Code(tmp_path / "run")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="weights.pth can't be read as a checkpoint.*weights_only=True blocked"):
        create(path)
    assert not (tmp_path / "run").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "run").exists()  # it would have


@pytest.mark.parametrize("name", ["weights.pth", "model.safetensors"])
def test_a_bare_pickle_by_either_name_is_refused_and_not_run(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Code(tmp_path / "run"), protocol=2))
    with pytest.raises(CheckpointError, match=f"{name} can't be read as a checkpoint"):
        create(tmp_path / name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_a_truncated_file(source, tmp_path, form, kept):
    path = tmp_path / f"weights.{form}"
    save_file(source.state_dict(), path) if form == "safetensors" else torch.save(source.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=f"weights.{form} can't be read as a checkpoint: it is damaged"):
        create(path)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {1: torch.zeros(2)}, {"a": 3}, {"model": {"a": None}}, "text"])
def test_other_things_than_weights(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="weights.pth (can't be read as a|is no) checkpoint"):
        create(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights.pth: no such checkpoint"):
        create(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "videomamba_ti",
            {},
            "looks like etmamba_ti .*, not like videomamba_ti .*stem is stfp, not none, block is stcm",
        ),
        ("etmamba_ti_ebs", {}, "looks like etmamba_ti .*, not like etmamba_ti_ebs .*block is stcm, not ebs"),
        ("etmamba_ti", {"embed_dim": 32}, "embed_dim is 16, not 32"),
        ("etmamba_ti", {"depth": 3}, "depth is 2, not 3"),
        ("etmamba_ti", {"d_state": 8}, "d_state is 16, not 8"),
        ("etmamba_ti", {"d_conv": 0}, "d_conv is 4, not 0"),
        ("etmamba_ti", {"expand": 4}, "expand is 2, not 4"),
        ("etmamba_ti", {"patch_size": 8}, "patch_size is 16, not 8"),
    ],
)
def test_a_checkpoint_of_another_variant(file, name, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        create(file, name, **arguments)


def test_weights_of_videomamba_in_etmamba_name_the_tags_that_start_from_them(tmp_path):
    save_file(timm.create_model("videomamba_ti", **SMALL).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"or name a tag that starts from it \(etmamba_m.videomamba_in1k\)"):
        create(tmp_path / "w.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(source, tmp_path, bad):
    weights = source.state_dict()
    weights["blocks.1.mixer.D"][3] = bad
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="isn't finite: NaN or infinity in 1 weight, the first is blocks.1.mix"):
        create(tmp_path / "w.safetensors")


def test_missing_and_superfluous_weights(source, tmp_path):
    weights = source.state_dict()
    del weights["norm.bias"]
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="the checkpoint lacks norm.bias"):
        create(tmp_path / "w.safetensors")
    save_file(source.state_dict() | {"blocks.0.more": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="the checkpoint has more than etmamba_ti .*: blocks.0.more"):
        create(tmp_path / "w.safetensors")


class TestChangesOnLoad:
    """Every weight that still fits is kept; what isn't is logged."""

    def test_classes_that_fit_are_loaded_without_being_told(self, file, source, caplog):
        assert same_outputs(create(file), source)  # though the cfg says 400
        assert "fresh" not in caplog.text

    @pytest.mark.parametrize("num_classes", [3, 7])
    def test_other_classes(self, file, source, caplog, num_classes):
        model = create(file, num_classes=num_classes)
        assert f"the classifier is fresh: the checkpoint has 5 classes, the model {num_classes}" in caplog.text
        x = torch.randn(1, 3, 2, 32, 32)
        assert torch.equal(model.forward_features(x), source.forward_features(x))
        assert model(x).shape == (1, num_classes)

    def test_no_classes(self, file, source, caplog):
        x = torch.randn(1, 3, 2, 32, 32)
        assert torch.equal(create(file, num_classes=0)(x), source.forward_head(source.forward_features(x), True))
        assert "fresh" not in caplog.text

    def test_another_number_than_the_cfg_promises(self, file, caplog):
        assert create(file, num_classes=9, overlay={"num_classes": 9}).pretrained_cfg["num_classes"] == 5
        assert "the classifier is fresh: the checkpoint has 5 classes, the model 9" in caplog.text

    def test_features_only(self, file, source):
        x = torch.randn(1, 3, 2, 32, 32)
        maps = create(file, features_only=True, out_indices=(0, 1))(x)
        expected = source.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))

    @pytest.mark.parametrize(
        "arguments", [{"img_size": (48, 32)}, {"num_frames": 5}, {"img_size": 64, "num_frames": 1}]
    )
    def test_other_clips(self, file, source, arguments):
        """The loaded model gives what the original gives for such a clip, which resamples as it runs."""
        model = create(file, **arguments)
        x = torch.randn(1, 3, model.num_frames, *model.img_size)
        torch.testing.assert_close(model(x), source(x))

    @pytest.mark.parametrize("in_chans", [2, 4, 6])
    def test_other_channels(self, file, source, in_chans, caplog):
        model = create(file, in_chans=in_chans)
        assert "fresh" not in caplog.text
        frames = torch.randn(1, 3, 2, 32, 32)
        if in_chans == 6:  # the same picture twice: the same result
            torch.testing.assert_close(model(frames.repeat(1, 2, 1, 1, 1)), source(frames))
        own = source.state_dict()
        adapted = {k for k, v in model.state_dict().items() if not torch.equal(v, own[k]) or v.shape != own[k].shape}
        assert {k for k in adapted if not k.startswith("stem.")} == {"patch_embed.proj.weight"}

    def test_one_channel(self, file, source):
        model = create(file, in_chans=1)
        weight = source.patch_embed.proj.weight.sum(1, keepdim=True)
        torch.testing.assert_close(model.patch_embed.proj.weight, weight)
        assert torch.equal(model.blocks[1].fusion.weight, source.blocks[1].fusion.weight)

    def test_from_one_channel_the_stem_is_fresh_and_told(self, tmp_path, caplog):
        source = timm.create_model("etmamba_ti", **SMALL, in_chans=1)
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        model = create(tmp_path / "w.safetensors", in_chans=3)
        assert "the stem is fresh: the checkpoint has none, for its 1 channel" in caplog.text
        assert torch.equal(model.blocks[1].fusion.weight, source.blocks[1].fusion.weight)


@pytest.mark.parametrize("name", ["etmamba_ti", "etmamba_s_ebs", "videomamba_m", "videomamba_ti_stfp"])
@pytest.mark.parametrize(
    "more", [{}, {"d_state": 8, "expand": 1, "d_conv": 3, "patch_size": 8, "in_chans": 4}, {"d_conv": 0}]
)
def test_the_architecture_is_read_off_the_weights(name, more):
    state_dict = timm.create_model(name, depth=2, device="meta", **more).state_dict()
    arguments = architecture_of(state_dict)
    assert nearest_variant(arguments) == (name, {"depth": 2})
    assert variant_of(arguments) == f"{name} depth=2"
    rebuilt = timm.create_model(name, device="meta", **arguments).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in state_dict.items()}


def test_weights_of_something_else(tmp_path):
    with pytest.raises(CheckpointError, match="no weights of a model of this package, .*: 1 tensor, such as weight"):
        architecture_of({"weight": torch.zeros(3)})
    save_file({"weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="no tensor's name ends in 'patch_embed.proj.weight'"):
        create(tmp_path / "w.safetensors")
