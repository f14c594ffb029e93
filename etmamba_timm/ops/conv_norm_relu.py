"""One stage of STFP: separable convolution, layer norm over the channels, ReLU."""

import ctypes
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import count_flops
from .kernels.choice import check_shapes, state_dtype, takes
from .kernels.load_cpu import DTYPES, library, pointer


def conv_norm_relu(
    x: Tensor,
    depthwise: tuple[Tensor, Tensor] | None,
    pointwise: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    """`ReLU(LN(PW(DW(x)))) + residual`; the norm is over the channels at each position, in float32 or float64.

    One kernel on the CPU; PyTorch's operations elsewhere.

    Args:
        x: clip [B, C, T, H, W].
        depthwise: weight [C, 1, 3, 3, 3] and bias [C] of a convolution with zero padding 1; or None.
        pointwise: weight [C, C, 1, 1, 1] and bias [C].
        norm: weight and bias [C].
        residual: the same shape as x; or None.

    Returns: [B, C, T, H, W].

    Raises:
        ValueError: mismatched shapes.
    """
    channels = x.shape[1]
    row = (channels,)
    if depthwise is not None:
        weight, bias = depthwise
        check_shapes(("depthwise weight", weight, (channels, 1, 3, 3, 3)), ("depthwise bias", bias, row))
    check_shapes(
        ("pointwise weight", pointwise[0], (channels, channels, 1, 1, 1)),
        ("pointwise bias", pointwise[1], row),
        ("norm weight", norm[0], row),
        ("norm bias", norm[1], row),
        ("residual", residual, tuple(x.shape)),
    )
    parameters = (*(depthwise or ()), *pointwise, *norm)
    if takes("a stage of STFP", x, residual, *parameters) and (residual is None or residual.dtype == x.dtype):
        flat = torch.cat([p.flatten() for p in parameters]).to(state_dtype(x.dtype))
        if residual is not None:
            residual = residual.contiguous()
        return _forward(x.contiguous(), residual, flat, depthwise is not None, eps)
    return _plain(x, depthwise, pointwise, norm, eps, residual)


def _plain(
    x: Tensor,
    depthwise: tuple[Tensor, Tensor] | None,
    pointwise: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    y = x if depthwise is None else F.conv3d(x, *depthwise, padding=1, groups=x.shape[1])
    y = F.relu(_channel_norm(F.conv3d(y, *pointwise), *norm, eps))
    return y if residual is None else y + residual


def _channel_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # With few channels whole-tensor operations are faster than layer_norm over rows of 3.
    dtype, x = x.dtype, x.to(state_dtype(x.dtype))
    centred = x - x.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    shape = (-1, 1, 1, 1)
    return (centred * scale * weight.view(shape) + bias.view(shape)).to(dtype)


class _Args(ctypes.Structure):  # must match kernels/cpu/conv_norm_relu.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "frames", "height", "width")),
        *((name, ctypes.c_int64) for name in ("depthwise", "threads")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "out", "parameters", "dout", "dv", "dparameters")),
    ]


def _run(what: int, x: Tensor, parameters: Tensor, depthwise: bool, eps: float, **tensors: Tensor | None) -> None:
    args = _Args(*x.shape, 3 if depthwise else 1, torch.get_num_threads(), eps)
    args.x, args.parameters = x.data_ptr(), parameters.data_ptr()
    for name, tensor in tensors.items():
        setattr(args, name, pointer(tensor))
    library().etmamba_conv_norm_relu(ctypes.byref(args), DTYPES[x.dtype], what)


@torch.library.custom_op("etmamba_timm::conv_norm_relu", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, residual: Tensor | None, parameters: Tensor, depthwise: bool, eps: float) -> Tensor:
    """x and residual [B, C, T, H, W], contiguous; all parameters flattened into one vector, in the order above."""
    out = torch.empty_like(x)
    _run(0, x, parameters, depthwise, eps, residual=residual, out=out)
    return out


@_forward.register_fake
def _(x, residual, parameters, depthwise, eps):
    return torch.empty_like(x)


@torch.library.custom_op("etmamba_timm::conv_norm_relu_backward", mutates_args=(), device_types="cpu")
def _backward(
    dout: Tensor, x: Tensor, parameters: Tensor, depthwise: bool, eps: float, needs_dx: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x (empty unless it is needed) and of the parameters."""
    dout = dout.contiguous()
    batch, _, frames, height, _ = x.shape
    dv = torch.empty_like(x)  # of the depthwise convolution's output
    dparameters = parameters.new_empty(batch * frames * -(-height // _rows()), len(parameters))
    _run(1, x, parameters, depthwise, eps, dout=dout, dv=dv, dparameters=dparameters)
    dparameters = dparameters.sum(0)
    if not needs_dx:
        return x.new_empty(0), dparameters
    if not depthwise:
        return dv, dparameters
    dx = torch.empty_like(x)
    flipped = parameters[: 27 * x.shape[1]].view(-1, 27).flip(1)
    _run(2, dv, flipped, depthwise, eps, out=dx)
    return dx, dparameters


@_backward.register_fake
def _(dout, x, parameters, depthwise, eps, needs_dx):
    return torch.empty_like(x) if needs_dx else x.new_empty(0), torch.empty_like(parameters)


def _rows() -> int:
    """Rows of pixels in a task; each task sums the parameters' gradients on its own."""
    return library().etmamba_conv_norm_relu_rows()


def _setup_context(ctx, inputs, output) -> None:
    x, residual, parameters, ctx.depthwise, ctx.eps = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, parameters)


def _autograd(ctx, dout):
    needs_dx = ctx.needs_input_grad[0]
    dx, dparameters = _backward(dout, *ctx.saved_tensors, ctx.depthwise, ctx.eps, needs_dx)
    return dx if needs_dx else None, dout if ctx.has_residual else None, dparameters, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _flops(x: torch.Size, depthwise: bool, **others) -> int:
    return 2 * prod(x) * (x[1] + 27 * depthwise)


count_flops("conv_norm_relu", _flops)
