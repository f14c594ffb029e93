"""One stage of STFP: separable convolution, layer norm over the channels, ReLU."""

import ctypes
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import count_flops
from .kernels import load_cpu, load_gpu
from .kernels.choice import check_shapes, state_dtype, takes
from .kernels.load_cpu import library, pointer

MOST_CHANNELS = 8  # that the GPU kernels take: they keep all channels of a pixel in registers


def conv_norm_relu(
    x: Tensor,
    depthwise: tuple[Tensor, Tensor] | None,
    pointwise: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    """`ReLU(LN(PW(DW(x)))) + residual`; the norm is over the channels at each position, in float32 or float64.

    One kernel on the CPU, and on GPUs for up to 8 channels; PyTorch's operations elsewhere.

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
    limit = f"its kernels take up to {MOST_CHANNELS} channels, not {channels}" if channels > MOST_CHANNELS else None
    taken = takes("a stage of STFP", x, residual, *parameters, gpu_limit=limit)
    if taken and (residual is None or residual.dtype == x.dtype):
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


@torch.library.custom_op("etmamba_timm::conv_norm_relu", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(x: Tensor, residual: Tensor | None, parameters: Tensor, depthwise: bool, eps: float) -> Tensor:
    """x and residual [B, C, T, H, W], contiguous; all parameters flattened into one vector, in the order above."""
    out = torch.empty_like(x)
    _kernel(x, parameters, depthwise, eps).forward(out, residual)
    return out


@_forward.register_fake
def _(x, residual, parameters, depthwise, eps):
    return torch.empty_like(x)


@torch.library.custom_op("etmamba_timm::conv_norm_relu_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(
    dout: Tensor, x: Tensor, parameters: Tensor, depthwise: bool, eps: float, needs_dx: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x (empty unless it is needed) and of the parameters."""
    dx = torch.empty_like(x) if needs_dx else None
    dparameters = _kernel(x, parameters, depthwise, eps).backward(dout.contiguous(), dx)
    return x.new_empty(0) if dx is None else dx, dparameters


@_backward.register_fake
def _(dout, x, parameters, depthwise, eps, needs_dx):
    return torch.empty_like(x) if needs_dx else x.new_empty(0), torch.empty_like(parameters)


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


def _kernel(x: Tensor, parameters: Tensor, depthwise: bool, eps: float) -> "_Cpu | _Gpu":
    return (_Gpu if load_gpu.on_gpu(x) else _Cpu)(x, parameters, depthwise, eps)


class _CpuArgs(ctypes.Structure):  # must match kernels/cpu/conv_norm_relu.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "frames", "height", "width")),
        *((name, ctypes.c_int64) for name in ("depthwise", "threads")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "out", "parameters", "dout", "dv", "dparameters")),
    ]


class _Cpu:
    """Calls of the CPU kernel."""

    def __init__(self, x: Tensor, parameters: Tensor, depthwise: bool, eps: float) -> None:
        self.x, self.parameters, self.depthwise, self.eps = x, parameters, depthwise, eps

    def run(self, what: int, x: Tensor, parameters: Tensor, **tensors: Tensor | None) -> None:
        args = _CpuArgs(*x.shape, 3 if self.depthwise else 1, torch.get_num_threads(), self.eps)
        args.x, args.parameters = x.data_ptr(), parameters.data_ptr()
        for name, tensor in tensors.items():
            setattr(args, name, pointer(tensor))
        library().etmamba_conv_norm_relu(ctypes.byref(args), load_cpu.DTYPES[x.dtype], what)

    def forward(self, out: Tensor, residual: Tensor | None) -> None:
        self.run(0, self.x, self.parameters, residual=residual, out=out)

    def backward(self, dout: Tensor, dx: Tensor | None) -> Tensor:
        """Fills dx, if it is needed, and returns the parameters' gradients."""
        batch, channels, frames, height, _ = self.x.shape
        # The depthwise convolution's output has a gradient of its own; without the convolution it is dx.
        dv = torch.empty_like(self.x) if dx is None or self.depthwise else dx
        tasks = batch * frames * -(-height // library().etmamba_conv_norm_relu_rows())
        sums = self.parameters.new_empty(tasks, len(self.parameters))  # each task has its own
        self.run(1, self.x, self.parameters, dout=dout, dv=dv, dparameters=sums)
        if self.depthwise and dx is not None:
            self.run(2, dv, self.parameters[: 27 * channels].view(-1, 27).flip(1), out=dx)
        return sums.sum(0)


class _GpuArgs(ctypes.Structure):  # must match kernels/gpu/conv_norm_relu.cu
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("frames", "height", "width", "across", "down", "stretch")),
        *((name, ctypes.c_void_p) for name in ("parameters", "x", "residual", "out", "dout", "dv", "dx", "sums")),
        ("eps", ctypes.c_float),
    ]


class _Gpu:
    """Launches of the GPU kernels."""

    def __init__(self, x: Tensor, parameters: Tensor, depthwise: bool, eps: float) -> None:
        self.x, self.parameters, self.depthwise = x, parameters, depthwise
        self.args = _GpuArgs(*x.shape[2:], eps=eps, parameters=parameters.data_ptr(), x=x.data_ptr())

    def module(self, *tensors: Tensor | None) -> load_gpu.Module:
        aligned = all(t is None or load_gpu.in_quads(t) for t in (self.x, *tensors))
        return load_gpu.module(
            "conv_norm_relu.cu",
            self.x,
            DTYPE=load_gpu.DTYPES[self.x.dtype],
            ALIGNED=int(aligned),
            CHANNELS=self.x.shape[1],
            DEPTHWISE=int(self.depthwise),
        )

    def blocks(self, module: load_gpu.Module, kernel: str) -> int:
        """The blocks for each clip (or each channel of it, if a block has one); tells the kernel what each has."""
        threads, _, at_once, rows, across, tile = module.config(kernel)
        batch, _, frames, height, width = self.x.shape
        quads, lines = -(-width // 4), -(-height // rows)  # what the threads of a tile have, across and down
        across = _even(quads, across)
        down = _even(lines, min(threads // across, (tile // (across + 2) - 2) // rows))
        tiles = -(-quads // across) * -(-lines // down)
        room = at_once * load_gpu.processors(self.x.device)
        stretch = load_gpu.stretch(frames, tiles * batch, room, 2 * self.depthwise)
        self.args.across, self.args.down, self.args.stretch = across, down, stretch
        return tiles * -(-frames // stretch)

    def forward(self, out: Tensor, residual: Tensor | None) -> None:
        module = self.module(out, residual)
        self.args.out, self.args.residual = out.data_ptr(), pointer(residual)
        blocks = len(out) * self.blocks(module, "conv_norm_relu")
        module.launch("conv_norm_relu", (blocks, 1, 1), self.args)

    def backward(self, dout: Tensor, dx: Tensor | None) -> Tensor:
        """Fills dx, if it is needed, and returns the parameters' gradients."""
        batch, channels = self.x.shape[:2]
        # The depthwise convolution's output has a gradient of its own; without the convolution it is dx.
        dv = torch.empty_like(self.x) if self.depthwise else dx
        module = self.module(dout, dx, dv)
        self.args.dout, self.args.dx, self.args.dv = dout.data_ptr(), pointer(dx), pointer(dv)
        taps = 27 * channels * self.depthwise
        sums = self.sums(batch * self.blocks(module, "conv_norm_relu_backward"), len(self.parameters) - taps)
        module.launch("conv_norm_relu_backward", (len(sums), 1, 1), self.args)
        if not self.depthwise:
            return sums.sum(0)
        tap_sums = self.sums(batch * self.blocks(module, "depthwise_backward"), taps)
        module.launch("depthwise_backward", (len(tap_sums) * channels, 1, 1), self.args)
        return torch.cat([tap_sums.sum(0), sums.sum(0)])

    def sums(self, blocks: int, parameters: int) -> Tensor:
        """Room for the parameters' gradients of each block."""
        sums = self.parameters.new_empty(blocks, parameters)
        self.args.sums = sums.data_ptr()
        return sums


def _even(count: int, most: int) -> int:
    """The size of parts of at most `most`, as few and as even as they can be."""
    return -(-count // max(-(-count // most), 1)) or 1
