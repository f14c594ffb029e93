"""The CPU kernels of the convolutions, against PyTorch's operations in float64: values, gradients, registration."""

import importlib

import pytest
import torch
from agreement import assert_gradients_agree, error
from hypothesis import given, settings
from hypothesis import strategies as st

from etmamba_timm.ops import conv_norm_relu, local_conv, short_conv
from etmamba_timm.ops.kernels import load_cpu

SHORT, LOCAL, STAGE = (
    importlib.import_module(f"etmamba_timm.ops.{name}") for name in ("short_conv", "local_conv", "conv_norm_relu")
)
# max|a - b| / max|b| against float64: activations and their gradients, gradients of parameters
BOUNDS = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (1e-2, 3e-2),
    torch.float16: (1e-2, 3e-2),
}
DTYPES = st.sampled_from(list(BOUNDS))
SEEDS = st.integers(0, 1000)

pytestmark = pytest.mark.skipif(load_cpu.why_not() is not None, reason=f"the kernels can't run: {load_cpu.why_not()}")


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def assert_agrees(kernel, plain, activations: list[torch.Tensor], parameters: list[torch.Tensor]) -> None:
    """Output and every gradient of `kernel` in the tensors' dtypes, against `plain` in float64."""
    assert kernel is not plain
    inputs = [t.detach().requires_grad_() for t in (*activations, *parameters)]
    wanted = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = kernel(*inputs), plain(*wanted)
    weight = randn(*out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, inputs, weight)
    activation_bound, parameter_bound = BOUNDS[activations[0].dtype]
    assert error(out, expected) <= activation_bound
    assert [grad.dtype for grad in grads] == [t.dtype for t in inputs]
    bounds = [activation_bound] * len(activations) + [parameter_bound] * len(parameters)
    assert_gradients_agree(grads, expected, wanted, weight, bounds)


def parameters_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 150),
    width=st.integers(1, 40),
    taps=st.integers(1, 6),
    way=st.sampled_from(["forwards", "backwards", "both"]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_short_conv(batch, length, width, taps, way, dtype, seed):
    torch.manual_seed(seed)
    x = randn(batch, length, 2, width, dtype=dtype).permute(2, 0, 1, 3)  # strided, as EBS hands it over
    x = x if way == "both" else x[1]
    weight, bias = randn(width, 1, taps, dtype=parameters_in(dtype)), randn(width, dtype=parameters_in(dtype))
    reverse = way == "backwards"
    assert_agrees(lambda *t: short_conv(*t, reverse), lambda *t: SHORT._plain(*t, reverse), [x], [weight, bias])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 16), st.integers(1, 16)),
    channels=st.integers(1, 40),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_local_conv(batch, grid, channels, dtype, seed):
    torch.manual_seed(seed)
    t, h, w = grid
    sums = parameters_in(dtype)
    x = randn(batch, 1 + t * h * w, channels + 3, dtype=dtype)[..., 3:]
    residual = randn(batch, 1 + t * h * w, 4 * channels, dtype=sums)
    weights = [randn(channels, 1, k, k, dtype=sums) / k for k in (3, 5, 7)]
    biases = [randn(channels, dtype=sums) for _ in range(3)]

    def call(function):
        return lambda x, residual, *rest: function(x, residual, list(rest[:3]), list(rest[3:]), grid)

    assert_agrees(call(local_conv), call(LOCAL._plain), [x, residual], [*weights, *biases])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(3, 5),  # normalised, two are always -1 and 1, and the gradient is next to nothing
    size=st.tuples(st.integers(1, 4), st.integers(1, 35), st.integers(1, 40)),
    depthwise=st.booleans(),
    with_residual=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_conv_norm_relu(batch, channels, size, depthwise, with_residual, dtype, seed):
    torch.manual_seed(seed)
    sums = parameters_in(dtype)
    x = [randn(batch, channels, *size, dtype=dtype) for _ in range(1 + with_residual)]
    # Biases far apart keep the norm's variance away from 0, where no precision would be enough.
    parameters = [randn(channels, channels, 1, 1, 1) / 10, 10 * torch.arange(channels), 1 + randn(channels) / 10]
    parameters = [p.to(sums) for p in (*parameters, 2 + randn(channels))]
    if depthwise:
        parameters += [randn(channels, 1, 3, 3, 3).to(sums) / 3, randn(channels).to(sums)]

    def call(function):
        def run(x, *rest):
            residual, rest = (rest[0], rest[1:]) if with_residual else (None, rest)
            return function(x, rest[4:] or None, rest[:2], rest[2:4], 1e-5, residual)

        return run

    assert_agrees(call(conv_norm_relu), call(STAGE._plain), x, parameters)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_sums_beyond_the_range_of_exponentials(dtype):
    """e^x is infinite from 89 on, in float32."""
    x, weight, bias = 1000 * randn(2, 29, 20, dtype=dtype), randn(20, 1, 4, dtype=parameters_in(dtype)), randn(20)
    bias = bias.to(parameters_in(dtype))
    assert_agrees(lambda *t: short_conv(*t, False), lambda *t: SHORT._plain(*t, False), [x], [weight, bias])

    def call(function):
        return lambda x, residual, *rest: function(x, residual, list(rest[:3]), list(rest[3:]), (2, 2, 7))

    parameters = [p.to(parameters_in(dtype)) for p in local_parameters(20)]
    residual = randn(2, 29, 80, dtype=parameters_in(dtype))
    assert_agrees(call(local_conv), call(LOCAL._plain), [x, residual], parameters)


def test_gradients_stop_where_relu_does():
    """A position whose normalised value is negative passes nothing on, as in PyTorch."""
    x, one, zero = randn(1, 2, 2, 3, 20).requires_grad_(), torch.ones(2).double(), torch.zeros(2).double()
    mix = torch.eye(2).double().view(2, 2, 1, 1, 1)
    for function in (conv_norm_relu, STAGE._plain):
        out = function(x, None, (mix, zero), (one, zero), 1e-5)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert ((out == 0).sum(1) == 1).all()  # of two normalised values one is negative
        assert grad.abs().max() > 0


def local_parameters(channels: int) -> list[torch.Tensor]:
    return [*(randn(channels, 1, k, k) for k in (3, 5, 7)), *(randn(channels) for _ in range(3))]


OPERATORS = {
    "short_conv": (SHORT, lambda: (randn(2, 2, 9, 5), randn(5, 1, 4), randn(5), False)),
    "local_conv": (LOCAL, lambda: (randn(2, 13, 3), randn(2, 13, 12), *local_parameters(3), 2, 2, 3)),
    "conv_norm_relu": (STAGE, lambda: (randn(1, 2, 3, 4, 5), randn(1, 2, 3, 4, 5), randn(66), True, 1e-5)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_proper_ones(name):
    """Schema, fake implementation, autograd registration and tracing, by torch's own checks; gradcheck too."""
    module, make = OPERATORS[name]
    inputs = tuple(t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in make())
    torch.library.opcheck(module._forward, inputs)
    assert torch.autograd.gradcheck(module._forward, inputs)
    plain = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in inputs)
    dout = torch.randn_like(module._forward(*plain))
    backward = {
        "short_conv": (dout, *plain),
        "local_conv": (dout, plain[0], *plain[2:]),
        "conv_norm_relu": (dout, plain[0], *plain[2:], True),
    }[name]
    torch.library.opcheck(module._backward, backward)


def test_threads_do_not_change_the_result():
    threads = torch.get_num_threads()
    x, residual = randn(3, 1 + 4 * 9, 20), randn(3, 1 + 4 * 9, 80)
    weights, biases = [randn(20, 1, k, k) for k in (3, 5, 7)], [randn(20)] * 3
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(local_conv(x, residual, weights, biases, (4, 3, 3)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"x is \(3, 2, 5, 4\); it must be \[B, N, E\], or \[2, B, N, E\]"):
        short_conv(randn(3, 2, 5, 4), randn(4, 1, 4), randn(4))
    with pytest.raises(ValueError, match=r"weight is \(3, 1, 4\); it must be \(4, 1, 4\)"):
        short_conv(randn(2, 5, 4), randn(3, 1, 4), randn(4))
    with pytest.raises(ValueError, match=r"bias is \(1,\); it must be \(4,\)"):
        short_conv(randn(2, 5, 4), randn(4, 1, 4), randn(1))
    weights, biases = [randn(3, 1, k, k) for k in (3, 5, 7)], [randn(3)] * 3
    with pytest.raises(ValueError, match=r"x is \(2, 12, 3\); it must be \(2, 13, 3\)"):
        local_conv(randn(2, 12, 3), randn(2, 12, 12), weights, biases, (3, 2, 2))
    with pytest.raises(ValueError, match=r"residual is \(2, 13, 3\); it must be \(2, 13, 12\)"):
        local_conv(randn(2, 13, 3), randn(2, 13, 3), weights, biases, (3, 2, 2))
    with pytest.raises(ValueError, match=r"weights\[0\] is \(3, 1, 7, 7\); it must be \(3, 1, 3, 3\)"):
        local_conv(randn(2, 13, 3), randn(2, 13, 12), weights[::-1], biases, (3, 2, 2))
    mix, norm = (randn(3, 3, 1, 1, 1), randn(3)), (randn(3), randn(3))
    with pytest.raises(ValueError, match=r"pointwise weight is \(3, 3, 1, 1, 1\); it must be \(4, 4, 1, 1, 1\)"):
        conv_norm_relu(randn(1, 4, 2, 2, 2), None, mix, norm, 1e-5)
    with pytest.raises(ValueError, match=r"residual is \(1, 3, 2, 2, 1\)"):
        conv_norm_relu(randn(1, 3, 2, 2, 2), None, mix, norm, 1e-5, randn(1, 3, 2, 2, 1))
