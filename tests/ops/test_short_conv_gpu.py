"""The GPU kernels of the short convolution, emulated, against PyTorch's operations in float64."""

import importlib

import pytest
import torch
from emulated import ORDERS, emulate, needs_emulation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convolutions import SEEDS, assert_agrees, randn

from etmamba_timm.ops import short_conv

MODULE = importlib.import_module("etmamba_timm.ops.short_conv")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = needs_emulation


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulate(monkeypatch)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 60),
    width=st.sampled_from([1, 3, 8, 30, 64]),
    way=st.sampled_from(["forwards", "backwards", "both"]),
    dtype=st.sampled_from(DTYPES),
    half_weights=st.booleans(),
    with_bias=st.booleans(),
    layout=st.sampled_from(["views", "contiguous", "transposed"]),
    order=ORDERS,
    processors=st.sampled_from([1, 4, 50]),  # few have long stretches
    seed=SEEDS,
)
def test_short_conv(
    monkeypatch, batch, length, width, way, dtype, half_weights, with_bias, layout, order, processors, seed
):
    emulate(monkeypatch, processors)
    monkeypatch.setenv("EMULATION_ORDER", order)
    torch.manual_seed(seed)
    x = {
        "views": lambda: randn(batch, length, 2, 2 * width, dtype=dtype).permute(2, 0, 1, 3)[..., width:],
        "contiguous": lambda: randn(2, batch, length, width, dtype=dtype),
        "transposed": lambda: randn(2, batch, width, length, dtype=dtype).mT,
    }[layout]()
    x = x if way == "both" else x[1]
    sums = dtype if half_weights else torch.float32
    parameters = [randn(width, 1, 4, dtype=sums), randn(width, dtype=sums)][: 1 + with_bias]
    reverse = way == "backwards"

    def call(function):
        return lambda x, weight, bias=None: function(x, weight, bias, reverse)

    assert_agrees(call(short_conv), call(MODULE._plain), [x], parameters)


def test_sums_beyond_the_range_of_exponentials():
    x, weight, bias = 1000 * randn(2, 29, 8).float(), randn(8, 1, 4).float(), randn(8).float()
    assert_agrees(lambda *t: short_conv(*t, False), lambda *t: MODULE._plain(*t, False), [x], [weight, bias])


@pytest.mark.parametrize("taps", [1, 6])
def test_other_widths_of_the_convolution(taps):
    x, weight, bias = randn(2, 30, 8).float(), randn(8, 1, taps).float(), randn(8).float()
    assert_agrees(short_conv, lambda *t: MODULE._plain(*t, False), [x], [weight, bias])


@pytest.mark.parametrize("shape", [(0, 9, 8), (2, 0, 8), (2, 9, 0)])
def test_empty(shape):
    inputs = [randn(*shape), randn(shape[-1], 1, 4), randn(shape[-1])]
    inputs = [t.float().requires_grad_() for t in inputs]
    out = short_conv(*inputs)
    assert out.shape == shape
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), inputs))


def test_gradients_may_have_any_strides():
    x, weight = randn(2, 9, 8).float().requires_grad_(), randn(8, 1, 4).float()
    out = short_conv(x, weight)
    for dout in (torch.ones(()).expand_as(out), randn(2, 8, 9).float().mT):
        [grad] = torch.autograd.grad(out, x, dout, retain_graph=True)
        wanted = torch.autograd.grad(MODULE._plain(x.double(), weight.double(), None, False), x, dout.double())[0]
        torch.testing.assert_close(grad, wanted.float())


def test_float64_goes_to_the_plain_twin(caplog):
    x, weight = randn(2, 9, 8), randn(8, 1, 4)
    assert torch.equal(short_conv(x, weight), MODULE._plain(x, weight, None, False))


def test_operators_are_proper_ones():
    x, weight, bias = randn(2, 2, 9, 8).float(), randn(8, 1, 4).float(), randn(8).float()
    for given_bias in (bias, None):
        inputs = [t if t is None else t.requires_grad_() for t in (x, weight, given_bias)]
        torch.library.opcheck(MODULE._forward, (*inputs, False))
        plain = [t if t is None else t.detach() for t in inputs]
        torch.library.opcheck(MODULE._backward, (randn(2, 2, 9, 8).float(), *plain, False))
