"""Calls of the CPU kernel of kernels/cpu/scan.cpp, for the operator of fused.py."""

import ctypes

import torch
from torch import Tensor

from ..kernels.load_cpu import DTYPES, Strided, library, pointer, strided
from .backend import ScanInputs


class _Args(ctypes.Structure):  # must match kernels/cpu/scan.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("directions", "batch", "width", "length", "state", "reverse_from")),
        *((name, ctypes.c_int64) for name in ("groups", "threads", "softplus")),
        *((name, Strided) for name in ("u", "delta", "z", "out", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "delta_bias", "last_state", "chunk_states")),
        *((name, Strided) for name in ("dout", "du", "ddelta", "dz")),
        *((name, ctypes.c_void_p) for name in ("dA", "dB", "dC", "dD", "ddelta_bias")),
    ]


def kept_states(inputs: ScanInputs) -> int:
    """The number of elements of the states that the forward pass keeps: [rows, chunks, blocks of channels, N, W]."""
    directions, batch, width, length = inputs.u.shape
    lanes, steps = _chunking(inputs.A.dtype)
    return directions * batch * -(-length // steps) * -(-width // lanes) * inputs.A.shape[1] * lanes


def forward(inputs: ScanInputs, reverse_from: int, out: Tensor, last_state: Tensor, kept: Tensor) -> None:
    """Fills the output [B, D, L], the last states [G·B, D, N] and, unless it is empty, what is kept."""
    args, alive = _arguments(inputs, reverse_from, kept)
    args.out, args.last_state = strided(out.unsqueeze(0)), last_state.data_ptr()
    library().etmamba_scan(ctypes.byref(args), DTYPES[inputs.u.dtype], False)
    del alive


def backward(
    inputs: ScanInputs, reverse_from: int, dout: Tensor, kept: Tensor, du: Tensor, ddelta: Tensor, dz: Tensor | None
) -> tuple[Tensor, ...]:
    """Fills the gradients of u, delta and z. Returns those of A [D, N], B and C [G·B, L, N], D and delta_bias [D]."""
    args, alive = _arguments(inputs, reverse_from, kept)
    A = inputs.A
    directions, batch, width, length = inputs.u.shape
    rows, d_state = directions * batch, A.shape[1]
    dA = A.new_empty(rows, width, d_state)
    dB, dC = A.new_empty(2, rows, args.groups, length, d_state)
    dD, dbias = A.new_empty(2, rows, width)
    args.dout, args.du, args.ddelta, args.dz = strided(dout.unsqueeze(0)), strided(du), strided(ddelta), strided(dz)
    args.dA, args.dB, args.dC, args.dD, args.ddelta_bias = (t.data_ptr() for t in (dA, dB, dC, dD, dbias))
    library().etmamba_scan(ctypes.byref(args), DTYPES[inputs.u.dtype], True)
    del alive
    return dA.sum(0), dB.sum(1), dC.sum(1), dD.sum(0), dbias.sum(0)


def _chunking(dtype: torch.dtype) -> tuple[int, int]:
    """Channels in a vector and time steps in a chunk, as the kernel was compiled."""
    return library().etmamba_scan_bytes() // dtype.itemsize, library().etmamba_scan_steps()


def _arguments(inputs: ScanInputs, reverse_from: int, kept: Tensor) -> tuple[_Args, list[Tensor | None]]:
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
        chunk_states=pointer(kept),
    )
    args.A, args.D, args.delta_bias = (None if t is None else t.data_ptr() for t in parameters)
    return args, [B, C, *parameters]
