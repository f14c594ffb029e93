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
    dweight = weight.new_empty(weight.shape)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    if load_gpu.on_gpu(x):
        made = {"dx": dx, "dweight": dweight, "dbias": dbias}
        load_gpu.run(_backward_plan, {**_given(x, weight, bias), "dout": dout}, made, reverse)
    else:
        _Cpu(x, weight, bias, reverse).backward(dout, dx, dweight, None if bias is None else dbias)
    return dx, dweight, dbias


@_backward.register_fake
def _(dout, x, weight, bias, reverse):
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
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

    def backward(self, dout: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor | None) -> None:
        directions, batch, length, width = dx.shape
        segments = library().etmamba_short_conv_segments(ctypes.c_int64(length))
        sums = self.taps.new_empty(directions * batch * segments, len(self.taps) + 1, width)
        self.args.dout, self.args.dx, self.args.dweight = strided(dout.mT), strided(dx.mT), sums.data_ptr()
        library().etmamba_short_conv(ctypes.byref(self.args), self.dtype, True)
        total = sums.sum(0)  # [K + 1, E], the last row for the bias
        dweight.copy_(total[:-1].t().unsqueeze(1))  # [K, E] -> [E, 1, K]
        if dbias is not None:
            dbias.copy_(total[-1])


class _GpuArgs(ctypes.Structure):  # must match kernels/gpu/short_conv.cu
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("directions", "batch", "width", "length", "reverse", "steps", "blocks")),
        *((name, Strided) for name in ("x", "out", "dout", "dx")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "dweight", "dbias")),
        *((name, ctypes.c_int64) for name in ("weight_dtype", "bias_dtype")),
        ("sums", ctypes.c_void_p),
    ]


START = 2  # what a stretch costs before its first step, in chunks of steps


def _given(x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
    return {"x": x, "weight": weight.contiguous(), "bias": None if bias is None else bias.contiguous()}


def _gpu(
    reverse: bool, x: Tensor, weight: Tensor, bias: Tensor | None, **others: Tensor
) -> tuple[load_gpu.Module, _GpuArgs]:
    sequences = {"x": x, **others}
    directions, batch, length, width = x.shape
    args = _GpuArgs(directions, batch, width, length, reverse, **{name: strided(t.mT) for name, t in sequences.items()})
    args.weight_dtype = load_gpu.DTYPES[weight.dtype]
    args.bias_dtype = 0 if bias is None else load_gpu.DTYPES[bias.dtype]
    aligned = all(load_gpu.in_groups(t, 16 // x.itemsize) for t in sequences.values())
    aligned &= all(p is None or p.data_ptr() % (4 * p.itemsize) == 0 for p in (weight, bias))
    macros = {"DTYPE": load_gpu.DTYPES[x.dtype], "ALIGNED": int(aligned), "TAPS": weight.shape[-1]}
    return load_gpu.module("short_conv.cu", x, **macros), args


def _cut(args: _GpuArgs, x: Tensor, walks: int, room: int, chunk: int) -> int:
    """Cuts each of `walks` rows of steps into stretches, `room` of which run at once on a multiprocessor.

    Returns: the number of stretches of all rows.
    """
    room *= load_gpu.processors(x.device)
    args.steps = chunk * load_gpu.stretch(max(-(-args.length // chunk), 1), walks, room, START)
    return walks * -(-args.length // args.steps)


def _plan(reverse: bool, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> load_gpu.Plan:
    module, args = _gpu(reverse, x, weight, bias, out=out)
    threads, _, at_once, chunk, channels = module.config("short_conv")
    directions, batch, _, width = x.shape
    stretches = _cut(args, x, directions * batch * -(-width // channels), at_once * threads, chunk)
    return load_gpu.Plan(args, [(module, "short_conv", (-(-stretches // threads), 1, 1))])


def _backward_plan(
    reverse: bool, x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, dx: Tensor, **others: Tensor
) -> load_gpu.Plan:
    module, args = _gpu(reverse, x, weight, bias, dout=dout, dx=dx)
    threads, _, at_once, chunk, channels, lanes = module.config("short_conv_backward")
    directions, batch, _, width = x.shape
    quads, rows, walks = -(-width // channels), directions * batch, threads // lanes
    across = -(-quads // lanes)  # blocks
    stretches = _cut(args, x, across * rows, at_once * walks, chunk) // max(across, 1)
    args.blocks = blocks = -(-stretches // walks)
    taps = weight.shape[-1]
    _, _, summed = module.config("short_conv_sum")
    launches = [
        (module, "short_conv_backward", (across, blocks, 1)),
        (module, "short_conv_sum", (-(-width // summed), taps + (bias is not None), 1)),
    ]
    return load_gpu.Plan(args, launches, scratch={"sums": blocks * (taps + 1) * channels * quads})
