"""The mamba-ssm backend on a GPU, with mamba-ssm's own kernel."""

import itertools

import pytest
import torch
from mamba_ssm_cases import (
    DIRECTIONS,
    OPTIONS,
    SCANS,
    TOLERANCE,
    assert_close,
    forward_and_backward,
    in_direction,
    make_inputs,
    make_model,
    only_reference,
    with_gradients,
)

from etmamba_timm.ops.scan import mamba_ssm

pytestmark = pytest.mark.cuda

GPU_TOLERANCE = TOLERANCE | {torch.float32: 1e-4}  # the kernel is compiled with --use_fast_math


@pytest.fixture
def gpu(monkeypatch) -> str:
    """The device, or a skip with the backend's own reason. No TF32 in convolutions, unlike by default."""
    reason = mamba_ssm.why_not()
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return "cuda"


@pytest.mark.parametrize("dtype", GPU_TOLERANCE)
@pytest.mark.parametrize("length", [1, 13, 128, 2048, 2051])
def test_kernel_agrees_with_the_reference(gpu, dtype, length):
    for direction, options in itertools.product(DIRECTIONS, OPTIONS):
        inputs = make_inputs(options, width=32, length=length, n_state=16, dtype=dtype, device=gpu)
        dout = torch.randn(inputs["u"].shape).to(gpu, dtype)
        got = with_gradients(in_direction(direction, "mamba_ssm"), inputs, dout)
        # For 2,048 steps the reference takes a minute; the vectorised scan agrees with it to 1e-12.
        want = with_gradients(in_direction(direction, "torch"), inputs, dout, torch.float64)
        # At length 1 the gradient of A is exactly 0; the kernel subtracts values that may round differently.
        largest = max(gradient.abs().max().item() for name, gradient in want.items() if name != "out")
        assert_close(got, want, GPU_TOLERANCE[dtype], of_zero=GPU_TOLERANCE[torch.float32] * largest)


@pytest.mark.parametrize("name", SCANS)
def test_models_run_on_the_kernel(gpu, monkeypatch, name):
    model, clip, target = make_model(name)
    got = forward_and_backward(model.to(gpu), clip.to(gpu), target.to(gpu))
    only_reference(monkeypatch)
    want = forward_and_backward(model.cpu().double(), clip.double(), target.double())
    assert_close(got, want, GPU_TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", SCANS)
def test_models_run_under_autocast(gpu, name):
    model, clip, target = make_model(name)
    with torch.autocast("cuda", torch.bfloat16):
        got = forward_and_backward(model.to(gpu), clip.to(gpu), target.to(gpu))
    assert all(value.isfinite().all() for value in got.values())
