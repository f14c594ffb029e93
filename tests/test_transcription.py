"""The transcription itself: against upstream's golden outputs, PyTorch's convolutions and norms, and cases by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transcription as tr
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden" / "videomamba_small_f4.safetensors"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def upstream_to_ours(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith("layers."):
        return "blocks." + name.removeprefix("layers.")
    return name.replace("norm_f.", "norm.")


def test_upstream_videomamba():
    golden = load_file(GOLDEN)
    params = {upstream_to_ours(name): value for name, value in golden.items() if name.startswith("model.")}
    out = tr.model(params, golden["input"], stem="none", block="bimamba", depth=3, patch_size=16)
    # upstream ran in float32: 1e-5 leaves room for its rounding, and is tighter than what we ask of the package
    np.testing.assert_allclose(out["pooled"], golden["features"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(out["logits"], golden["logits"], rtol=0, atol=1e-5)


def test_upstream_tells_the_directions_apart():
    """The golden outputs do not hold with the two directions' parameters swapped, in any block."""
    golden = load_file(GOLDEN)
    params = {upstream_to_ours(name): value for name, value in golden.items() if name.startswith("model.")}
    for i in range(3):
        swapped = dict(params)
        for one, other in (("A_log", "A_b_log"), ("D", "D_b"), ("x_proj.weight", "x_proj_b.weight")):
            a, b = f"blocks.{i}.mixer.{one}", f"blocks.{i}.mixer.{other}"
            swapped[a], swapped[b] = params[b], params[a]
        out = tr.model(swapped, golden["input"], stem="none", block="bimamba", depth=3, patch_size=16)
        assert np.abs(out["pooled"] - golden["features"]).max() > 1e-3


# --- single operations against PyTorch's --------------------------------------------------------


def agree(ours: np.ndarray, theirs: torch.Tensor) -> None:
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-12)


def test_elementwise_and_norms(rng):
    x, weight, bias = rng.standard_normal((2, 5, 7)) * 4, rng.standard_normal(7), rng.standard_normal(7)
    tx, tw, tb = map(torch.from_numpy, (x, weight, bias))
    agree(tr.silu(x), F.silu(tx))
    agree(tr.relu(x), F.relu(tx))
    agree(tr.softplus(x), F.softplus(tx, threshold=1000))  # without PyTorch's cut-off at 20
    agree(tr.layer_norm(x, weight, bias), F.layer_norm(tx, (7,), tw, tb, 1e-5))
    agree(tr.rms_norm(x, weight), tx * torch.rsqrt(tx.pow(2).mean(-1, keepdim=True) + 1e-5) * tw)
    assert np.isfinite(tr.silu(np.array([-1e4, 1e4]))).all()


def test_eps_stands_inside_the_root():
    constant = np.full((1, 4), 3.0)
    np.testing.assert_array_equal(tr.layer_norm(constant, np.ones(4), np.full(4, 0.5)), np.full((1, 4), 0.5))
    np.testing.assert_allclose(tr.rms_norm(np.zeros((1, 4)), np.ones(4)), 0)
    np.testing.assert_allclose(tr.rms_norm(np.full((1, 4), 1e-3), np.ones(4)), 1e-3 / np.sqrt(1e-6 + 1e-5))


def test_conv3d_depthwise(rng):
    x, weight, bias = rng.standard_normal((2, 3, 4, 5, 6)), rng.standard_normal((3, 1, 3, 3, 3)), rng.standard_normal(3)
    theirs = F.conv3d(*map(torch.from_numpy, (x, weight, bias)), padding=1, groups=3)
    agree(tr.conv3d_depthwise(x, weight, bias), theirs)


@pytest.mark.parametrize(("size", "dilation", "padding"), [(3, 1, 1), (5, 2, 4), (7, 3, 9)])
def test_conv2d_depthwise(rng, size, dilation, padding):
    x, weight, bias = rng.standard_normal((11, 8, 2)), rng.standard_normal((2, 1, size, size)), rng.standard_normal(2)
    tx = torch.from_numpy(x).permute(2, 0, 1)[None]  # [h, w, C] -> [1, C, h, w]
    tw, tb = torch.from_numpy(weight), torch.from_numpy(bias)
    theirs = F.conv2d(tx, tw, tb, padding=padding, dilation=dilation, groups=2)
    agree(tr.conv2d_depthwise(x, weight, bias, dilation), theirs[0].permute(1, 2, 0))


@pytest.mark.parametrize("reverse", [False, True])
def test_causal_conv(rng, reverse):
    x, weight, bias = rng.standard_normal((2, 9, 3)), rng.standard_normal((3, 1, 4)), rng.standard_normal(3)
    tx = torch.from_numpy(x).transpose(1, 2)
    tx = tx.flip(-1) if reverse else tx
    theirs = F.conv1d(F.pad(tx, (3, 0)), torch.from_numpy(weight), torch.from_numpy(bias), groups=3)
    theirs = theirs.flip(-1) if reverse else theirs
    agree(tr.causal_conv(x, weight, bias, reverse), theirs.transpose(1, 2))


def test_causal_conv_of_one_impulse():
    x = np.array([0.0, 1, 0, 0, 0]).reshape(1, 5, 1)
    weight, bias = np.array([4.0, 3, 2, 1]).reshape(1, 1, 4), np.array([0.5])
    assert tr.causal_conv(x, weight, bias, reverse=False).ravel().tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert tr.causal_conv(x, weight, bias, reverse=True).ravel().tolist() == [2.5, 1.5, 0.5, 0.5, 0.5]


# --- the scan -----------------------------------------------------------------------------------


def test_selective_scan_by_hand():
    """One channel, one state, three steps, written out."""
    u, delta = np.array([2.0, -1, 3]).reshape(1, 1, 3), np.array([0.5, 0.25, 1]).reshape(1, 1, 3)
    B, C = np.array([1.0, 2, -1]).reshape(1, 1, 3), np.array([1.0, -1, 0.5]).reshape(1, 1, 3)
    A, D = np.array([[-2.0]]), np.array([0.1])
    h1 = 0.5 * 1 * 2
    h2 = np.exp(-2 * 0.25) * h1 + 0.25 * 2 * -1
    h3 = np.exp(-2 * 1) * h2 + 1 * -1 * 3
    y = np.array([h1 + 0.2, -h2 - 0.1, 0.5 * h3 + 0.3])
    np.testing.assert_allclose(tr.selective_scan(u, delta, A, B, C, D).ravel(), y, rtol=1e-14)
    np.testing.assert_allclose(tr.selective_scan(u, delta, A, B, C).ravel(), y - 0.1 * u.ravel(), rtol=1e-14)
    z = np.array([1.0, -2, 0]).reshape(1, 1, 3)
    gated = tr.selective_scan(u, delta, A, B, C, D, z=z).ravel()
    np.testing.assert_allclose(gated, y * z.ravel() / (1 + np.exp(-z.ravel())), rtol=1e-14)


def test_selective_scan_has_the_closed_form(rng):
    """With constant steps, inputs and projections h is a geometric series."""
    length, delta, a = 12, 0.3, rng.uniform(-3, -0.5, (4, 5))
    b, c, u = rng.standard_normal(5), rng.standard_normal(5), rng.standard_normal(4)
    y = tr.selective_scan(
        np.repeat(u[None, :, None], length, 2),
        np.full((1, 4, length), delta),
        a,
        np.repeat(b[None, :, None], length, 2),
        np.repeat(c[None, :, None], length, 2),
    )
    for t in range(length):
        series = (1 - np.exp(delta * a * (t + 1))) / (1 - np.exp(delta * a))  # [channels, states]
        np.testing.assert_allclose(y[0, :, t], np.sum(c * delta * b * u[:, None] * series, axis=1), rtol=1e-12)


def test_selective_scan_backwards_is_forwards_on_the_flipped_sequence(rng):
    u, delta, z = (rng.standard_normal((2, 3, 8)) for _ in range(3))
    B, C = (rng.standard_normal((2, 5, 8)) for _ in range(2))
    A, D, delta_bias = -rng.uniform(0.5, 2, (3, 5)), rng.standard_normal(3), rng.standard_normal(3)
    rest = {"delta_bias": delta_bias, "delta_softplus": True}
    backward = tr.selective_scan(u, delta, A, B, C, D, z=z, reverse=True, **rest)
    u, delta, B, C, z = (value[..., ::-1] for value in (u, delta, B, C, z))
    np.testing.assert_array_equal(backward[..., ::-1], tr.selective_scan(u, delta, A, B, C, D, z=z, **rest))


# --- properties that the formulas imply ---------------------------------------------------------


def test_ebs_shares_all_but_its_projections(rng):
    """Reversed tokens with the two directions' rows of in_proj swapped give the reversed output: the rest is shared."""
    params = tr.random_params(tr.ebs_shapes(20), rng)
    tokens = rng.standard_normal((2, 11, 20))
    swapped = dict(params)
    for name in ("in_proj.weight", "in_proj.bias"):
        fx, bx, fz, bz = np.split(params[name], 4)
        swapped[name] = np.concatenate([bx, fx, bz, fz])
    out = tr.ebs(params, tokens)
    np.testing.assert_allclose(tr.ebs(swapped, tokens[:, ::-1])[:, ::-1], out, rtol=0, atol=1e-12)
    assert np.abs(tr.ebs(params, tokens[:, ::-1])[:, ::-1] - out).max() > 1e-2


def test_bimamba_is_its_own_mirror_image(rng):
    """Reversed tokens with the parameters `*` and `*_b` swapped give the reversed output."""
    params = tr.random_params(tr.bimamba_shapes(20), rng)
    tokens = rng.standard_normal((2, 11, 20))
    names = ["A_log", "D", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"]
    twins = ["A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight"]
    twins += ["dt_proj_b.bias"]
    swapped = {**params, **{a: params[b] for a, b in zip(names + twins, twins + names, strict=True)}}
    out = tr.bimamba(params, tokens)
    np.testing.assert_allclose(tr.bimamba(swapped, tokens[:, ::-1])[:, ::-1], out, rtol=0, atol=1e-12)
    assert np.abs(tr.bimamba(params, tokens[:, ::-1])[:, ::-1] - out).max() > 1e-2


def test_local_branch_stays_within_its_frame(rng):
    grid = (3, 4, 5)
    params = tr.sub(tr.random_params(tr.block_shapes("stcm", 20), rng), "local")
    tokens = rng.standard_normal((1, 1 + 60, 20))
    changed = tokens.copy()
    changed[:, 1 + 20 : 1 + 40] += rng.standard_normal((1, 20, 20))  # the second of three frames
    difference = tr.stcm_local(params, tokens, tokens, grid) - tr.stcm_local(params, changed, changed, grid)
    moved = np.abs(difference).max(axis=-1)[0]
    assert (moved[21:41] > 1e-6).all()
    assert (np.delete(moved, np.arange(21, 41)) == 0).all()


def test_class_token_has_no_neighbours(rng):
    """Its local branch is LN(X) alone, by the branch's own norm."""
    params = tr.sub(tr.random_params(tr.block_shapes("stcm", 20), rng), "local")
    tokens = rng.standard_normal((2, 7, 20))
    local = tr.stcm_local(params, rng.standard_normal((2, 7, 20)), tokens, (1, 2, 3))
    np.testing.assert_array_equal(local[:, 0], tr.layer_norm(tokens[:, 0], params["norm.weight"], params["norm.bias"]))


def test_stfp_reaches_three_positions_each_way(rng):
    """Three 3×3×3 convolutions on the way: a voxel reaches 3 positions in time, height and width, and no further."""
    params = tr.random_params(tr.stfp_shapes(3), rng)
    for name in params:  # keep every ReLU open, so that nothing is cut off on the way
        if name.startswith("norm") and name.endswith("bias"):
            params[name] = np.full(3, 10.0)
    clip = rng.standard_normal((1, 3, 8, 8, 8))
    changed = clip.copy()
    changed[0, 1, 0, 0, 0] += 1
    moved = np.abs(tr.stfp(params, changed) - tr.stfp(params, clip)).max(axis=(0, 1))
    assert (moved[:4, :4, :4] > 0).all()
    moved[:4, :4, :4] = 0
    assert (moved == 0).all()


def test_stfp_of_one_channel_is_the_identity(rng):
    clip = rng.standard_normal((1, 1, 2, 3, 4))
    np.testing.assert_array_equal(tr.stfp({}, clip), clip)


def test_an_image_is_a_clip_of_one_frame(rng):
    shapes = tr.model_shapes(
        stem="stfp", block="stcm", depth=1, dim=8, channels=3, grid=(1, 2, 3), patch_size=2, classes=5
    )
    params = tr.random_params(shapes, rng)
    image = rng.standard_normal((2, 3, 4, 6))
    settings = {"stem": "stfp", "block": "stcm", "depth": 1, "patch_size": 2}
    of_image = tr.model(params, image, **settings)
    of_clip = tr.model(params, image[:, :, None], **settings)
    for name in ("features", "pooled", "logits"):
        np.testing.assert_array_equal(of_image[name], of_clip[name])
    assert of_image["features"].shape == (2, 7, 8)
    assert of_image["logits"].shape == (2, 5)
