"""The zoo as timm sees it: names, sizes, configurations, and arguments that make no model."""

import pytest
import timm
import torch

import etmamba_timm
from etmamba_timm.models import VARIANTS, EtMamba

PARAMETERS = {  # millions, at 400 classes and 16 frames
    "videomamba_ti": 7.04,
    "videomamba_s": 25.57,
    "videomamba_m": 73.88,
    "videomamba_ti_stfp": 7.04,
    "videomamba_s_stfp": 25.57,
    "videomamba_m_stfp": 73.88,
    "etmamba_ti_ebs": 5.98,
    "etmamba_s_ebs": 22.8,
    "etmamba_m_ebs": 67.0,
    "etmamba_ti": 8.08,
    "etmamba_s": 31.0,
    "etmamba_m": 91.3,
}
SMALL = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "depth": 2, "num_classes": 5}


def test_timm_lists_them_all():
    assert set(timm.list_models("etmamba*") + timm.list_models("videomamba*")) == set(PARAMETERS) == set(VARIANTS)
    assert all(timm.is_model(name) for name in PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    model = timm.create_model(name, device="meta")
    assert isinstance(model, EtMamba)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(PARAMETERS[name], rel=0.001 if name.startswith("videomamba") else 0.01)
    assert model.pretrained_cfg["architecture"] == name
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert (model.num_classes, model.num_frames, model.num_features) == (400, 16, model.embed_dim)


@pytest.mark.parametrize("name", ["etmamba_ti_ebs", "etmamba_m_ebs", "videomamba_s_stfp"])
def test_without_weights_pretrained_is_an_error(name):
    assert timm.list_pretrained(name + "*") == []
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem": "stpf"}, r"unknown stem 'stpf'; choose one of 'stfp', 'none'"),
        ({"block": "mamba"}, r"unknown block 'mamba'; choose one of 'stcm', 'ebs', 'bimamba'"),
        ({"global_pool": "max"}, r"unknown global_pool 'max'; choose one of 'token', 'avg', 'map', ''"),
        ({"img_size": 100}, "img_size is 100×100; height and width must be multiples of patch_size 16"),
        ({"img_size": (32, 0)}, "img_size is 32×0"),
        ({"embed_dim": 18}, "embed_dim is 18; the 'stcm' block needs a multiple of 4"),
        ({"embed_dim": 15, "block": "ebs", "expand": 1}, "it must be even"),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"num_frames": 0}, "num_frames is 0; it must be at least 1"),
        ({"in_chans": 0}, "in_chans is 0; it must be at least 1"),
        ({"num_classes": -1}, "num_classes is -1; it must be at least 0"),
        ({"d_conv": -1}, "d_conv is -1; it must be at least 0"),
        ({"depth": 1.5}, "depth is 1.5; it must be a whole number"),
        ({"num_frames": "2"}, "num_frames is '2'; it must be a whole number"),
        ({"img_size": "32"}, "img_size is '32'; it must be a whole number of pixels, or two"),
        ({"img_size": (32, 32, 32)}, "it must be a whole number of pixels, or two"),
        ({"drop_path_rate": 2.0}, "drop_path_rate is 2.0; it must be between 0 and 1"),
        ({"block": ["stcm"]}, r"unknown block \['stcm'\]"),
    ],
)
def test_arguments_that_make_no_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("etmamba_ti", **(SMALL | arguments))


def test_misspelt_argument_is_an_error():
    with pytest.raises(TypeError, match="embed_dims"):
        timm.create_model("etmamba_ti", embed_dims=16)


def test_unknown_name():
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("etmamba_xl")


@pytest.mark.parametrize("d_conv", [0, 3])
@pytest.mark.parametrize("block", ["stcm", "bimamba"])
def test_readings_are_arguments(block, d_conv):
    """Another width of the short convolution, or none, makes a model that works and has other parameters."""
    x = torch.randn(1, 3, 2, 32, 32)
    default = timm.create_model("etmamba_ti", **SMALL, block=block).eval()
    other = timm.create_model("etmamba_ti", **SMALL, block=block, d_conv=d_conv).eval()
    shared = {k: v for k, v in default.state_dict().items() if "conv1d" not in k}
    assert all("conv1d" in k for k in other.load_state_dict(shared, strict=False).missing_keys)
    widths = [m.kernel_size[0] for n, m in other.named_modules() if n.endswith(("conv1d", "conv1d_b")) and m]
    assert widths == [d_conv] * (0 if d_conv == 0 else 2 if block == "stcm" else 4)
    assert not torch.allclose(default(x), other(x))


def test_expand_is_the_width_of_both_directions_in_ebs_and_of_each_in_bimamba():
    for block, width in (("ebs", 24), ("bimamba", 48)):
        model = timm.create_model("etmamba_ti", **(SMALL | {"expand": 3, "block": block}))
        assert model.blocks[0].mixer.D.shape == (width,)


def test_version_is_one_of_pep_440():
    from packaging.version import Version

    assert Version(etmamba_timm.__version__)
