"""The norms' kernels, on the CPU and emulated for a GPU, against PyTorch's in float64."""

import importlib

import pytest
import torch
from agreement import assert_gradients_agree, error
from emulated import ORDERS, emulate, needs_emulation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convolutions import BOUNDS, SEEDS, randn

from etmamba_timm.ops import norm
from etmamba_timm.ops.kernels import load_cpu

MODULE = importlib.import_module("etmamba_timm.ops.norm")
HALF = [torch.bfloat16, torch.float16]
ON_CPU = [(x, x, x) for x in BOUNDS] + [(torch.float32, half, half) for half in HALF]
ON_CPU += [(torch.float32, torch.float32, half) for half in HALF] + [(half, torch.float32, half) for half in HALF]
ON_GPU = [dtypes for dtypes in ON_CPU if torch.float64 not in dtypes]

pytestmark = pytest.mark.skipif(load_cpu.why_not() is not None, reason=f"no CPU kernels: {load_cpu.why_not()}")


def assert_agrees(rows: int, width: int, dtypes: tuple, rms: bool, seed: int) -> None:
    """Output and every gradient; dtypes of the input, the parameters and the output."""
    x_dtype, parameter_dtype, out_dtype = dtypes
    width = max(4, width)  # of fewer, the gradient of x is next to nothing
    torch.manual_seed(seed)
    x = (3 + randn(2, rows, width)).to(x_dtype)
    parameters = [(1 + randn(width) / 3).to(parameter_dtype), randn(width).to(parameter_dtype)][: 1 if rms else 2]
    inputs = [t.requires_grad_() for t in (x, *parameters)]
    wanted = [t.detach().double().requires_grad_() for t in inputs]
    out = MODULE._forward(*inputs, *([None] * rms), 1e-3, out_dtype)[0]
    expected = MODULE._plain(*wanted, *([None] * rms), 1e-3, torch.float64)
    dout = randn(*out.shape).to(out_dtype)
    grads = torch.autograd.grad(out, inputs, dout)
    activations, of_parameters = BOUNDS[out_dtype]
    assert out.dtype == out_dtype
    assert error(out, expected) <= activations
    assert [grad.dtype for grad in grads] == [t.dtype for t in inputs]
    assert_gradients_agree(grads, expected, wanted, dout, [activations, *[of_parameters] * len(parameters)])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 100), st.sampled_from(ON_CPU), st.booleans(), SEEDS)
def test_on_a_cpu(rows, width, dtypes, rms, seed):
    assert_agrees(rows, width, dtypes, rms, seed)


@needs_emulation
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 20), st.sampled_from([1, 7, 32, 66, 192, 388]), st.sampled_from(ON_GPU), st.booleans(), ORDERS, SEEDS
)
def test_on_a_gpu(monkeypatch, rows, width, dtypes, rms, order, seed):
    with monkeypatch.context() as patch:
        emulate(patch)
        patch.setenv("EMULATION_ORDER", order)
        assert_agrees(rows, width, dtypes, rms, seed)


@pytest.mark.parametrize("where", ["cpu", pytest.param("gpu", marks=needs_emulation)])
@pytest.mark.parametrize("rms", [False, True])
def test_operators_are_proper_ones(monkeypatch, where, rms):
    if where == "gpu":
        emulate(monkeypatch)
    dtype = torch.float64 if where == "cpu" else torch.float32
    x, weight, bias = randn(2, 5, 8).to(dtype), randn(8).to(dtype), None if rms else randn(8).to(dtype)
    inputs = [t if t is None else t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(MODULE._forward, (*inputs, 1e-5, dtype))
    plain = [t if t is None else t.detach() for t in inputs]
    out, mean, scale = MODULE._forward(*plain, 1e-5, dtype)
    torch.library.opcheck(MODULE._backward, (torch.randn_like(out), *plain, mean, scale))
    if where == "cpu":
        given = [t for t in inputs if t is not None]
        assert torch.autograd.gradcheck(lambda *t: norm(*t, *([None] * rms), 1e-5, dtype), given)


def test_it_leaves_a_layer_norm_of_one_dtype_to_pytorch():
    x, weight, bias = randn(3, 8).float().requires_grad_(), randn(8).float(), randn(8).float()
    assert "LayerNorm" in norm(x, weight, bias, 1e-5, torch.float32).grad_fn.name()
    assert "etmamba" in norm(x, weight, None, 1e-5, torch.float32).grad_fn.name()
    assert "etmamba" in norm(x, weight.bfloat16(), bias.bfloat16(), 1e-5, torch.bfloat16).grad_fn.name()


@needs_emulation
def test_rows_too_wide_for_the_gpu_kernels(monkeypatch):
    emulate(monkeypatch)
    x, weight = randn(2, MODULE.WIDEST + 1).float(), randn(MODULE.WIDEST + 1).float().requires_grad_()
    assert "etmamba" in norm(x[:, :-1], weight[:-1], None, 1e-5, torch.float32).grad_fn.name()
    assert "etmamba" not in norm(x, weight, None, 1e-5, torch.float32).grad_fn.name()


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weight is \(3,\); it must be \(4,\)"):
        norm(randn(2, 4), randn(3), None, 1e-5, torch.float64)
    with pytest.raises(ValueError, match=r"bias is \(3,\); it must be \(4,\)"):
        norm(randn(2, 4), randn(4), randn(3), 1e-5, torch.float64)
