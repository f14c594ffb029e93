"""Mamba's short convolution: causal and depthwise along the time steps, then SiLU."""

import ctypes
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import count_flops
from .kernels import load_cpu, load_gpu
from .kernels.choice import check_shapes, state_dtype, takes
from .kernels.load_cpu import Strided, library, pointer, strided


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
        _Gpu(x, weight, bias, reverse).forward(out)
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
    kernel = (_Gpu if load_gpu.on_gpu(x) else _Cpu)(x, weight, bias, reverse)
    kernel.backward(dout, dx, dweight, None if bias is None else dbias)
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


class _Gpu:
    """Launches of the GPU kernels."""

    START = 2  # what a stretch costs before its first step, in chunks of steps

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> None:
        self.x, self.weight = x, weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        directions, batch, length, width = x.shape
        self.args = _GpuArgs(directions, batch, width, length, reverse, x=strided(x.mT))
        self.args.weight, self.args.bias = self.weight.data_ptr(), pointer(self.bias)
        self.args.weight_dtype = load_gpu.DTYPES[weight.dtype]
        self.args.bias_dtype = 0 if bias is None else load_gpu.DTYPES[bias.dtype]

    def module(self, *tensors: Tensor) -> load_gpu.Module:
        sixteen_bytes = 16 // self.x.itemsize
        aligned = all(load_gpu.in_groups(t, sixteen_bytes) for t in (self.x, *tensors))
        aligned &= all(p is None or p.data_ptr() % (4 * p.itemsize) == 0 for p in (self.weight, self.bias))
        return load_gpu.module(
            "short_conv.cu",
            self.x,
            DTYPE=load_gpu.DTYPES[self.x.dtype],
            ALIGNED=int(aligned),
            TAPS=self.weight.shape[-1],
        )

    def cut(self, walks: int, room: int, chunk: int) -> int:
        """Cuts each of `walks` rows of steps into stretches, `room` of which run at once on a multiprocessor.

        Returns: the number of stretches of all rows.
        """
        length = self.x.shape[2]
        room *= load_gpu.processors(self.x.device)
        self.args.steps = chunk * load_gpu.stretch(max(-(-length // chunk), 1), walks, room, self.START)
        return walks * -(-length // self.args.steps)

    def forward(self, out: Tensor) -> None:
        module = self.module(out)
        threads, _, at_once, chunk, channels = module.config("short_conv")
        directions, batch, _, width = out.shape
        self.args.out = strided(out.mT)
        stretches = self.cut(directions * batch * -(-width // channels), at_once * threads, chunk)
        module.launch("short_conv", (-(-stretches // threads), 1, 1), self.args)

    def backward(self, dout: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor | None) -> None:
        module = self.module(dout, dx)
        threads, _, at_once, chunk, channels, lanes = module.config("short_conv_backward")
        directions, batch, _, width = dx.shape
        quads, rows, walks = -(-width // channels), directions * batch, threads // lanes
        across = -(-quads // lanes)  # blocks
        stretches = self.cut(across * rows, at_once * walks, chunk) // max(across, 1)
        self.args.blocks = blocks = -(-stretches // walks)
        taps = self.weight.shape[-1]
        sums = dx.new_empty(blocks, taps + 1, channels * quads, dtype=torch.float32)
        self.args.dout, self.args.dx, self.args.sums = strided(dout.mT), strided(dx.mT), sums.data_ptr()
        self.args.dweight, self.args.dbias = dweight.data_ptr(), pointer(dbias)
        module.launch("short_conv_backward", (across, blocks, 1), self.args)
        _, _, summed = module.config("short_conv_sum")
        module.launch("short_conv_sum", (-(-width // summed), taps + (dbias is not None), 1), self.args)
