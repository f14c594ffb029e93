"""Mamba's short convolution: causal and depthwise along the time steps, then SiLU."""

import ctypes
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import count_flops
from .kernels.library import DTYPES, Strided, check_shapes, library, state_dtype, strided, takes


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, reverse: bool = False) -> Tensor:
    """`SiLU(conv(x))`, where a step sees itself and the K - 1 steps before it (after it in reverse).

    One kernel on the CPU, for any strides, with sums in float32 or float64; PyTorch's convolution elsewhere.

    Args:
        x: [B, N, E]; or [2, B, N, E] for both directions, forwards and backwards, with shared weights.
        weight: [E, 1, K], the last tap on the step itself.
        bias: [E].
        reverse: whether x [B, N, E] is convolved from the last step to the first.

    Returns: the same shape and dtype as x, contiguous.

    Raises:
        ValueError: mismatched shapes.
    """
    if x.ndim != 3 and (x.ndim != 4 or x.shape[0] != 2):
        raise ValueError(f"x is {tuple(x.shape)}; it must be [B, N, E], or [2, B, N, E] for both directions")
    width = x.shape[-1]
    check_shapes(("weight", weight, (width, 1, weight.shape[-1])), ("bias", bias, (width,)))
    if not takes(x, weight, bias):
        return _plain(x, weight, bias, reverse)
    dtype = state_dtype(x.dtype)
    taps = weight[:, 0].t().to(dtype)  # [E, 1, K] -> [K, E]
    bias = taps.new_zeros(x.shape[-1]) if bias is None else bias.to(dtype)
    out = _forward(x if x.ndim == 4 else x.unsqueeze(0), taps.contiguous(), bias, reverse)
    return out if x.ndim == 4 else out[0]


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    if x.ndim == 4:
        return torch.stack([_plain(row, weight, bias, back) for row, back in zip(x, (False, True), strict=True)])
    reach = weight.shape[-1] - 1
    x = F.pad(x.mT, (0, reach) if reverse else (reach, 0))  # [B, N, E] -> [B, E, N + reach]
    return F.silu(F.conv1d(x, weight.flip(-1) if reverse else weight, bias, groups=len(weight)).mT)


class _Args(ctypes.Structure):  # must match kernels/cpu/short_conv.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("directions", "batch", "width", "length", "taps", "reverse", "threads")),
        *((name, Strided) for name in ("x", "out", "dout", "dx")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "dweight")),
    ]


def _arguments(x: Tensor, taps: Tensor, bias: Tensor, reverse: bool) -> _Args:
    directions, batch, length, width = x.shape
    args = _Args(directions, batch, width, length, len(taps), reverse, torch.get_num_threads(), x=strided(x.mT))
    args.weight, args.bias = taps.data_ptr(), bias.data_ptr()
    return args


@torch.library.custom_op("etmamba_timm::cpu_short_conv", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, taps: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """x [G, B, N, E], taps [K, E], bias [E] -> [G, B, N, E]; the second of two directions runs backwards."""
    out = x.new_empty(x.shape)
    args = _arguments(x, taps, bias, reverse)
    args.out = strided(out.mT)
    library().etmamba_short_conv(ctypes.byref(args), DTYPES[x.dtype], False)
    return out


@_forward.register_fake
def _(x, taps, bias, reverse):
    return x.new_empty(x.shape)


@torch.library.custom_op("etmamba_timm::cpu_short_conv_backward", mutates_args=(), device_types="cpu")
def _backward(dout: Tensor, x: Tensor, taps: Tensor, bias: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    args = _arguments(x, taps, bias, reverse)
    segments = library().etmamba_short_conv_segments(ctypes.c_int64(x.shape[2]))
    dx = x.new_empty(x.shape)
    dweight = taps.new_empty(x.shape[0] * x.shape[1] * segments, len(taps) + 1, x.shape[3])
    args.dout, args.dx, args.dweight = strided(dout.mT), strided(dx.mT), dweight.data_ptr()
    library().etmamba_short_conv(ctypes.byref(args), DTYPES[x.dtype], True)
    dweight = dweight.sum(0)
    return dx, dweight[:-1].clone(), dweight[-1].clone()


@_backward.register_fake
def _(dout, x, taps, bias, reverse):
    return x.new_empty(x.shape), torch.empty_like(taps), torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dout):
    return (*_backward(dout, *ctx.saved_tensors, ctx.reverse), None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _flops(x: torch.Size, taps: torch.Size, **others) -> int:
    return 2 * prod(x) * taps[0]


count_flops("cpu_short_conv", _flops)
