"""Mamba's short convolution: causal and depthwise along the time steps, then SiLU."""

import ctypes
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import count_flops
from .kernels import load_cpu, load_gpu
from .kernels.choice import check_shapes, state_dtype, takes
from .kernels.load_cpu import Strided, library, strided


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, reverse: bool = False) -> Tensor:
    """`SiLU(conv(x))`, where a step sees itself and the K - 1 steps before it (after it in reverse).

    One kernel on CPUs and GPUs, for any strides, with sums in float32 or float64; PyTorch's convolution elsewhere.

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
    if not takes("the short convolution", x, weight, bias):
        return _plain(x, weight, bias, reverse)
    out = _forward(x if x.ndim == 4 else x.unsqueeze(0), weight, bias, reverse)
    return out if x.ndim == 4 else out[0]


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """Tap by tap, which needs no other layout, as a convolution would."""
    if x.ndim == 4:
        return torch.stack([_plain(row, weight, bias, back) for row, back in zip(x, (False, True), strict=True)])
    dtype, steps = state_dtype(x.dtype), x.shape[1]
    taps = weight.to(dtype).squeeze(1).unbind(-1)
    padding = (0, len(taps) - 1) if reverse else (len(taps) - 1, 0)
    padded = F.pad(x.to(dtype), (0, 0, *padding))  # [B, N + K - 1, E]
    terms = [tap * padded[:, i : i + steps] for i, tap in enumerate(taps[::-1] if reverse else taps)]
    out = sum(terms[1:], terms[0])
    return F.silu(out if bias is None else out + bias.to(dtype)).to(x.dtype)


@torch.library.custom_op("etmamba_timm::short_conv", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """x [G, B, N, E], weight [E, 1, K], bias [E] -> [G, B, N, E]; the second of two directions runs backwards."""
    out = x.new_empty(x.shape)
    if load_gpu.on_gpu(x):
        load_gpu.run(_plan, _given(x, weight, bias), {"out": out}, reverse)
    else:
        _Cpu(x, weight, bias, reverse).forward(out)
    return out


@_forward.register_fake
def _(x, weight, bias, reverse):
    return x.new_empty(x.shape)


@torch.library.custom_op("etmamba_timm::short_conv_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; the last is empty without a bias."""
    dx = x.new_empty(x.shape)
    backward = _backward_on_gpu if load_gpu.on_gpu(x) else _backward_on_cpu
    sums = backward(dout, x, weight, bias, reverse, dx)  # [K + 1, E], the last row for the bias
    dweight = sums[:-1].t().contiguous().to(weight.dtype).unsqueeze(1)  # [K, E] -> [E, 1, K]
    return dx, dweight, x.new_empty(0) if bias is None else sums[-1].to(bias.dtype, copy=True)


@_backward.register_fake
def _(dout, x, weight, bias, reverse):
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dout):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward(dout, x, weight, bias, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _flops(x: torch.Size, weight: torch.Size, **others) -> int:
    return 2 * prod(x) * weight[-1]


count_flops("short_conv", _flops)


class _CpuArgs(ctypes.Structure):  # must match kernels/cpu/short_conv.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("directions", "batch", "width", "length", "taps", "reverse", "threads")),
        *((name, Strided) for name in ("x", "out", "dout", "dx")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "dweight")),
    ]


class _Cpu:
    """Calls of the CPU kernel."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> None:
        directions, batch, length, width = x.shape
        dtype = state_dtype(x.dtype)
        self.dtype = load_cpu.DTYPES[x.dtype]
        self.taps = weight[:, 0].t().to(dtype).contiguous()  # [E, 1, K] -> [K, E]
        self.bias = self.taps.new_zeros(width) if bias is None else bias.to(dtype).contiguous()
        threads = torch.get_num_threads()
        self.args = _CpuArgs(directions, batch, width, length, len(self.taps), reverse, threads, x=strided(x.mT))
        self.args.weight, self.args.bias = self.taps.data_ptr(), self.bias.data_ptr()

    def forward(self, out: Tensor) -> None:
        self.args.out = strided(out.mT)
        library().etmamba_short_conv(ctypes.byref(self.args), self.dtype, False)

    def backward(self, dout: Tensor, dx: Tensor) -> Tensor:
        directions, batch, length, width = dx.shape
        segments = library().etmamba_short_conv_segments(ctypes.c_int64(length))
        dweight = self.taps.new_empty(directions * batch * segments, len(self.taps) + 1, width)
        self.args.dout, self.args.dx, self.args.dweight = strided(dout.mT), strided(dx.mT), dweight.data_ptr()
        library().etmamba_short_conv(ctypes.byref(self.args), self.dtype, True)
        return dweight.sum(0)


def _backward_on_cpu(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, dx: Tensor) -> Tensor:
    return _Cpu(x, weight, bias, reverse).backward(dout, dx)


class _GpuArgs(ctypes.Structure):  # must match kernels/gpu/short_conv.cu
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("directions", "batch", "width", "length", "reverse", "parts")),
        *((name, Strided) for name in ("x", "out", "dout", "dx")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("weight_dtype", "bias_dtype")),
        ("dweight", ctypes.c_void_p),
    ]


def _given(x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
    return {"x": x, "weight": weight.contiguous(), "bias": None if bias is None else bias.contiguous()}


def _backward_on_gpu(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, dx: Tensor) -> Tensor:
    width = x.shape[-1]
    sums = x.new_zeros(weight.shape[-1] + 1, -(-width // 4) * 4, dtype=torch.float32)
    given = {**_given(x, weight, bias), "dout": dout}
    load_gpu.run(_backward_plan, given, {"dx": dx, "dweight": sums}, reverse)
    return sums[:, :width]


def _gpu(
    reverse: bool, x: Tensor, weight: Tensor, bias: Tensor | None, **others: Tensor
) -> tuple[load_gpu.Module, _GpuArgs]:
    sequences = {"x": x, **others}
    directions, batch, length, width = x.shape
    args = _GpuArgs(directions, batch, width, length, reverse, **{name: strided(t.mT) for name, t in sequences.items()})
    args.weight_dtype = load_gpu.DTYPES[weight.dtype]
    args.bias_dtype = 0 if bias is None else load_gpu.DTYPES[bias.dtype]
    aligned = int(all(load_gpu.in_quads(t) for t in sequences.values()))
    taps = weight.shape[-1]
    return load_gpu.module("short_conv.cu", x, DTYPE=load_gpu.DTYPES[x.dtype], ALIGNED=aligned, TAPS=taps), args


def _plan(reverse: bool, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> load_gpu.Plan:
    module, args = _gpu(reverse, x, weight, bias, out=out)
    threads, _, steps = module.config("short_conv")
    directions, batch, length, width = x.shape
    total = directions * batch * -(-length // steps) * -(-width // 4)
    return load_gpu.Plan(args, [(module, "short_conv", (-(-total // threads), 1, 1))])


def _backward_plan(
    reverse: bool, x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, dx: Tensor, dweight: Tensor
) -> load_gpu.Plan:
    module, args = _gpu(reverse, x, weight, bias, dout=dout, dx=dx)
    threads, _, steps = module.config("short_conv_backward")
    directions, batch, length, width = x.shape
    quads, segments = -(-width // 4), directions * batch * -(-length // steps)
    args.parts = parts = min(segments, -(-load_gpu.threads_at_once(x.device) // quads))
    return load_gpu.Plan(args, [(module, "short_conv_backward", (-(-quads * parts // threads), 1, 1))])
