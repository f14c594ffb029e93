"""The package against the loop-by-loop transcription of the formulas, in float64, to 1e-10.

Every parameter gets a random value, so that nothing hides behind its initial 0 or 1. The guards at the end show that
the comparison notices the usual mistakes.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import timm
import torch
import transcription as tr
from torch import nn

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.layers import BiMambaBlock, Ebs, EbsBlock, StcmBlock, Stfp
from etmamba_timm.ops import scan_backends, selective_scan

TOLERANCE = 1e-10  # float64 leaves about 1e-14; never to be widened

BLOCKS = {"bimamba": BiMambaBlock, "ebs": EbsBlock, "stcm": StcmBlock}
MODELS = {
    "videomamba_ti": ("none", "bimamba"),
    "videomamba_ti_stfp": ("stfp", "bimamba"),
    "etmamba_ti_ebs": ("stfp", "ebs"),
    "etmamba_ti": ("stfp", "stcm"),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: more threads would only wait for each other, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def randomise(module: nn.Module, rng: np.random.Generator) -> tr.Params:
    """Puts the module in float64 and evaluation, fills all of its state with random values, and returns these."""
    module.double().eval()
    params = tr.random_params({name: tuple(value.shape) for name, value in module.state_dict().items()}, rng)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()}, strict=True)
    return params


def shapes_of(module: nn.Module) -> tr.Shapes:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def assert_same(package: torch.Tensor, transcribed: np.ndarray) -> None:
    """At most 1e-10 apart, absolutely and relative to the largest value."""
    assert package.dtype == torch.float64
    assert tuple(package.shape) == transcribed.shape
    largest = np.abs(transcribed).max()
    assert np.isfinite(largest)
    assert largest > 0.1, "the output is too small to compare"
    difference = np.abs(package.detach().numpy() - transcribed).max()
    assert difference <= TOLERANCE, f"max difference {difference:.3g}, largest value {largest:.3g}"
    assert difference <= TOLERANCE * largest, f"max difference {difference:.3g}, largest value {largest:.3g}"


# --- the scan -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("backend", scan_backends())
def test_selective_scan(rng, backend, length, reverse):
    u, delta, z = (rng.standard_normal((2, 7, length)) for _ in range(3))
    B, C = (rng.standard_normal((2, 5, length)) for _ in range(2))
    A, D, delta_bias = -rng.uniform(0.2, 4, (7, 5)), rng.standard_normal(7), rng.standard_normal(7)
    positive = rng.uniform(0.01, 1, delta.shape)  # steps that need no softplus
    calls = [
        ((u, delta, A, B, C, D), {"z": z, "delta_bias": delta_bias, "delta_softplus": True}),
        ((u, delta, A, B, C, D), {"delta_softplus": True}),
        ((u, positive, A, B, C), {"z": z}),
        ((u, positive, A, B, C), {"delta_bias": np.abs(delta_bias)}),
    ]
    for inputs, options in calls:
        tensors = [torch.from_numpy(value) for value in inputs]
        named = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in options.items()}
        try:
            out = selective_scan(*tensors, **named, reverse=reverse, backend=backend)
        except RuntimeError as error:  # not for this machine, or not for float64 on the CPU; it says why
            if backend == "reference" or "can't run" not in str(error):
                raise
            pytest.skip(str(error))
        assert_same(out, tr.selective_scan(*inputs, **options, reverse=reverse))


# --- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_stfp(rng, channels):
    stem = Stfp(channels)
    assert shapes_of(stem) == tr.stfp_shapes(channels)
    params = randomise(stem, rng)
    clip = rng.standard_normal((2, channels, 3, 5, 7))
    assert_same(stem(torch.from_numpy(clip)), tr.stfp(params, clip))


def test_stfp_of_one_frame_and_of_one_row(rng):
    stem = Stfp(3)
    params = randomise(stem, rng)
    for size in ((1, 6, 5), (4, 1, 3)):
        clip = rng.standard_normal((2, 3, *size))
        assert_same(stem(torch.from_numpy(clip)), tr.stfp(params, clip))


MIXERS = [
    {},
    {"d_state": 5, "expand": 3, "d_conv": 3},
    {"d_state": 1, "expand": 1, "d_conv": 2},
]


@pytest.mark.parametrize("mixer", MIXERS, ids=["default", "wide", "narrow"])
@pytest.mark.parametrize("count", [1, 2, 3, 37])
def test_ebs(rng, mixer, count):
    module = Ebs(20, depth=1, **mixer)
    assert shapes_of(module) == tr.ebs_shapes(20, **mixer)
    params = randomise(module, rng)
    tokens = rng.standard_normal((2, count, 20))
    assert_same(module(torch.from_numpy(tokens)), tr.ebs(params, tokens))


def test_ebs_without_its_short_convolution(rng):
    """`d_conv=0` is the paper's formula to the letter, which names only the pointwise convolution."""
    module = Ebs(20, depth=1, d_conv=0)
    assert shapes_of(module) == tr.ebs_shapes(20, d_conv=0)
    params = randomise(module, rng)
    tokens = rng.standard_normal((2, 37, 20))
    assert_same(module(torch.from_numpy(tokens)), tr.ebs(params, tokens))


@pytest.mark.parametrize("grid", [(3, 2, 5), (1, 11, 4), (2, 4, 11), (2, 1, 1)])
@pytest.mark.parametrize("block", BLOCKS)
def test_block(rng, block, grid):
    module = BLOCKS[block](20, depth=1, drop_path=0.0)
    assert shapes_of(module) == tr.block_shapes(block, 20)
    params = randomise(module, rng)
    tokens = rng.standard_normal((2, 1 + grid[0] * grid[1] * grid[2], 20))
    out = module(torch.from_numpy(tokens), grid)
    assert_same(out, tr.BLOCKS[block](params, tokens, grid))


@pytest.mark.parametrize("mixer", MIXERS[1:], ids=["wide", "narrow"])
@pytest.mark.parametrize("block", BLOCKS)
def test_block_with_another_mixer(rng, block, mixer):
    module = BLOCKS[block](12, depth=1, drop_path=0.0, **mixer)
    assert shapes_of(module) == tr.block_shapes(block, 12, **mixer)
    params = randomise(module, rng)
    tokens = rng.standard_normal((2, 1 + 2 * 3 * 5, 12))
    assert_same(module(torch.from_numpy(tokens), (2, 3, 5)), tr.BLOCKS[block](params, tokens, (2, 3, 5)))


@pytest.mark.parametrize("block", BLOCKS)
def test_drop_path_is_off_in_evaluation(rng, block):
    module = BLOCKS[block](8, depth=1, drop_path=0.9)
    params = randomise(module, rng)
    tokens = rng.standard_normal((2, 7, 8))
    assert_same(module(torch.from_numpy(tokens), (1, 2, 3)), tr.BLOCKS[block](params, tokens, (1, 2, 3)))


# --- whole models -------------------------------------------------------------------------------


def two_blocks(name: str, num_frames: int, img_size: tuple[int, int] = (9, 15), **kwargs) -> nn.Module:
    return timm.create_model(
        name, img_size=img_size, num_frames=num_frames, patch_size=3, embed_dim=20, depth=2, num_classes=7, **kwargs
    )


def assert_same_model(model: nn.Module, params: tr.Params, clip: np.ndarray, **settings) -> None:
    expected = tr.model(params, clip, depth=2, patch_size=3, **settings)
    x = torch.from_numpy(clip)
    with torch.no_grad():
        features = model.forward_features(x)
        assert_same(features, expected["features"])
        assert_same(model.forward_head(features, pre_logits=True), expected["pooled"])
        assert_same(model(x), expected["logits"])


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("name", MODELS)
def test_model_on_clips(rng, name, global_pool):
    stem, block = MODELS[name]
    model = two_blocks(name, num_frames=3, global_pool=global_pool)
    params = randomise(model, rng)
    clip = rng.standard_normal((2, 3, 3, 9, 15))
    assert_same_model(model, params, clip, stem=stem, block=block, global_pool=global_pool)


@pytest.mark.parametrize("name", MODELS)
def test_model_on_images(rng, name):
    stem, block = MODELS[name]
    model = two_blocks(name, num_frames=1)
    params = randomise(model, rng)
    image = rng.standard_normal((2, 3, 9, 15))
    assert_same_model(model, params, image, stem=stem, block=block)
    assert_same_model(model, params, image[:, :, None], stem=stem, block=block)


@pytest.mark.parametrize("in_chans", [1, 2])
def test_model_on_other_channels(rng, caplog, in_chans):
    """With one channel the stem is the identity, and the model says so."""
    model = two_blocks("etmamba_ti", num_frames=2, in_chans=in_chans)
    assert ("stem" in caplog.text) == (in_chans == 1)
    params = randomise(model, rng)
    clip = rng.standard_normal((2, in_chans, 2, 9, 15))
    assert_same_model(model, params, clip, stem="stfp", block="stcm")


@pytest.mark.parametrize("name", MODELS)
def test_model_has_the_parameters_of_the_formulas_and_no_others(name):
    stem, block = MODELS[name]
    expected = tr.model_shapes(
        stem=stem, block=block, depth=2, dim=20, channels=3, grid=(3, 3, 5), patch_size=3, classes=7
    )
    assert shapes_of(two_blocks(name, num_frames=3)) == expected


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_counts(rng, name):
    """No parameter is without effect: each has a gradient from the features and the logits."""
    model = two_blocks(name, num_frames=3)
    randomise(model, rng)
    features = model.forward_features(torch.from_numpy(rng.standard_normal((2, 3, 3, 9, 15))))
    weights = torch.from_numpy(rng.standard_normal(features.shape))
    ((features * weights).sum() + model.forward_head(features).sum()).backward()
    without = [key for key, value in model.named_parameters() if value.grad is None or value.grad.abs().max() < 1e-8]
    assert not without


# --- guards: the comparison notices the usual mistakes ------------------------------------------


def swapped(params: tr.Params, one: str, other: str) -> tr.Params:
    assert params[one].shape == params[other].shape
    return {**params, one: params[other], other: params[one]}


def with_chunks(name: str, *order: int) -> Callable[[tr.Params], tr.Params]:
    """The output rows of a linear map cut into equal chunks, which are taken in another order; its bias too."""

    def change(params: tr.Params) -> tr.Params:
        changed = dict(params)
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in params:
                chunks = np.split(params[part], len(order))
                changed[part] = np.concatenate([chunks[i] for i in order])
        return changed

    return change


def with_value(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[tr.Params], tr.Params]:
    return lambda params: {**params, name: function(params[name])}


def with_b_and_c_swapped(name: str, rank: int, states: int) -> Callable[[tr.Params], tr.Params]:
    def change(weight: np.ndarray) -> np.ndarray:
        b, c = weight[rank : rank + states], weight[rank + states :]
        return np.concatenate([weight[:rank], c, b])

    return with_value(name, change)


def halves_swapped(weight: np.ndarray) -> np.ndarray:
    left, right = np.split(weight, 2, axis=1)
    return np.concatenate([right, left], axis=1)


EBS_MISTAKES = {
    "directions' inputs swapped": with_chunks("mixer.in_proj", 1, 0, 2, 3),
    "directions' gates swapped": with_chunks("mixer.in_proj", 0, 1, 3, 2),
    "rows as Fx, Fz, Bx, Bz": with_chunks("mixer.in_proj", 0, 2, 1, 3),
    "gates and inputs swapped": with_chunks("mixer.in_proj", 2, 3, 0, 1),
    "no projection bias": with_value("mixer.in_proj.bias", np.zeros_like),
    "no pointwise bias": with_value("mixer.pw.bias", np.zeros_like),
    "pointwise convolution transposed": with_value("mixer.pw.weight", np.transpose),
    "taps of Conv_s in reverse": with_value("mixer.conv1d.weight", lambda w: w[..., ::-1]),
    "B and C swapped": with_b_and_c_swapped("mixer.x_proj.weight", rank=2, states=16),
    "no bias of the step": with_value("mixer.dt_proj.bias", np.zeros_like),
    "states in another order": with_value("mixer.A_log", lambda a: a[:, ::-1]),
    "no skip of the scan": with_value("mixer.D", np.zeros_like),
    "no output bias": with_value("mixer.out_proj.bias", np.zeros_like),
}
MISTAKES = {
    "ebs": EBS_MISTAKES,
    "stcm": EBS_MISTAKES
    | {
        "halves of Fuse swapped": with_value("fusion.weight", halves_swapped),
        "the two norms swapped": lambda params: swapped(params, "norm.weight", "local.norm.weight"),
        "3×3 turned": with_value("local.conv3.weight", lambda w: w.swapaxes(-1, -2)),
        "5×5 turned": with_value("local.conv5.weight", lambda w: w.swapaxes(-1, -2)),
        "7×7 turned": with_value("local.conv7.weight", lambda w: w.swapaxes(-1, -2)),
        "7×7 without its outermost taps": with_value(
            "local.conv7.weight", lambda w: np.pad(w[..., 1:-1, 1:-1], ((0, 0), (0, 0), (1, 1), (1, 1)))
        ),
        "no bias of 3×3": with_value("local.conv3.bias", np.zeros_like),
        "no bias of Fuse": with_value("fusion.bias", np.zeros_like),
    },
    "bimamba": {
        "x and z swapped": with_chunks("mixer.in_proj", 1, 0),
        "B and C swapped": with_b_and_c_swapped("mixer.x_proj_b.weight", rank=2, states=16),
        "taps in reverse": with_value("mixer.conv1d_b.weight", lambda w: w[..., ::-1]),
    }
    | {
        f"directions' {one} swapped": lambda params, one=one, other=other: swapped(params, one, other)
        for one, other in (
            ("mixer.A_log", "mixer.A_b_log"),
            ("mixer.D", "mixer.D_b"),
            ("mixer.conv1d.weight", "mixer.conv1d_b.weight"),
            ("mixer.conv1d.bias", "mixer.conv1d_b.bias"),
            ("mixer.x_proj.weight", "mixer.x_proj_b.weight"),
            ("mixer.dt_proj.weight", "mixer.dt_proj_b.weight"),
            ("mixer.dt_proj.bias", "mixer.dt_proj_b.bias"),
        )
    },
}


GRID = (2, 3, 10)  # wide enough for the outermost taps of the dilated 7×7


@cache
def transcribed_block(block: str) -> tuple[tr.Params, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    params = tr.random_params(tr.block_shapes(block, 20), rng)
    tokens = rng.standard_normal((1, 61, 20))
    return params, tokens, tr.BLOCKS[block](params, tokens, GRID)


@pytest.mark.parametrize(("block", "mistake"), [(block, mistake) for block in MISTAKES for mistake in MISTAKES[block]])
def test_a_mistake_would_be_noticed(block, mistake):
    params, tokens, right = transcribed_block(block)
    wrong = tr.BLOCKS[block](MISTAKES[block][mistake](params), tokens, GRID)
    assert np.abs(right - wrong).max() > 1e6 * TOLERANCE


STFP_MISTAKES = {
    "first two convolutions swapped": lambda params: swapped(
        params, "conv1.depthwise.weight", "conv2.depthwise.weight"
    ),
    "time and height swapped": with_value("conv1.depthwise.weight", lambda w: w.swapaxes(2, 3)),
    "kernel flipped": with_value("conv3.depthwise.weight", lambda w: w[:, :, ::-1, ::-1, ::-1]),
    "no bias between depthwise and pointwise": with_value("conv2.depthwise.bias", np.zeros_like),
    "norms swapped": lambda params: swapped(params, "conv2.norm.weight", "skip.norm.weight"),
    "pointwise transposed": with_value("skip.pointwise.weight", lambda w: w.swapaxes(0, 1)),
}


@pytest.mark.parametrize("mistake", STFP_MISTAKES)
def test_a_mistake_in_the_stem_would_be_noticed(rng, mistake):
    params = tr.random_params(tr.stfp_shapes(3), rng)
    clip = rng.standard_normal((1, 3, 3, 4, 5))
    wrong = tr.stfp(STFP_MISTAKES[mistake](params), clip)
    assert np.abs(tr.stfp(params, clip) - wrong).max() > 1e6 * TOLERANCE


@pytest.mark.parametrize("block", BLOCKS)
def test_both_directions_reach_the_far_end(rng, block):
    """The last patch changes the first one's output, and the first the last one's: in the formulas and the package."""
    grid = (3, 3, 5)
    module = BLOCKS[block](20, depth=1, drop_path=0.0)
    params = randomise(module, rng)
    tokens = rng.standard_normal((1, 46, 20))
    for changed, watched in ((-1, 1), (1, -1), (0, -1), (-1, 0)):
        other = tokens.copy()
        other[:, changed] += rng.standard_normal(20)
        transcribed = tr.BLOCKS[block](params, other, grid) - tr.BLOCKS[block](params, tokens, grid)
        with torch.no_grad():
            package = module(torch.from_numpy(other), grid) - module(torch.from_numpy(tokens), grid)
        assert np.abs(transcribed[:, watched]).max() > 100 * TOLERANCE
        assert package[:, watched].abs().max() > 100 * TOLERANCE
