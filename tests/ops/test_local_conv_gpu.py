"""The GPU kernels of the local branch, emulated on a CPU, against PyTorch's operations in float64."""

import importlib
import os

import pytest
import torch
from emulated import COMPILER, emulate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_convolutions import assert_agrees, local_parameters, randn
from torch import Tensor

from etmamba_timm.ops import local_conv

LOCAL = importlib.import_module("etmamba_timm.ops.local_conv")
# Width of the picture, dtype, and whether channels are read in pairs: each is a compilation of the kernels.
VARIANTS = [
    (14, torch.bfloat16, True),
    (14, torch.float32, False),
    (7, torch.float32, True),
    (7, torch.float16, False),
    (1, torch.bfloat16, False),
    (20, torch.bfloat16, True),
    (33, torch.float32, False),
]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def _emulated():
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch)
        yield


def strided(batch: int, tokens: int, channels: int, layout: str, dtype: torch.dtype) -> Tensor:
    """Tokens [B, N, C] of a layout in memory."""
    if layout == "a part of wider tokens":
        return randn(batch, tokens, channels + 8, dtype=dtype)[..., 4:-4]
    if layout == "channels first":
        return randn(batch, channels, tokens, dtype=dtype).mT
    if layout == "batch last":
        return randn(tokens, channels, batch, dtype=dtype).permute(2, 0, 1)
    return randn(batch, tokens, channels, dtype=dtype)


PARTS, FIRST, LAST = "a part of wider tokens", "channels first", "batch last"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS),
    batch=st.integers(1, 3),
    frames=st.integers(1, 3),
    height=st.sampled_from([1, 2, 3, 7, 11, 14]),
    channels=st.sampled_from([1, 2, 3, 5, 31, 49, 97]),
    layouts=st.tuples(*[st.sampled_from(["contiguous", PARTS, FIRST, LAST])] * 2),
    plain_parameters=st.booleans(),
    order=st.sampled_from("012"),
    seed=st.integers(0, 1000),
)
@example((14, torch.bfloat16, True), 1, 2, 14, 12, ("contiguous", PARTS), True, "2", 0)
@example((1, torch.bfloat16, False), 1, 1, 1, 1, ("contiguous", "contiguous"), True, "0", 0)
def test_agrees_with_float64(variant, batch, frames, height, channels, layouts, plain_parameters, order, seed):
    torch.manual_seed(seed)
    os.environ["EMULATION_ORDER"] = order
    width, dtype, aligned = variant
    if aligned:
        channels, layouts = 4 * channels % 100, [layout if layout == PARTS else "contiguous" for layout in layouts]
    tokens = 1 + frames * height * width
    x = strided(batch, tokens, channels, layouts[0], dtype)
    residual = strided(batch, tokens, 4 * channels, layouts[1], torch.float32)
    parameters = [p.to(torch.float32 if plain_parameters else dtype) for p in local_parameters(channels)]

    def call(function):
        return lambda x, residual, *rest: function(x, residual, rest[:3], rest[3:], (frames, height, width))

    assert_agrees(call(local_conv), call(LOCAL._plain), [x, residual], parameters)


def test_operators_are_proper_ones():
    inputs = [randn(2, 13, 3), randn(2, 13, 12), *local_parameters(3)]
    tensors = [t.float().requires_grad_() for t in inputs]
    torch.library.opcheck(LOCAL._forward, (*tensors, 2, 2, 3))
    x, residual, *parameters = (t.detach() for t in tensors)
    torch.library.opcheck(LOCAL._backward, (torch.randn_like(residual), x, *parameters, 2, 2, 3))
