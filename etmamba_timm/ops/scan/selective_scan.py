"""The public selective scan, and the choice of the backend that runs it."""

import logging

import torch
from torch import Tensor

from ..kernels.library import has_tangent
from . import chunked, cpu, mamba_ssm, reference

_logger = logging.getLogger(__name__)
_announced: set[str] = set()

# Fastest first: 'auto' takes the first that can. A backend is a module with
#   why_not() -> str | None            why this machine can't run it
#   rejects(*tensors) -> str | None    why it can't take these arguments
#   scan(...)                          the scan itself; see reference.py
BACKENDS = {"mamba_ssm": mamba_ssm, "cpu": cpu, "torch": chunked, "reference": reference}


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
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba (S6): a linear recurrence whose coefficients depend on the input.

    The arguments are those of mamba-ssm's `selective_scan_fn`, and two more. Strides are free: a transposed view of
    `[B, L, D]` data is as good as contiguous `[B, D, L]`.

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
        backend: a name from `scan_backends()`, or 'auto' for the first of them that can.

    Returns:
        The output [B, D, L] in `u`'s dtype, or (output, last state [B, D, N] in `A`'s dtype). The last state is
        for inspection: backends need not carry a gradient through it.

    Raises:
        ValueError: shapes or dtypes that don't fit, an empty sequence, an unknown backend.
        RuntimeError: the backend that was named can't run here, or not with these arguments.

    Source: Mamba (Gu & Dao 2023), algorithm 2.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    reverse_from = 0 if reverse else u.shape[0]
    chosen = _choose(backend, (u, delta, A, B, C, D, z, delta_bias))
    out, state = chosen.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse_from)
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
) -> Tensor:
    """Both directions of a scan with shared parameters (paper 3.3), added up.

    As `selective_scan`, with directions in front: u, delta and z are [2, B, D, L], B and C [2, B, N, L], where 0 runs
    from the first time step to the last and 1 from the last to the first.

    Returns: the sum of both outputs [B, D, L] in `u`'s dtype, each in the input's order.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, directions=2)
    chosen = _choose(backend, (u, delta, A, B, C, D, z, delta_bias))
    if chosen is cpu:
        return cpu.bidirectional_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    u, delta, B, C = (t.flatten(0, 1) for t in (u, delta, B, C))  # [2, B, ...] -> [2B, ...]
    z = None if z is None else z.flatten(0, 1)
    batch = u.shape[0] // 2
    out, _ = chosen.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, batch)
    return out[:batch] + out[batch:]


@torch.compiler.assume_constant_result  # asked once, while tracing: probing a machine is nothing to compile
def _why_not(name: str) -> str | None:
    return BACKENDS[name].why_not()


def _choose(name: str, tensors: tuple):
    if has_tangent(*tensors):
        if name not in ("auto", "reference"):
            raise RuntimeError(f"scan backend {name!r} has no forward-mode derivative; use 'reference' for that")
        return reference
    if name == "auto":
        for name, backend in BACKENDS.items():
            if backend.rejects(*tensors) is None and _why_not(name) is None:
                _announce(name, tensors)
                return backend
    if name not in BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; choose 'auto' or one of {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    reason = _why_not(name) or backend.rejects(*tensors)
    if reason:
        raise RuntimeError(f"scan backend {name!r} can't run: {reason}")
    return backend


def _announce(name: str, tensors: tuple) -> None:
    """Says once what was chosen, and why nothing faster."""
    if torch.compiler.is_compiling() or name in _announced:
        return
    _announced.add(name)
    faster = {"cpu": "cpu", "cuda": "mamba_ssm"}.get(tensors[0].device.type)
    if faster in (None, name):
        _logger.info("selective scan runs on the backend %r", name)
    else:
        reason = _why_not(faster) or BACKENDS[faster].rejects(*tensors)
        _logger.warning("selective scan runs on the slow backend %r: %s", name, reason)


def _check(u, delta, A, B, C, D, z, delta_bias, directions: int | None = None) -> None:
    for name, t in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        if not isinstance(t, Tensor):
            raise ValueError(f"{name} is {type(t).__name__}; it must be a tensor")
    for name, t in (("D", D), ("z", z), ("delta_bias", delta_bias)):
        if t is not None and not isinstance(t, Tensor):
            raise ValueError(f"{name} is {type(t).__name__}; it must be a tensor or None")
    front = () if directions is None else (directions,)
    if u.ndim != 3 + len(front) or 0 in u.shape or u.shape[: len(front)] != front:
        wanted = ", ".join([*map(str, front), "batch, width, length"])
        raise ValueError(f"u is {tuple(u.shape)}; it must be [{wanted}], none of them 0")
    if u.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"u is {u.dtype}; it must be float32, bfloat16, float16 or float64")
    width, length = u.shape[-2:]
    if A.ndim != 2 or A.shape[0] != width or A.shape[1] == 0:
        raise ValueError(f"A is {tuple(A.shape)}; it must be [{width}, state size], as u's width is {width}")
    state_dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    sequence, coefficient, channel = tuple(u.shape), (*u.shape[:-2], A.shape[1], length), (width,)
    for name, t, shape, dtype in (
        ("delta", delta, sequence, u.dtype),
        ("A", A, tuple(A.shape), state_dtype),
        ("B", B, coefficient, u.dtype),
        ("C", C, coefficient, u.dtype),
        ("D", D, channel, state_dtype),
        ("z", z, sequence, u.dtype),
        ("delta_bias", delta_bias, channel, state_dtype),
    ):
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} is {tuple(t.shape)}; with u {sequence} and A {tuple(A.shape)} it must be {shape}")
        if t.dtype != dtype:
            raise ValueError(f"{name} is {t.dtype}; with u in {u.dtype} it must be {dtype}")
        if t.device != u.device:
            raise ValueError(f"{name} is on {t.device} and u on {u.device}; move them to one device")
