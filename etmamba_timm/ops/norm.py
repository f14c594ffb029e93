"""Layer norm and RMS norm, from a residual stream in one dtype to layers in another."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import load_cpu, load_gpu
from .kernels.choice import check_shapes, state_dtype, takes
from .kernels.load_cpu import library, pointer

WIDEST = 1280  # elements of a row that the GPU kernels take: a warp has the whole row in registers


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Layer norm over the last dimension; without a bias, RMS norm (`x · weight / √(mean(x²) + eps)`).

    One kernel on CPUs and GPUs, with sums in float32 or float64, for RMS norms and from one dtype to another, where
    PyTorch takes several; PyTorch's operations elsewhere.

    Args:
        x: [..., D].
        weight: [D].
        bias: [D] or None.
        eps: added to the variance, or to the mean square.
        dtype: of the output.

    Returns: [..., D], contiguous.

    Raises:
        ValueError: mismatched shapes.
    """
    width = x.shape[-1]
    check_shapes(("weight", weight, (width,)), ("bias", bias, (width,)))
    sums = state_dtype(x.dtype)
    one_dtype = bias is not None and x.dtype == dtype == weight.dtype == bias.dtype
    limit = f"its kernel takes rows of at most {WIDEST} elements" if width > WIDEST else None
    is_fit = not one_dtype and x.dtype in (sums, dtype) and state_dtype(dtype) == sums
    if is_fit and takes("the norm", x, weight, bias, gpu_limit=limit):
        return _forward(x, weight, bias, eps, dtype)[0]
    return _plain(x, weight, bias, eps, dtype)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    if bias is None:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps).to(dtype)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps).to(dtype)


@torch.library.custom_op("etmamba_timm::norm", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and each row's mean (0 without a bias) and 1 / deviation."""
    out, mean, scale = _empty_outputs(x, dtype)
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    run = _run_on_gpu if load_gpu.on_gpu(x) else _run_on_cpu
    run(x, weight, bias, eps, out, mean, scale)
    return out, mean, scale


@_forward.register_fake
def _(x, weight, bias, eps, dtype):
    return _empty_outputs(x, dtype)


def _empty_outputs(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    mean, scale = (x.new_empty(x.shape[:-1], dtype=state_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), mean, scale


@torch.library.custom_op("etmamba_timm::norm_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; the last is empty without a bias."""
    backward = _backward_on_gpu if load_gpu.on_gpu(x) else _backward_on_cpu
    dx, *sums = backward(dout.contiguous(), x.contiguous(), weight.contiguous(), bias, mean, scale)
    dweight, dbias = (total.to(weight.dtype, copy=True) for total in sums)
    return dx, dweight, dbias.to(bias.dtype) if bias is not None else x.new_empty(0)


@_backward.register_fake
def _(dout, x, weight, bias, mean, scale):
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    return x.new_empty(x.shape), torch.empty_like(weight), dbias


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, _ = inputs
    _, mean, scale = output
    ctx.mark_non_differentiable(mean, scale)
    ctx.save_for_backward(x, weight, bias, mean, scale)


def _autograd(ctx, dout, _mean, _scale):
    x, weight, bias, mean, scale = ctx.saved_tensors
    dx, dweight, dbias = _backward(dout, x, weight, bias, mean, scale)
    return dx, dweight, None if bias is None else dbias, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _CpuArgs(ctypes.Structure):  # must match kernels/cpu/norm.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "threads")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out", "mean", "scale")),
    ]


def _run_on_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor, mean: Tensor, scale: Tensor
) -> None:
    weight, bias = weight.to(mean.dtype), None if bias is None else bias.to(mean.dtype)
    args = _CpuArgs(mean.numel(), x.shape[-1], torch.get_num_threads(), eps)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("out", out), ("mean", mean), ("scale", scale)):
        setattr(args, name, pointer(tensor))
    library().etmamba_norm(ctypes.byref(args), load_cpu.DTYPES[x.dtype], load_cpu.DTYPES[out.dtype])


def _backward_on_cpu(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sums = mean.dtype
    dy, weight = dout.to(sums), weight.to(sums)
    if bias is not None:
        wanted = [True] * 3
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dy, x.to(sums), x.shape[-1:], mean[..., None], scale[..., None], weight, bias.to(sums), wanted
        )
        return dx.to(x.dtype), dweight, dbias
    normalised = x.to(sums) * scale[..., None]
    dweight = (dy * normalised).flatten(0, -2).sum(0)
    dy = dy * weight
    dx = scale[..., None] * (dy - normalised * (dy * normalised).mean(-1, keepdim=True))
    return dx.to(x.dtype), dweight, dweight


class _GpuArgs(ctypes.Structure):  # must match kernels/gpu/norm.cu
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "blocks", "weight_dtype", "bias_dtype")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out", "dout", "mean", "scale")),
        *((name, ctypes.c_void_p) for name in ("dx", "dparameters")),
    ]


def _run_on_gpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor, mean: Tensor, scale: Tensor
) -> None:
    given, made = {"x": x, "weight": weight, "bias": bias}, {"out": out, "mean": mean, "scale": scale}
    load_gpu.run(_plan, given, made, "row_norm", eps, out.dtype)


def _backward_on_gpu(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, sums = torch.empty_like(x), x.new_zeros(2, x.shape[-1], dtype=torch.float32)
    given = {"x": x, "weight": weight, "bias": bias, "dout": dout, "mean": mean, "scale": scale}
    load_gpu.run(_plan, given, {"dx": dx, "dparameters": sums}, "row_norm_backward", 0.0, dout.dtype)
    return dx, sums[0], sums[1]


def _plan(
    kernel: str,
    eps: float,
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor | None = None,
    **others: Tensor,
) -> load_gpu.Plan:
    """`dtype` is that of the layers."""
    width = x.shape[-1]
    args = _GpuArgs(x.numel() // width, width, eps=eps)
    args.weight_dtype = load_gpu.DTYPES[weight.dtype]
    args.bias_dtype = 0 if bias is None else load_gpu.DTYPES[bias.dtype]
    aligned = width % 4 == 0 and all(t is None or load_gpu.in_quads(t) for t in (x, dout))  # the others are new
    module = load_gpu.module(
        "norm.cu",
        x,
        DTYPE=load_gpu.DTYPES[dtype],
        X_FLOAT=int(x.dtype == torch.float32),
        ALIGNED=int(aligned),
        PER_LANE=-(-width // (128 if aligned else 32)),
    )
    _, _, warps, blocks = module.config(kernel)
    args.blocks = min(-(-args.rows // warps), blocks * load_gpu.processors(x.device))
    return load_gpu.Plan(args, [(module, kernel, (args.blocks, 1, 1))])
