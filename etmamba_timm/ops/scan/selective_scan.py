"""The public selective scan, and the choice of the backend that runs it.

The environment variable ETMAMBA_SCAN names the backend that 'auto' tries first, in the whole process.
"""

import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.choice import only_plain, state_dtype
from ..kernels.load_cpu import DTYPES
from . import chunked, fused, mamba_ssm, reference
from .backend import Backend, ScanInputs

_logger = logging.getLogger(__name__)
_announced: set[str] = set()
_able: set[Callable[[], str | None]] = set()  # the backends' `why_not` that said once that this machine can

# Fastest first: 'auto' takes the first that can run.
_ROWS = (fused.GPU, mamba_ssm.BACKEND, fused.CPU, chunked.BACKEND, reference.BACKEND)
BACKENDS = {row.name: row for row in _ROWS}

_TENSORS = ScanInputs._fields[:8]
_PARAMETERS = ("A", "D", "delta_bias")
_OPTIONAL = dict.fromkeys(("D", "z", "delta_bias"), " or None")

PREFERRED = os.environ.get("ETMAMBA_SCAN", "")


def scan_backends() -> dict[str, str | None]:
    """Each backend's name, fastest first, with None if this machine can run it, or the reason why it can't."""
    return {name: backend.why_not() for name, backend in BACKENDS.items()}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
    A_log: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba (S6): a linear recurrence whose coefficients depend on the input.

    The arguments are those of mamba-ssm's `selective_scan_fn`, plus `reverse`, `backend` and `A_log`. Strides are
    free: a transposed view of `[B, L, D]` data is as good as contiguous `[B, D, L]`.

    Args:
        u: the input [B, D, L]; float32, bfloat16, float16 or float64.
        delta: the step sizes Δ before bias and softplus [B, D, L], in `u`'s dtype.
        A: the state matrix's diagonal [D, N], negative for a stable scan; float32 (float64 if `u` is).
        B: how the input enters the state [B, N, L], in `u`'s dtype.
        C: how the state is read [B, N, L], in `u`'s dtype.
        D: the skip connection [D], in `A`'s dtype.
        z: the gate [B, D, L], in `u`'s dtype: the output is multiplied by SiLU(z).
        delta_bias: added to delta [D], in `A`'s dtype.
        delta_softplus: whether Δ = softplus(delta + delta_bias).
        return_last_state: whether to return the state after the last step as well.
        reverse: whether to run from the last time step to the first. The output stays in the input's order.
        backend: a name from `scan_backends()`, or 'auto' for the fastest one that can run ($ETMAMBA_SCAN first).
        A_log: whether A is given as log(-A), as Mamba's layers keep it. Then A, D and delta_bias may each have any
            dtype that `u` may have. On a GPU it spares small kernels that work out A and cast parameters.

    Returns:
        The output [B, D, L] in `u`'s dtype, or (output, last state [B, D, N] in float32, or float64 if `u` is). The
        last state is for inspection: it carries no gradient on some backends.

    Raises:
        ValueError: mismatched shapes or dtypes, an empty sequence, an unknown backend.
        RuntimeError: the named backend can't run on this machine or with these arguments.

    Source: Mamba (Gu & Dao 2023), algorithm 2.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, A_log)
    _check(inputs)
    chosen, inputs = _choose(backend, inputs)
    out, state = chosen.scan(inputs, 0 if reverse else u.shape[0])
    return (out, state) if return_last_state else out


def bidirectional_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
    A_log: bool = False,
) -> Tensor:
    """The sum of a forward and a backward scan that share parameters (paper 3.3).

    Arguments and errors are those of `selective_scan`, with directions in front: u, delta and z are [2, B, D, L], B and
    C [2, B, N, L]. Index 0 runs from the first time step to the last, index 1 from the last to the first.

    Returns: the sum of both outputs [B, D, L] in `u`'s dtype, each in the input's order.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, A_log)
    _check(inputs, directions=(2,))
    chosen, inputs = _choose(backend, inputs)
    if chosen.both is not None:
        return chosen.both(inputs)
    batch = u.shape[1]
    out, _ = chosen.scan(inputs.with_sequences(lambda x: x.flatten(0, 1)), batch)  # [2, B, ...] -> [2B, ...]
    return out[:batch] + out[batch:]


def preferred_backend() -> str:
    """The backend that ETMAMBA_SCAN names, '' for none; ValueError if there is none of this name."""
    if PREFERRED and PREFERRED not in BACKENDS:
        raise ValueError(f"the environment variable ETMAMBA_SCAN is {PREFERRED!r}; set it to {' or '.join(BACKENDS)}")
    return PREFERRED


def _in_order() -> dict[str, Backend]:
    """The table in the order in which 'auto' tries its rows."""
    first = preferred_backend()
    return {first: BACKENDS[first], **BACKENDS} if first else BACKENDS


@torch.compiler.assume_constant_result  # asked once, at trace time: probing the machine can't be compiled
def _why_not(name: str) -> str | None:
    probe = BACKENDS[name].why_not
    if probe in _able:
        return None
    reason = probe()
    if reason is None:
        _able.add(probe)
    return reason


def _choose(name: str, inputs: ScanInputs) -> tuple[Backend, ScanInputs]:
    """The backend of `_find`, and the inputs as it takes them."""
    backend = _find(name, inputs)
    return backend, inputs if backend.takes_A_log else inputs.without_A_log()


def _find(name: str, inputs: ScanInputs) -> Backend:
    """The backend of this name; for 'auto' the first that can run, and a log of why faster ones can't."""
    if name == "auto" and only_plain():
        name = reference.BACKEND.name
    if name == "auto":
        passed_over: dict[str, str] = {}
        for name, backend in _in_order().items():
            reason = backend.rejects(inputs) or _why_not(name)  # in this order: _why_not may compile or import
            if reason is None:
                _announce(name, inputs, passed_over)
                return backend
            passed_over[name] = reason
    if name not in BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; choose 'auto' or one of {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    reason = _why_not(name) or backend.rejects(inputs)
    if reason:
        raise RuntimeError(f"scan backend {name!r} can't run: {reason}")
    return backend


def _announce(name: str, inputs: ScanInputs, passed_over: dict[str, str]) -> None:
    """Logs once which backend runs, as a warning if one made for this device can't, with the reason."""
    if torch.compiler.is_compiling() or name in _announced:
        return
    _announced.add(name)
    device = inputs.u.device.type
    faster = [f"{row!r} can't run: {reason}" for row, reason in passed_over.items() if device in BACKENDS[row].devices]
    if faster:
        _logger.warning("selective scan runs on the slower backend %r, because %s", name, "; ".join(faster))
    else:
        _logger.info("selective scan runs on the backend %r", name)


def _check(inputs: ScanInputs, directions: tuple[int, ...] = ()) -> None:
    """Raises ValueError for inputs that aren't what `ScanInputs` says; directions is (2,) for both in one call."""
    for name, t in zip(_TENSORS, inputs[:8], strict=True):
        if not isinstance(t, Tensor) and not (t is None and name in _OPTIONAL):
            raise ValueError(f"{name} is {type(t).__name__}; it must be a tensor{_OPTIONAL.get(name, '')}")
    u, A = inputs.u, inputs.A
    front, u_shape, A_shape, device = len(directions), u.shape, A.shape, u.device
    if len(u_shape) != 3 + front or 0 in u_shape or u_shape[:front] != directions:
        wanted = ", ".join([*map(str, directions), "batch, width, length"])
        raise ValueError(f"u is {tuple(u_shape)}; it must be [{wanted}], none of them 0")
    if u.dtype not in DTYPES:
        raise ValueError(f"u is {u.dtype}; it must be float32, bfloat16, float16 or float64")
    width, length = u_shape[-2:]
    if len(A_shape) != 2 or A_shape[0] != width or A_shape[1] == 0:
        raise ValueError(f"A is {tuple(A_shape)}; it must be [{width}, state size], as u's width is {width}")
    sequence, coefficient, channel = tuple(u_shape), (*u_shape[:-2], A_shape[1], length), (width,)
    shapes = (sequence, sequence, tuple(A_shape), coefficient, coefficient, channel, sequence, channel)
    parameter_dtype = state_dtype(u.dtype)
    for name, t, shape in zip(_TENSORS, inputs[:8], shapes, strict=True):
        if t is None:
            continue
        dtype = parameter_dtype if name in _PARAMETERS else u.dtype
        if inputs.A_log and name in _PARAMETERS and t.dtype in DTYPES:
            dtype = t.dtype
        if t.shape != shape:
            raise ValueError(f"{name} is {tuple(t.shape)}; with u {sequence} and A {tuple(A_shape)} it must be {shape}")
        if t.dtype != dtype:
            raise ValueError(f"{name} is {t.dtype}; with u in {u.dtype} it must be {dtype}")
        if t.device != device:
            raise ValueError(f"{name} is on {t.device} and u on {device}; move them to one device")
