"""The GPU kernels of a stage of STFP, emulated: against the plain twin in float64, values and gradients."""

import copy
import importlib
import logging

import pytest
import torch
from agreement import error
from emulated import ORDERS, emulate, needs_emulation
from hypothesis import given, settings
from hypothesis import strategies as st
from test_convolutions import SEEDS, assert_agrees, parameters_in, randn

from etmamba_timm.layers.stfp import Stfp
from etmamba_timm.ops import conv_norm_relu
from etmamba_timm.ops.kernels import choice, load_gpu

STAGE = importlib.import_module("etmamba_timm.ops.conv_norm_relu")
pytestmark = needs_emulation


@pytest.fixture(autouse=True, scope="module")
def emulation():
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch)
        yield patch


def parameters_for(channels: int, depthwise: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """Pointwise, norm, depthwise. Biases far apart keep the norm's variance away from 0, as in test_convolutions.py."""
    pointwise = [randn(channels, channels, 1, 1, 1) / 10, 10 * torch.arange(channels)]
    norm = [1 + randn(channels) / 10, 2 + randn(channels)]
    taps = [randn(channels, 1, 3, 3, 3) / 3, randn(channels)] if depthwise else []
    return [p.to(parameters_in(dtype)) for p in (*pointwise, *norm, *taps)]


def stage(function, with_residual: bool, eps: float):
    def run(x, *rest):
        residual, rest = (rest[0], rest[1:]) if with_residual else (None, rest)
        return function(x, rest[4:] or None, rest[:2], rest[2:4], eps, residual)

    return run


# (channels, dtype, depthwise, are widths multiples of 4): each is compiled on its own
COMPILED = [
    (3, torch.bfloat16, True, True),
    (3, torch.bfloat16, True, False),
    (3, torch.float32, True, True),
    (3, torch.float32, False, True),
    (3, torch.float16, False, False),
    (2, torch.float16, True, True),
    (5, torch.float32, True, False),
]


@pytest.mark.parametrize(("channels", "dtype", "depthwise", "aligned"), COMPILED)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 40)),
    with_residual=st.booleans(),
    order=ORDERS,
    processors=st.sampled_from([1, 4, 50]),  # many have the frames cut into stretches
    seed=SEEDS,
)
def test_agrees_with_float64(
    emulation, channels, dtype, depthwise, aligned, batch, size, with_residual, order, processors, seed
):
    torch.manual_seed(seed)
    emulate(emulation, processors)
    emulation.setenv("EMULATION_ORDER", order)
    *others, width = size
    width = -(-width // 4) * 4 if aligned else width + (width % 4 == 0)
    x = [randn(batch, channels, *others, width, dtype=dtype) for _ in range(1 + with_residual)]
    # Normalised, two channels are always -1 and 1, and the gradient is next to nothing unless eps is large.
    eps = 10.0 if channels == 2 else 1e-5
    parameters = parameters_for(channels, depthwise, dtype)
    assert_agrees(stage(conv_norm_relu, with_residual, eps), stage(STAGE._plain, with_residual, eps), x, parameters)


@pytest.mark.parametrize("width", [261, 520])
def test_pictures_of_several_tiles(width):
    torch.manual_seed(0)
    x = [randn(1, 3, 2, 9, width, dtype=torch.float32 if width % 4 == 0 else torch.bfloat16)]
    parameters = parameters_for(3, True, x[0].dtype)
    assert_agrees(stage(conv_norm_relu, False, 1e-5), stage(STAGE._plain, False, 1e-5), x, parameters)


def test_addresses_that_are_not_aligned():
    torch.manual_seed(0)
    memory = randn(2 * 3 * 8 + 1, dtype=torch.bfloat16)
    parameters = parameters_for(3, True, torch.bfloat16)
    for start in (0, 1):
        x = memory[start : start + 48].view(1, 3, 1, 2, 8).detach()
        run = stage(conv_norm_relu, False, 1e-5)
        assert (
            error(run(x, *parameters), stage(STAGE._plain, False, 1e-5)(x.double(), *(p.double() for p in parameters)))
            < 1e-2
        )


@pytest.mark.parametrize("depthwise", [True, False])
def test_gradients_that_nobody_needs(depthwise):
    """Without the clip's gradient, and with a gradient of the output that isn't contiguous."""
    torch.manual_seed(0)
    x, parameters = randn(1, 3, 3, 4, 8, dtype=torch.float32), parameters_for(3, depthwise, torch.float32)
    grads = []
    for needed in (True, False):
        inputs = [x.clone().requires_grad_(needed), *(p.clone().requires_grad_() for p in parameters)]
        out = stage(conv_norm_relu, False, 1e-5)(*inputs)
        dout = torch.arange(96.0).view(1, 3, 8, 4, 1).expand(-1, -1, -1, -1, 3).transpose(2, 4) / 50
        grads.append(torch.autograd.grad(out, inputs[1:], dout))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_not_a_number_stays_one():
    x = randn(1, 3, 1, 3, 8, dtype=torch.float32)
    x[0, 1, 0, 1, 2] = torch.nan
    parameters = parameters_for(3, True, torch.float32)
    out = stage(conv_norm_relu, False, 1e-5)(x, *parameters)
    assert torch.equal(out.isnan(), stage(STAGE._plain, False, 1e-5)(x, *parameters).isnan())
    assert out.isnan().sum() == 27


@pytest.mark.parametrize("device", ["emulated", "cpu"])
def test_operators_are_proper_ones(device, emulation):
    x, residual = (randn(1, 3, 3, 4, 8, dtype=torch.float32) for _ in range(2))
    flat = torch.cat([randn(84), randn(9), 10 * torch.arange(3), 1 + randn(6) / 10]).float()
    inputs = [t.requires_grad_() for t in (x, residual, flat)]
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(STAGE.load_gpu, "on_gpu", lambda x: False)
        torch.library.opcheck(STAGE._forward, (*inputs, True, 1e-5))
        dout = randn(*x.shape, dtype=torch.float32)
        torch.library.opcheck(STAGE._backward, (dout, x.detach(), flat.detach(), True, 1e-5, True))
        torch.library.opcheck(STAGE._backward, (dout, x.detach(), flat.detach(), True, 1e-5, False))


def test_stem():
    """All four stages of STFP."""
    torch.manual_seed(0)
    stem = Stfp(3)
    for block in stem.children():
        with torch.no_grad():  # away from a variance of 0
            block.pointwise.bias += 10 * torch.arange(3)
    x = randn(2, 3, 4, 8, 12, dtype=torch.float32)
    results = []
    for run in (stem, copy.deepcopy(stem).double()):
        clip = x.to(next(run.parameters()).dtype).requires_grad_()
        out = run(clip)
        results.append((out, *torch.autograd.grad(out.square().mean(), [clip, *run.parameters()])))
    for i, (got, wanted) in enumerate(zip(*results, strict=True)):
        assert error(got, wanted) <= (1e-5 if i < 2 else 1e-4), i


def test_more_channels_than_the_kernels_take(caplog, monkeypatch):
    monkeypatch.setattr(choice, "_told", set())
    monkeypatch.setattr(STAGE, "_forward", None)
    x, parameters = randn(1, 9, 1, 2, 2, dtype=torch.float32), parameters_for(9, False, torch.float32)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert stage(conv_norm_relu, False, 1e-5)(x, *parameters).shape == x.shape
    assert [record.message for record in caplog.records] == [
        "a stage of STFP runs on PyTorch's operators, because its kernels take up to 8 channels, not 9"
    ]


@pytest.mark.parametrize(
    ("frames", "blocks", "room", "wanted"),
    [
        (16, 200, 264, 16),  # one round of blocks: no cut
        (16, 28, 264, 2),  # few blocks: short stretches
        (16, 5000, 264, 16),  # many rounds
        (1, 1, 264, 1),
        (5, 0, 264, 5),  # an empty batch
    ],
)
def test_stretches(frames, blocks, room, wanted):
    assert load_gpu.stretch(frames, blocks, room, 2) == wanted


def test_empty():
    for shape in ((0, 3, 2, 4, 8), (1, 3, 2, 0, 8), (1, 3, 2, 4, 0)):
        x, parameters = randn(*shape, dtype=torch.float32).requires_grad_(), parameters_for(3, True, torch.float32)
        out = stage(conv_norm_relu, False, 1e-5)(x, *(p.requires_grad_() for p in parameters))
        assert out.shape == shape
        grads = torch.autograd.grad(out.sum(), [x, *parameters])
        assert all((g == 0).all() for g in grads)
