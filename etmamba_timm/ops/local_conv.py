"""The convolutions of STCM's local branch: depthwise, dilated, at three scales, within each frame."""

import ctypes
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import count_flops
from .kernels.choice import check_shapes, state_dtype, takes
from .kernels.load_cpu import DTYPES, Strided, library, strided

SIDES = (3, 5, 7)  # of the kernels, dilated by 1, 2 and 3


def local_conv(
    x: Tensor, residual: Tensor, weights: list[Tensor], biases: list[Tensor], grid: tuple[int, int, int]
) -> Tensor:
    """`residual + SiLU(concat(DC3(x), DC5(x), DC7(x), x))` for patch tokens; the class token's residual is unchanged.

    One kernel on the CPU, for any strides, with sums in float32 or float64; PyTorch's convolutions elsewhere.

    Args:
        x: tokens [B, 1 + t·h·w, C], class token first.
        residual: tokens [B, 1 + t·h·w, 4C].
        weights: [C, 1, k, k] for k in 3, 5, 7.
        biases: three of [C].
        grid: (t, h, w).

    Returns: [B, 1 + t·h·w, 4C], in residual's dtype, float16 and bfloat16 promoted to float32.

    Raises:
        ValueError: mismatched shapes.

    Source: paper 3.4.
    """
    (batch, tokens, channels), (t, h, w) = x.shape, grid
    check_shapes(
        ("x", x, (batch, 1 + t * h * w, channels)),
        ("residual", residual, (batch, tokens, 4 * channels)),
        *((f"weights[{i}]", weights[i], (channels, 1, side, side)) for i, side in enumerate(SIDES)),
        *((f"biases[{i}]", biases[i], (channels,)) for i in range(len(SIDES))),
    )
    dtype = state_dtype(residual.dtype)
    residual = residual.to(dtype)
    if takes("the local branch", x, residual, *weights, *biases) and state_dtype(x.dtype) == dtype:
        taps = torch.cat([w.flatten(1) for w in weights], 1).t().to(dtype)  # [83, C]
        return _forward(x, residual, taps.contiguous(), torch.stack(biases).to(dtype), t, h, w)
    return _plain(x, residual, weights, biases, grid)


def _plain(
    x: Tensor, residual: Tensor, weights: list[Tensor], biases: list[Tensor], grid: tuple[int, int, int]
) -> Tensor:
    t, h, w = grid
    frames = x[:, 1:].unflatten(1, (t, h * w)).flatten(0, 1).mT.unflatten(2, (h, w))  # [B·t, C, h, w]
    scales = [
        F.conv2d(frames, weight, bias, padding=side // 2 * (i + 1), dilation=i + 1, groups=frames.shape[1])
        for i, (side, weight, bias) in enumerate(zip(SIDES, weights, biases, strict=True))
    ]
    local = F.silu(torch.cat([*scales, frames], dim=1)).flatten(2).mT.unflatten(0, (-1, t)).flatten(1, 2)
    return torch.cat([residual[:, :1], local + residual[:, 1:]], dim=1)


class _Args(ctypes.Structure):  # must match kernels/cpu/local_conv.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("frames_each", "frames", "height", "width", "channels", "groups")),
        ("threads", ctypes.c_int64),
        *((name, Strided) for name in ("x", "residual", "out", "dout", "dx")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "dweight")),
    ]


def _arguments(x: Tensor, taps: Tensor, biases: Tensor, t: int, h: int, w: int) -> _Args:
    threads = torch.get_num_threads()
    frames = x.shape[0] * t
    args = _Args(t, frames, h, w, x.shape[2], min(frames, 2 * threads), threads, x=_tokens(x))
    args.weight, args.bias = taps.data_ptr(), biases.data_ptr()
    return args


def _tokens(x: Tensor) -> Strided:
    return strided(x.mT.unsqueeze(0))  # [B, N, C] -> [1, B, C, N]


@torch.library.custom_op("etmamba_timm::local_conv", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, residual: Tensor, taps: Tensor, biases: Tensor, t: int, h: int, w: int) -> Tensor:
    out = residual.new_empty(residual.shape)
    out[:, 0] = residual[:, 0]
    args = _arguments(x, taps, biases, t, h, w)
    args.residual, args.out = _tokens(residual), _tokens(out)
    library().etmamba_local_conv(ctypes.byref(args), DTYPES[x.dtype], False)
    return out


@_forward.register_fake
def _(x, residual, taps, biases, t, h, w):
    return residual.new_empty(residual.shape)


@torch.library.custom_op("etmamba_timm::local_conv_backward", mutates_args=(), device_types="cpu")
def _backward(
    dout: Tensor, x: Tensor, taps: Tensor, biases: Tensor, t: int, h: int, w: int
) -> tuple[Tensor, Tensor, Tensor]:
    args = _arguments(x, taps, biases, t, h, w)
    dx = x.new_empty(x.shape)
    dx[:, 0] = 0
    dweight = taps.new_empty(args.groups, len(taps) + len(biases), taps.shape[1])
    args.dout, args.dx, args.dweight = _tokens(dout), _tokens(dx), dweight.data_ptr()
    library().etmamba_local_conv(ctypes.byref(args), DTYPES[x.dtype], True)
    dweight = dweight.sum(0)
    return dx, dweight[: len(taps)].clone(), dweight[len(taps) :].clone()


@_backward.register_fake
def _(dout, x, taps, biases, t, h, w):
    return x.new_empty(x.shape), torch.empty_like(taps), torch.empty_like(biases)


def _setup_context(ctx, inputs, output) -> None:
    x, _, taps, biases, *ctx.grid = inputs
    ctx.save_for_backward(x, taps, biases)


def _autograd(ctx, dout):
    dx, dtaps, dbiases = _backward(dout, *ctx.saved_tensors, *ctx.grid)
    return dx, dout, dtaps, dbiases, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _flops(x: torch.Size, taps: torch.Size, t: int, h: int, w: int, **others) -> int:
    return 2 * x[0] * t * h * w * prod(taps)


count_flops("local_conv", _flops)
