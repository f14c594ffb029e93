"""The convolutions of STCM's local branch: depthwise, dilated, at three scales, within each frame."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import count_flops
from .kernels import load_cpu, load_gpu
from .kernels.choice import check_shapes, state_dtype, takes
from .kernels.load_cpu import Strided, library, strided

SIDES = (3, 5, 7)  # of the kernels, dilated by 1, 2 and 3
TAPS = sum(side**2 for side in SIDES)


def local_conv(
    x: Tensor, residual: Tensor, weights: list[Tensor], biases: list[Tensor], grid: tuple[int, int, int]
) -> Tensor:
    """`residual + SiLU(concat(DC3(x), DC5(x), DC7(x), x))` for patch tokens; the class token's residual is unchanged.

    One kernel on CPUs and GPUs, for any strides, with sums in float32 or float64; PyTorch's convolutions elsewhere.

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
        return _forward(x, residual, *weights, *biases, t, h, w)
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


@torch.library.custom_op("etmamba_timm::local_conv", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(
    x: Tensor,
    residual: Tensor,
    weight3: Tensor,
    weight5: Tensor,
    weight7: Tensor,
    bias3: Tensor,
    bias5: Tensor,
    bias7: Tensor,
    t: int,
    h: int,
    w: int,
) -> Tensor:
    """`local_conv`, with the residual in float32, or float64 for x in float64."""
    out = residual.new_empty(residual.shape)
    kernel = (_Gpu if load_gpu.on_gpu(x) else _Cpu)(x, [weight3, weight5, weight7, bias3, bias5, bias7], t, h, w)
    kernel.forward(residual, out)
    return out


@_forward.register_fake
def _(x, residual, *others):
    return residual.new_empty(residual.shape)


@torch.library.custom_op("etmamba_timm::local_conv_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(
    dout: Tensor,
    x: Tensor,
    weight3: Tensor,
    weight5: Tensor,
    weight7: Tensor,
    bias3: Tensor,
    bias5: Tensor,
    bias7: Tensor,
    t: int,
    h: int,
    w: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, the weights and the biases; that of the residual is dout."""
    dx = x.new_empty(x.shape)
    kernel = (_Gpu if load_gpu.on_gpu(x) else _Cpu)(x, [weight3, weight5, weight7, bias3, bias5, bias7], t, h, w)
    dweight3, dweight5, dweight7, dbias3, dbias5, dbias7 = kernel.backward(dout, dx)
    return dx, dweight3, dweight5, dweight7, dbias3, dbias5, dbias7


@_backward.register_fake
def _(dout, x, *others):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, *others[:-3]))


def _setup_context(ctx, inputs, output) -> None:
    x, _, *parameters, t, h, w = inputs
    ctx.save_for_backward(x, *parameters)
    ctx.grid = t, h, w


def _autograd(ctx, dout):
    dx, *dparameters = _backward(dout, *ctx.saved_tensors, *ctx.grid)
    return dx, dout, *dparameters, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _flops(x: torch.Size, t: int, h: int, w: int, **others) -> int:
    return 2 * x[0] * t * h * w * TAPS * x[2]


count_flops("local_conv", _flops)


def _tokens(x: Tensor) -> Strided:
    return strided(x.mT.unsqueeze(0))  # [B, N, C] -> [1, B, C, N]


class _CpuArgs(ctypes.Structure):  # must match kernels/cpu/local_conv.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("frames_each", "frames", "height", "width", "channels", "groups")),
        ("threads", ctypes.c_int64),
        *((name, Strided) for name in ("x", "residual", "out", "dout", "dx")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "dweight")),
    ]


class _Cpu:
    """Calls of the CPU kernel. The parameters are three weights and three biases."""

    def __init__(self, x: Tensor, parameters: list[Tensor], t: int, h: int, w: int) -> None:
        self.x, self.parameters = x, parameters
        # [C, 1, k, k] -> [83, C], and the biases as three rows more
        self.taps = torch.cat([p.flatten(1) if p.ndim == 4 else p[:, None] for p in parameters], 1).t()
        self.taps = self.taps.to(state_dtype(x.dtype)).contiguous()
        threads = torch.get_num_threads()
        frames = x.shape[0] * t
        self.args = _CpuArgs(t, frames, h, w, x.shape[2], min(frames, 2 * threads), threads, x=_tokens(x))
        self.args.weight, self.args.bias = self.taps.data_ptr(), self.taps[TAPS:].data_ptr()

    def forward(self, residual: Tensor, out: Tensor) -> None:
        out[:, 0] = residual[:, 0]
        self.args.residual, self.args.out = _tokens(residual), _tokens(out)
        library().etmamba_local_conv(ctypes.byref(self.args), load_cpu.DTYPES[self.x.dtype], False)

    def backward(self, dout: Tensor, dx: Tensor) -> list[Tensor]:
        dx[:, 0] = 0
        sums = self.taps.new_empty(self.args.groups, *self.taps.shape)
        self.args.dout, self.args.dx, self.args.dweight = _tokens(dout), _tokens(dx), sums.data_ptr()
        library().etmamba_local_conv(ctypes.byref(self.args), load_cpu.DTYPES[self.x.dtype], True)
        parts = sums.sum(0).split([*(side**2 for side in SIDES), *(1 for _ in SIDES)])  # [k², C] or [1, C] each
        return [p.new_empty(p.shape).copy_(part.t().view_as(p)) for p, part in zip(self.parameters, parts, strict=True)]


class _Parameter(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int64)]


PARAMETERS = ("weight3", "weight5", "weight7", "bias3", "bias5", "bias7")


class _GpuArgs(ctypes.Structure):  # must match kernels/gpu/local_conv.cu
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("frames_each", "height", "channels", "lines", "stretches")),
        *((name, Strided) for name in ("x", "residual", "out", "dout", "dx", "dconv")),
        *((name, _Parameter) for name in (*PARAMETERS, *(f"d{name}" for name in PARAMETERS))),
        ("sums", ctypes.c_void_p),
    ]


class _Gpu:
    """Launches of the GPU kernels. The parameters are three weights and three biases."""

    def __init__(self, x: Tensor, parameters: list[Tensor], t: int, h: int, w: int) -> None:
        self.parameters = {name: p.contiguous() for name, p in zip(PARAMETERS, parameters, strict=True)}
        self.given: dict[str, Tensor | None] = {"x": x, **self.parameters}
        self.grid = t, h, w

    def forward(self, residual: Tensor, out: Tensor) -> None:
        load_gpu.run(_plan, {**self.given, "residual": residual}, {"out": out}, *self.grid)

    def backward(self, dout: Tensor, dx: Tensor) -> list[Tensor]:
        batch, tokens, width = dx.shape
        dconv = dx.new_empty(batch, tokens, 3 * width)
        gradients = {f"d{name}": torch.empty_like(p) for name, p in self.parameters.items()}
        made = {"dx": dx, "dconv": dconv, **gradients}
        load_gpu.run(_backward_plan, {**self.given, "dout": dout}, made, *self.grid)
        return list(gradients.values())


def _gpu(t: int, h: int, w: int, tensors: dict[str, Tensor]) -> tuple[load_gpu.Module, _GpuArgs]:
    x = tensors["x"]
    args = _GpuArgs(t, h, x.shape[2])
    for name, tensor in tensors.items():
        kind = _Parameter(0, load_gpu.DTYPES[tensor.dtype]) if name.endswith(PARAMETERS) else _tokens(tensor)
        setattr(args, name, kind)
    dense = all(
        load_gpu.in_quads(t) and t.is_contiguous() for name, t in tensors.items() if not name.endswith(PARAMETERS)
    )
    channels = x.shape[2] if dense else 0
    return load_gpu.module("local_conv.cu", x, DTYPE=load_gpu.DTYPES[x.dtype], WIDTH=w, DENSE=channels), args


def _blocks(module: load_gpu.Module, kernel: str, args: _GpuArgs, x: Tensor) -> tuple[int, int]:
    """How many blocks take all lines, and how many all channels."""
    _, _, channels, lines, parts = module.config(kernel)
    args.lines = x.shape[0] * args.frames_each * args.height * parts
    return -(-args.lines // lines), -(-args.channels // channels)


def _plan(t: int, h: int, w: int, **tensors: Tensor) -> load_gpu.Plan:
    module, args = _gpu(t, h, w, tensors)
    lines, channels = _blocks(module, "local_conv", args, tensors["x"])
    return load_gpu.Plan(args, [(module, "local_conv", (4 * lines, channels, 1))])


def _backward_plan(t: int, h: int, w: int, **tensors: Tensor) -> load_gpu.Plan:
    module, args = _gpu(t, h, w, tensors)
    x = tensors["x"]
    threads, *_ = module.config("local_conv_backward")
    lines, channels = _blocks(module, "local_conv_backward", args, x)
    at_once = load_gpu.threads_at_once(x.device) // (2 * channels * threads)
    args.stretches = stretches = min(max(at_once, 1), lines)
    _, _, summed, rows = module.config("local_conv_sum")
    launches = [
        (module, "local_conv_dconv", (3 * lines, channels, 1)),
        (module, "local_conv_backward", (channels * (2 * stretches + lines), 1, 1)),
        (module, "local_conv_sum", (-(-x.shape[2] // summed), rows, 1)),
    ]
    return load_gpu.Plan(args, launches, scratch={"sums": stretches * (TAPS + len(SIDES)) * x.shape[2]})
