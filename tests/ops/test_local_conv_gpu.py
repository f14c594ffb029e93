"""The GPU kernels of the local branch, emulated on a CPU, against PyTorch's operations in float64."""

import importlib

import pytest
import torch
from emulated import ORDERS, emulate, needs_emulation
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_convolutions import SEEDS, assert_agrees, local_parameters, randn
from torch import Tensor

from etmamba_timm.ops import local_conv

LOCAL = importlib.import_module("etmamba_timm.ops.local_conv")
# The picture's width, the dtype, and how many channels the kernels are compiled for; 0: any number, any strides.
VARIANTS = [
    (14, torch.bfloat16, 52),
    (14, torch.float32, 0),
    (7, torch.float32, 12),
    (7, torch.float16, 0),
    (1, torch.bfloat16, 0),
    (20, torch.bfloat16, 48),
    (33, torch.float32, 0),
]

pytestmark = needs_emulation


@pytest.fixture(scope="module", autouse=True)
def _emulated():
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch)
        yield


def tokens(batch: int, length: int, channels: int, layout: str, dtype: torch.dtype) -> Tensor:
    """[B, N, C] in a layout in memory."""
    if layout == "a part of wider tokens":
        return randn(batch, length, channels + 8, dtype=dtype)[..., 4:-4]
    if layout == "channels first":
        return randn(batch, channels, length, dtype=dtype).mT
    if layout == "batch last":
        return randn(length, channels, batch, dtype=dtype).permute(2, 0, 1)
    return randn(batch, length, channels, dtype=dtype)


LAYOUTS = st.sampled_from(["contiguous", "a part of wider tokens", "channels first", "batch last"])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS),
    batch=st.integers(1, 3),
    frames=st.integers(1, 3),
    height=st.sampled_from([1, 2, 3, 7, 11, 14]),
    channels=st.sampled_from([1, 2, 3, 5, 31, 49, 97]),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    autocast=st.booleans(),
    order=ORDERS,
    seed=SEEDS,
)
@example((14, torch.bfloat16, 52), 2, 1, 14, 0, (), True, "2", 0)
@example((7, torch.float16, 0), 1, 2, 7, 12, ("a part of wider tokens", "contiguous"), True, "1", 0)
@example((1, torch.bfloat16, 0), 1, 1, 1, 1, ("contiguous", "contiguous"), False, "0", 0)
def test_agrees_with_float64(variant, batch, frames, height, channels, layouts, autocast, order, seed):
    torch.manual_seed(seed)
    width, dtype, dense = variant
    if dense:
        channels, layouts = dense, ("contiguous", "contiguous")
    length = 1 + frames * height * width
    x = tokens(batch, length, channels, layouts[0], dtype)
    residual = tokens(batch, length, 4 * channels, layouts[1], torch.float32)
    parameters = [p.to(torch.float32 if autocast else dtype) for p in local_parameters(channels)]

    def call(function):
        return lambda x, residual, *rest: function(x, residual, rest[:3], rest[3:], (frames, height, width))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMULATION_ORDER", order)
        assert_agrees(call(local_conv), call(LOCAL._plain), [x, residual], parameters)


def test_gradients_may_have_any_strides():
    parameters = [p.float() for p in local_parameters(4)]
    x, residual = randn(2, 15, 4).float().requires_grad_(), randn(2, 15, 16).float()

    def call(function, x):
        return function(x, residual, parameters[:3], parameters[3:], (2, 1, 7))

    out = call(local_conv, x)
    for dout in (torch.ones(()).expand_as(out), randn(2, 16, 15).float().mT):
        [grad] = torch.autograd.grad(out, x, dout, retain_graph=True)
        [wanted] = torch.autograd.grad(call(LOCAL._plain, x), x, dout)
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_sums_beyond_the_range_of_exponentials():
    def call(function):
        return lambda x, residual, *rest: function(x, residual, rest[:3], rest[3:], (2, 2, 7))

    parameters = [p.float() for p in local_parameters(4)]
    x, residual = 1000 * randn(2, 29, 4).float(), randn(2, 29, 16).float()
    assert_agrees(call(local_conv), call(LOCAL._plain), [x, residual], parameters)


def test_an_empty_batch():
    parameters = [p.float().requires_grad_() for p in local_parameters(3)]
    out = local_conv(torch.empty(0, 13, 3), torch.empty(0, 13, 12), parameters[:3], parameters[3:], (2, 2, 3))
    assert out.shape == (0, 13, 12)
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), parameters))


def test_operators_are_proper_ones():
    inputs = [randn(2, 13, 3), randn(2, 13, 12), *local_parameters(3)]
    tensors = [t.float().requires_grad_() for t in inputs]
    torch.library.opcheck(LOCAL._forward, (*tensors, 2, 2, 3))
    x, residual, *parameters = (t.detach() for t in tensors)
    torch.library.opcheck(LOCAL._backward, (torch.randn_like(residual), x, *parameters, 2, 2, 3))
