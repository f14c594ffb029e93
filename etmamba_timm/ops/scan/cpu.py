"""The fused CPU scan of kernels/cpu/scan.cpp, as a torch operator with a backward of its own."""

import ctypes

import torch
from torch import Tensor

from ..kernels.library import DTYPES, Strided, library, pointer, strided, why_not

__all__ = ["bidirectional_scan", "rejects", "scan", "why_not"]


class _Args(ctypes.Structure):  # must match kernels/cpu/scan.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("directions", "batch", "width", "length", "state", "reverse_from")),
        *((name, ctypes.c_int64) for name in ("groups", "threads", "softplus")),
        *((name, Strided) for name in ("u", "delta", "z", "out", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "delta_bias", "last_state", "chunk_states")),
        *((name, Strided) for name in ("dout", "du", "ddelta", "dz")),
        *((name, ctypes.c_void_p) for name in ("dA", "dB", "dC", "dD", "ddelta_bias")),
    ]


def rejects(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D, z, delta_bias) -> str | None:
    """None for tensors on the CPU, and for those on 'meta', which have shapes alone."""
    return None if u.device.type in ("cpu", "meta") else f"u is on {u.device}; this kernel takes CPU tensors"


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse_from: int,
) -> tuple[Tensor, Tensor]:
    """See `reference.scan`, whose results this agrees with. The last state carries no gradient."""
    u, delta, B, C = (t.unsqueeze(0) for t in (u, delta, B, C))
    z = None if z is None else z.unsqueeze(0)
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse_from)


def bidirectional_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """See `selective_scan.bidirectional_scan`: the directions are added as they are computed."""
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, u.shape[1])[0]


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse_from):
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out, state, _ = _forward(*inputs, delta_softplus, reverse_from, keep)
    return out, state


@torch.library.custom_op("etmamba_timm::cpu_scan", mutates_args=(), device_types="cpu")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse_from: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [B, D, L], added up over directions; the rows' last states [G·B, D, N]; states for the backward pass.

    u, delta and z are [G, B, D, L] for G directions, B and C [G, B, N, L]. A row is one direction of one sequence, the
    first direction's first; rows `reverse_from:` run backwards. The chunks' first states are there if `keep`.
    """
    out, state, chunk_states = _empty_outputs(u, A, keep)
    args, alive = _arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse_from, chunk_states)
    args.out, args.last_state = strided(out.unsqueeze(0)), state.data_ptr()
    library().etmamba_scan(ctypes.byref(args), DTYPES[u.dtype], False)
    del alive
    return out, state, chunk_states


@_forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse_from, keep):
    return _empty_outputs(u, A, keep)


@torch.library.custom_op("etmamba_timm::cpu_scan_backward", mutates_args=(), device_types="cpu")
def _backward(
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    chunk_states: Tensor,
    delta_softplus: bool,
    reverse_from: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, delta, A, B, C, D, z and delta_bias; empty for those of D, z and delta_bias not given."""
    args, alive = _arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse_from, chunk_states)
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
def _(dout, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus, reverse_from):
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
    *tensors, ctx.delta_softplus, ctx.reverse_from, ctx.keep = inputs
    _, state, chunk_states = output
    ctx.mark_non_differentiable(state, chunk_states)
    ctx.save_for_backward(*tensors, chunk_states)


def _autograd(ctx, dout, _state, _chunk_states):
    saved = list(ctx.saved_tensors)  # once: a checkpoint hands them out a single time
    if not ctx.keep:  # traced where no gradient was wanted
        saved[-1] = _forward(*saved[:-1], ctx.delta_softplus, ctx.reverse_from, True)[2]
    grads = _backward(dout, *saved, ctx.delta_softplus, ctx.reverse_from)
    grads = [None if tensor is None else grad for tensor, grad in zip(saved, grads, strict=False)]
    return (*grads, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _empty_outputs(u: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    directions, batch, width, length = u.shape
    rows = directions * batch
    lanes, steps = _chunking(A.dtype)
    kept = rows * -(-length // steps) * -(-width // lanes) * A.shape[1] * lanes  # [rows, chunks, blocks, N, W]
    return torch.empty_like(u[0]), A.new_empty(rows, *A.shape), A.new_empty(kept if keep else 0)


def _chunking(dtype: torch.dtype) -> tuple[int, int]:
    """Channels in a vector and time steps in a chunk, as the kernel was compiled."""
    return library().etmamba_scan_bytes() // dtype.itemsize, library().etmamba_scan_steps()


def _arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse_from, chunk_states):
    """The arguments that both passes share, and the tensors to keep alive while the kernel reads them."""
    directions, batch, width, length = u.shape
    lanes, _ = _chunking(A.dtype)
    threads = torch.get_num_threads()
    B, C = (t if t.stride(2) == 1 else t.mT.contiguous().mT for t in (B.to(A.dtype), C.to(A.dtype)))
    alive = [B, C, *(None if t is None else t.contiguous() for t in (A, D, delta_bias))]
    args = _Args(
        directions=directions,
        batch=batch,
        width=width,
        length=length,
        state=A.shape[1],
        reverse_from=reverse_from,
        groups=max(1, min(-(-width // lanes), -(-2 * threads // batch))),
        threads=threads,
        softplus=delta_softplus,
        u=strided(u),
        delta=strided(delta),
        z=strided(z),
        B=strided(B),
        C=strided(C),
        chunk_states=pointer(chunk_states),
    )
    args.A, args.D, args.delta_bias = (None if t is None else t.data_ptr() for t in alive[2:])
    return args, alive
