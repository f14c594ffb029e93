"""The fused CPU kernel: `scan.cpp`, compiled at first use, as a torch operator with a backward of its own."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from .build import BuildError, load

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class _Strided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "channel", "time"))]


class _Args(ctypes.Structure):  # must match scan.cpp
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "width", "length", "state", "reverse_from", "groups", "threads", "softplus")
        ),
        *((name, _Strided) for name in ("u", "delta", "z", "out")),
        *((name, ctypes.c_void_p) for name in ("A", "B", "C", "D", "delta_bias", "last_state", "chunk_states")),
        *((name, _Strided) for name in ("dout", "du", "ddelta", "dz")),
        *((name, ctypes.c_void_p) for name in ("dA", "dB", "dC", "dD", "ddelta_bias")),
    ]


@functools.cache
def _library() -> ctypes.CDLL | BuildError:
    try:
        library = load(Path(__file__).with_name("scan.cpp"))
    except BuildError as error:
        return error
    library.etmamba_scan.argtypes = [ctypes.POINTER(_Args), ctypes.c_int, ctypes.c_int]
    return library


def why_not() -> str | None:
    """None if the kernel is there or can be compiled (which this does), else the reason and the remedy."""
    library = _library()
    return str(library) if isinstance(library, BuildError) else None


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
    """The output, the last state, and (if `keep`) the states at the chunks' beginnings for the backward pass."""
    out, state, chunk_states = _empty_outputs(u, A, keep)
    args, alive = _arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse_from, chunk_states)
    args.out, args.last_state = _strided(out), state.data_ptr()
    _run(args, u.dtype, backward=False)
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
    batch, width, length = u.shape
    d_state = A.shape[1]
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = torch.empty_like(z) if z is not None else u.new_empty(0)
    dA = A.new_empty(batch, width, d_state)
    dB, dC = A.new_empty(2, batch, args.groups, length, d_state)
    dD, dbias = A.new_empty(2, batch, width)
    args.dout, args.du, args.ddelta = _strided(dout), _strided(du), _strided(ddelta)
    args.dz = _strided(dz if z is not None else None)
    args.dA, args.dB, args.dC, args.dD, args.ddelta_bias = (t.data_ptr() for t in (dA, dB, dC, dD, dbias))
    _run(args, u.dtype, backward=True)
    del alive
    return (
        du,
        ddelta,
        dA.sum(0),
        dB.sum(1).transpose(1, 2).to(B.dtype),  # [batch, groups, L, N] -> [batch, N, L]
        dC.sum(1).transpose(1, 2).to(C.dtype),
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
        B.new_empty(B.shape[0], B.shape[2], B.shape[1]).transpose(1, 2),
        C.new_empty(C.shape[0], C.shape[2], C.shape[1]).transpose(1, 2),
        A.new_empty(u.shape[1] if D is not None else 0),
        torch.empty_like(z) if z is not None else u.new_empty(0),
        A.new_empty(u.shape[1] if delta_bias is not None else 0),
    )


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
    batch, width, length = u.shape
    lanes, steps = _chunking(A.dtype)
    kept = (
        batch * -(-length // steps) * -(-width // lanes) * A.shape[1] * lanes if keep else 0
    )  # [batch, chunks, blocks, N, W]
    return torch.empty_like(u), A.new_empty(batch, *A.shape), A.new_empty(kept)


def _chunking(dtype: torch.dtype) -> tuple[int, int]:
    """Channels in a vector and time steps in a chunk, as the kernel was compiled."""
    library = _ready()
    return library.etmamba_scan_bytes() // dtype.itemsize, library.etmamba_scan_steps()


def _ready() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, BuildError):
        raise library
    return library


def _arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse_from, chunk_states):
    """The arguments that both passes share, and the tensors to keep alive while the kernel reads them."""
    batch, width, length = u.shape
    lanes, _ = _chunking(A.dtype)
    threads = torch.get_num_threads()
    alive = [
        None if t is None else t.contiguous()
        for t in (A, B.transpose(1, 2).to(A.dtype), C.transpose(1, 2).to(A.dtype), D, delta_bias)
    ]
    args = _Args(
        batch=batch,
        width=width,
        length=length,
        state=A.shape[1],
        reverse_from=reverse_from,
        groups=max(1, min(-(-width // lanes), -(-2 * threads // batch))),
        threads=threads,
        softplus=delta_softplus,
        u=_strided(u),
        delta=_strided(delta),
        z=_strided(z),
        chunk_states=chunk_states.data_ptr() if chunk_states.numel() else None,
    )
    args.A, args.B, args.C, args.D, args.delta_bias = (None if t is None else t.data_ptr() for t in alive)
    return args, alive


def _strided(x: Tensor | None) -> _Strided:
    return _Strided(x.data_ptr(), *x.stride()) if x is not None else _Strided()


def _run(args: _Args, dtype: torch.dtype, backward: bool) -> None:
    _ready().etmamba_scan(ctypes.byref(args), _DTYPES[dtype], backward)
