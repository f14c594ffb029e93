"""The fused CPU scan of kernels/cpu/scan.cpp, as a torch operator with a backward of its own."""

import ctypes
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..flops import count_flops
from ..kernels.load_cpu import DTYPES, Strided, library, pointer, strided, why_not
from .backend import Backend, ScanInputs

# torch.library wants the inputs of a scan one by one.
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus"
)


class _Args(ctypes.Structure):  # must match kernels/cpu/scan.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("directions", "batch", "width", "length", "state", "reverse_from")),
        *((name, ctypes.c_int64) for name in ("groups", "threads", "softplus")),
        *((name, Strided) for name in ("u", "delta", "z", "out", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "delta_bias", "last_state", "chunk_states")),
        *((name, Strided) for name in ("dout", "du", "ddelta", "dz")),
        *((name, ctypes.c_void_p) for name in ("dA", "dB", "dC", "dD", "ddelta_bias")),
    ]


def scan(inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
    """See `Backend.scan`. The last state carries no gradient."""
    return _scan(inputs.with_sequences(lambda x: x.unsqueeze(0)), reverse_from)


def both(inputs: ScanInputs) -> Tensor:
    """See `Backend.both`: the directions are added up as they are computed."""
    return _scan(inputs, inputs.u.shape[1])[0]


BACKEND = Backend("cpu", scan, both, devices=("cpu", "meta"), why_not=why_not)  # meta tensors have only shapes


def _scan(inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:8])
    out, state, _ = _forward(reverse_from, keep, *inputs)
    return out, state


@torch.library.custom_op(
    "etmamba_timm::cpu_scan",
    mutates_args=(),
    device_types="cpu",
    schema=f"(SymInt reverse_from, bool keep, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _forward(reverse_from: int, keep: bool, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The output [B, D, L], added up over directions; the rows' last states [G·B, D, N]; states for the backward pass.

    The sequences have G directions in front: [G, B, ...]. A row is one direction of one sequence; the first direction's
    rows come first, and rows `reverse_from:` run backwards. The states at the start of each chunk are kept if `keep`.
    """
    inputs = ScanInputs(*flat)
    out, state, chunk_states = _empty_outputs(inputs, keep)
    args, alive = _arguments(inputs, reverse_from, chunk_states)
    args.out, args.last_state = strided(out.unsqueeze(0)), state.data_ptr()
    library().etmamba_scan(ctypes.byref(args), DTYPES[inputs.u.dtype], False)
    del alive
    return out, state, chunk_states


@_forward.register_fake
def _(reverse_from, keep, *flat):
    return _empty_outputs(ScanInputs(*flat), keep)


@torch.library.custom_op(
    "etmamba_timm::cpu_scan_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dout, Tensor chunk_states, SymInt reverse_from, {_INPUTS}) -> ({', '.join(['Tensor'] * 8)})",
)
def _backward(dout: Tensor, chunk_states: Tensor, reverse_from: int, *flat: Any) -> tuple[Tensor, ...]:
    """The gradients of u, delta, A, B, C, D, z and delta_bias; empty for those of D, z and delta_bias not given."""
    u, delta, A, B, C, D, z, delta_bias, _ = inputs = ScanInputs(*flat)
    args, alive = _arguments(inputs, reverse_from, chunk_states)
    directions, batch, width, length = u.shape
    rows, d_state = directions * batch, A.shape[1]
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = torch.empty_like(z) if z is not None else u.new_empty(0)
    dA = A.new_empty(rows, width, d_state)
    dB, dC = A.new_empty(2, rows, args.groups, length, d_state)
    dD, dbias = A.new_empty(2, rows, width)
    args.dout, args.du, args.ddelta = strided(dout.unsqueeze(0)), strided(du), strided(ddelta)
    args.dz = strided(dz if z is not None else None)
    args.dA, args.dB, args.dC, args.dD, args.ddelta_bias = (t.data_ptr() for t in (dA, dB, dC, dD, dbias))
    library().etmamba_scan(ctypes.byref(args), DTYPES[u.dtype], True)
    del alive
    return (
        du,
        ddelta,
        dA.sum(0),
        _per_step(dB.sum(1), B),
        _per_step(dC.sum(1), C),
        dD.sum(0) if D is not None else A.new_empty(0),
        dz,
        dbias.sum(0) if delta_bias is not None else A.new_empty(0),
    )


@_backward.register_fake
def _(dout, chunk_states, reverse_from, *flat):
    u, delta, A, B, C, D, z, delta_bias, _ = ScanInputs(*flat)
    return (
        torch.empty_like(u),
        torch.empty_like(delta),
        torch.empty_like(A, memory_format=torch.contiguous_format),
        _per_step(A.new_empty(B.shape[0] * B.shape[1], B.shape[3], B.shape[2]), B),
        _per_step(A.new_empty(C.shape[0] * C.shape[1], C.shape[3], C.shape[2]), C),
        A.new_empty(u.shape[2] if D is not None else 0),
        torch.empty_like(z) if z is not None else u.new_empty(0),
        A.new_empty(u.shape[2] if delta_bias is not None else 0),
    )


def _per_step(grad: Tensor, like: Tensor) -> Tensor:
    """[G·B, L, N] -> [G, B, N, L], in the dtype of `like`."""
    return grad.unflatten(0, like.shape[:2]).transpose(2, 3).to(like.dtype)


def _setup_context(ctx, inputs, output) -> None:
    ctx.reverse_from, ctx.keep, *tensors, ctx.delta_softplus = inputs
    _, state, chunk_states = output
    ctx.mark_non_differentiable(state, chunk_states)
    ctx.save_for_backward(*tensors, chunk_states)


def _autograd(ctx, dout, _state, _chunk_states):
    *tensors, chunk_states = ctx.saved_tensors  # read once: a checkpoint hands them out a single time
    inputs = (*tensors, ctx.delta_softplus)
    if not ctx.keep:  # traced where no gradient was wanted
        chunk_states = _forward(ctx.reverse_from, True, *inputs)[2]
    grads = _backward(dout, chunk_states, ctx.reverse_from, *inputs)
    grads = [None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=True)]
    return (None, None, *grads, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _flops(u: torch.Size, A: torch.Size, **others) -> int:
    """For each step and channel 4 multiply-adds for each state and 3 besides; exponentials aren't counted."""
    return 2 * prod(u) * (4 * A[1] + 3)


count_flops("cpu_scan", _flops)


def _empty_outputs(inputs: ScanInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    u, A = inputs.u, inputs.A
    directions, batch, width, length = u.shape
    rows = directions * batch
    lanes, steps = _chunking(A.dtype)
    kept = rows * -(-length // steps) * -(-width // lanes) * A.shape[1] * lanes  # [rows, chunks, blocks, N, W]
    return torch.empty_like(u[0]), A.new_empty(rows, *A.shape), A.new_empty(kept if keep else 0)


def _chunking(dtype: torch.dtype) -> tuple[int, int]:
    """Channels in a vector and time steps in a chunk, as the kernel was compiled."""
    return library().etmamba_scan_bytes() // dtype.itemsize, library().etmamba_scan_steps()


def _arguments(inputs: ScanInputs, reverse_from: int, chunk_states: Tensor) -> tuple[_Args, list[Tensor | None]]:
    """The arguments that both passes share, and the tensors to keep alive while the kernel reads them."""
    u, A = inputs.u, inputs.A
    directions, batch, width, length = u.shape
    lanes, _ = _chunking(A.dtype)
    threads = torch.get_num_threads()
    B, C = (t if t.stride(2) == 1 else t.mT.contiguous().mT for t in (inputs.B.to(A.dtype), inputs.C.to(A.dtype)))
    parameters = [None if t is None else t.contiguous() for t in (A, inputs.D, inputs.delta_bias)]
    args = _Args(
        directions=directions,
        batch=batch,
        width=width,
        length=length,
        state=A.shape[1],
        reverse_from=reverse_from,
        groups=max(1, min(-(-width // lanes), -(-2 * threads // batch))),
        threads=threads,
        softplus=inputs.delta_softplus,
        u=strided(u),
        delta=strided(inputs.delta),
        z=strided(inputs.z),
        B=strided(B),
        C=strided(C),
        chunk_states=pointer(chunk_states),
    )
    args.A, args.D, args.delta_bias = (None if t is None else t.data_ptr() for t in parameters)
    return args, [B, C, *parameters]
