"""The fused scan as a torch operator with a backward of its own: one operator, on CPUs and on GPUs.

cpu.py and gpu.py call the kernels. Both have `kept_states`, `forward` and `backward`.
"""

from math import prod
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flops import count_flops
from ..kernels import choice, load_cpu, load_gpu
from . import cpu, gpu
from .backend import Backend, ScanInputs

# torch.library wants the inputs of a scan one by one.
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, bool A_log=False"
)
_DEVICES = ("cpu", "cuda")


def scan(inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
    """See `Backend.scan`. The last state carries no gradient."""
    return _scan(inputs.with_sequences(lambda x: x.unsqueeze(0)), reverse_from)


def both(inputs: ScanInputs) -> Tensor:
    """See `Backend.both`: one call, without turning or joining sequences."""
    return _scan(inputs, inputs.u.shape[1])[0]


def _scan(inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:8])
    out, state, _ = _forward(reverse_from, keep, *inputs)
    return out, state


def scan_on_gpu(inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
    """See `Backend.scan`. The last state carries no gradient."""
    inputs = _for_gpu(inputs)
    return _in_groups(inputs, reverse_from) if inputs.A.shape[1] > gpu.STATES else scan(inputs, reverse_from)


def both_on_gpu(inputs: ScanInputs) -> Tensor:
    """See `Backend.both`: one call, without turning or joining sequences."""
    inputs = _for_gpu(inputs)
    if inputs.A.shape[1] <= gpu.STATES:
        return both(inputs)
    batch = inputs.u.shape[1]
    out, _ = _in_groups(inputs.with_sequences(lambda x: x.flatten(0, 1)), batch)  # [2, B, ...] -> [2B, ...]
    return out[:batch] + out[batch:]


def _for_gpu(inputs: ScanInputs) -> ScanInputs:
    """With parameters that the kernels take: those of one call may be log(-A) and of any dtype but float64."""
    parameters = (inputs.A, inputs.D, inputs.delta_bias)
    if inputs.A.shape[1] <= gpu.STATES and all(t is None or t.dtype in load_gpu.DTYPES for t in parameters):
        return inputs
    return inputs.without_A_log()


def _in_groups(inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
    """More states than the GPU kernel takes: a call for each group of them, then D and the gate; all in float32."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, _ = inputs.with_sequences(lambda x: x.float())
    results = []
    for rates, b, c in zip(*(t.split(gpu.STATES, 1) for t in (A, B, C)), strict=True):  # states are their dimension 1
        group = ScanInputs(u, delta, rates, b, c, None, None, delta_bias, delta_softplus)
        results.append(scan(group, reverse_from))
    outs, states = zip(*results, strict=True)
    out = sum(outs[1:], outs[0])
    if D is not None:
        out = out + D[:, None] * u
    if z is not None:
        out = out * F.silu(z)
    return out.to(inputs.u.dtype), torch.cat(states, -1)


def _gpu_limits(inputs: ScanInputs) -> str | None:
    if inputs.u.dtype not in load_gpu.DTYPES:
        return "the kernel has no float64; use float32, bfloat16 or float16"
    return choice.gpu_why_not(inputs.u.device)


GPU = Backend(
    "gpu",
    scan_on_gpu,
    both_on_gpu,
    devices=("cuda",),
    why_not=load_gpu.why_not,
    limits=_gpu_limits,
    takes_A_log=True,
)
CPU = Backend("cpu", scan, both, devices=("cpu", "meta"), why_not=load_cpu.why_not)  # meta tensors have only shapes


def _kernels(u: Tensor) -> ModuleType:
    return gpu if load_gpu.on_gpu(u) else cpu


@torch.library.custom_op(
    "etmamba_timm::scan",
    mutates_args=(),
    device_types=_DEVICES,
    schema=f"(SymInt reverse_from, bool keep, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _forward(reverse_from: int, keep: bool, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The output [B, D, L], added up over directions; the rows' last states [G·B, D, N]; states for the backward pass.

    The sequences have G directions in front, one or two: [G, B, ...]. A row is one direction of one sequence; the first
    direction's rows come first, and rows `reverse_from:` run backwards. States every so many steps are kept if `keep`.
    """
    inputs = ScanInputs(*flat)
    out, state, kept = outputs = _empty_outputs(inputs, keep)
    _kernels(inputs.u).forward(inputs, reverse_from, out, state, kept)
    return outputs


@_forward.register_fake
def _(reverse_from, keep, *flat):
    return _empty_outputs(ScanInputs(*flat), keep)


def _empty_outputs(inputs: ScanInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    u, A = inputs.u, inputs.A
    dtype = choice.state_dtype(u.dtype)
    kept = u.new_empty(_kernels(u).kept_states(inputs) if keep else 0, dtype=dtype)
    return torch.empty_like(u[0]), u.new_empty(u.shape[0] * u.shape[1], *A.shape, dtype=dtype), kept


@torch.library.custom_op(
    "etmamba_timm::scan_backward",
    mutates_args=(),
    device_types=_DEVICES,
    schema=f"(Tensor dout, Tensor kept, SymInt reverse_from, {_INPUTS}) -> ({', '.join(['Tensor'] * 8)})",
)
def _backward(dout: Tensor, kept: Tensor, reverse_from: int, *flat: Any) -> tuple[Tensor, ...]:
    """The gradients of u, delta, A, B, C, D, z and delta_bias; empty for those of D, z and delta_bias not given."""
    u, delta, A, B, C, D, z, delta_bias, *_ = inputs = ScanInputs(*flat)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = torch.empty_like(z) if z is not None else None
    dA, dB, dC, dD, dbias = _kernels(u).backward(inputs, reverse_from, dout, kept, du, ddelta, dz)
    return (
        du,
        ddelta,
        dA,
        _per_step(dB, B),
        _per_step(dC, C),
        dD if D is not None else A.new_empty(0),
        dz if dz is not None else u.new_empty(0),
        dbias if delta_bias is not None else A.new_empty(0),
    )


@_backward.register_fake
def _(dout, kept, reverse_from, *flat):
    u, delta, A, B, C, D, z, delta_bias, *_ = ScanInputs(*flat)
    return (
        torch.empty_like(u),
        torch.empty_like(delta),
        torch.empty_like(A, memory_format=torch.contiguous_format),
        _per_step(A.new_empty(B.shape[0] * B.shape[1], B.shape[3], B.shape[2]), B),
        _per_step(A.new_empty(C.shape[0] * C.shape[1], C.shape[3], C.shape[2]), C),
        A.new_empty(0) if D is None else D.new_empty(D.shape),
        torch.empty_like(z) if z is not None else u.new_empty(0),
        A.new_empty(0) if delta_bias is None else delta_bias.new_empty(delta_bias.shape),
    )


def _per_step(grad: Tensor, like: Tensor) -> Tensor:
    """[G·B, L, N] -> [G, B, N, L], in the dtype of `like`."""
    return grad.unflatten(0, like.shape[:2]).transpose(2, 3).to(like.dtype)


def _setup_context(ctx, inputs, output) -> None:
    ctx.reverse_from, ctx.keep, *tensors = inputs[:10]
    ctx.flags = inputs[10:]
    _, state, kept = output
    ctx.mark_non_differentiable(state, kept)
    ctx.save_for_backward(*tensors, kept)


def _autograd(ctx, dout, _state, _kept):
    *tensors, kept = ctx.saved_tensors  # read once: a checkpoint hands them out a single time
    inputs = (*tensors, *ctx.flags)
    if not ctx.keep:  # traced where no gradient was wanted
        kept = _forward(ctx.reverse_from, True, *inputs)[2]
    grads = _backward(dout, kept, ctx.reverse_from, *inputs)
    grads = [None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=True)]
    return (None, None, *grads, *(None for _ in ctx.flags))


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _flops(u: torch.Size, A: torch.Size, **others) -> int:
    """For each step and channel 4 multiply-adds for each state and 3 besides; exponentials aren't counted."""
    return 2 * prod(u) * (4 * A[1] + 3)


count_flops("scan", _flops)
