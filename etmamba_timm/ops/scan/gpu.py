"""Launches of the GPU kernels of kernels/gpu/scan_forward.cu and scan_backward.cu, for the operator of fused.py.

The kernels want channels next to each other in memory, as the models hand them over, and read everything else where it
lies. Gradients that are sums over blocks (of A, B, C, D and delta_bias) are added up in no fixed order.
"""

import ctypes

import torch
from torch import Tensor

from ..kernels import load_gpu
from ..kernels.load_cpu import Strided, strided
from .backend import ScanInputs

STATES = 16  # the most that the kernels take; must match kernels/gpu/scan.h, like
CHANNELS = 32  # those of a block
KEEP = 16  # steps between kept states; forward and backward agree on it
_SHORTEST = 128  # steps of a segment


class _Args(ctypes.Structure):  # must match kernels/gpu/scan.h
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "width", "length", "states", "reverse_from")),
        *((name, ctypes.c_int64) for name in ("segments", "steps", "softplus")),
        *((name, Strided) for name in ("u", "delta", "z", "B", "C", "out")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "bias", "last_state", "kept", "ends", "sums")),
        *((name, Strided) for name in ("dout", "du", "ddelta", "dz")),
        *((name, ctypes.c_void_p) for name in ("dA", "dB", "dC", "dD", "dbias")),
    ]


_SEQUENCES = [name for name, kind in _Args._fields_ if kind is Strided]


def segments(blocks: int, length: int, processors: int, backward: bool = False) -> int:
    """How many segments of the sequence run side by side.

    More segments fill a device that has few blocks, but each step of a segment is worked twice. Measured on one H200
    (132 multiprocessors) with 3,137 steps, for batch × width, the best of those tried: forward 1 from 8 × 576 on, 12 to
    16 for 1 × 576, 24 to 32 for 1 × 192; backward 6 for 8 × 576, 24 for 1 × 576, 1 to 3 for 8 × 1152 and 32 × 576.
    Other devices are extrapolated: as many blocks for each multiprocessor.

    Args:
        blocks: rows (batch times directions) times blocks of channels.
        length: time steps.
        processors: the device's multiprocessors.
    """
    wanted = (14 if backward else 4) * processors // blocks
    return max(1, min(wanted, length // _SHORTEST))


def kept_states(inputs: ScanInputs) -> int:
    """The number of elements of the states that the forward pass keeps: [rows, blocks, chunks, CHANNELS, STATES]."""
    return _blocks(inputs.u) * -(-inputs.u.shape[3] // KEEP) * CHANNELS * STATES


def forward(inputs: ScanInputs, reverse_from: int, out: Tensor, last_state: Tensor, kept: Tensor) -> None:
    """Fills the output [B, D, L], the last states [G·B, D, N] and, unless it is empty, what is kept."""
    # Each direction has an output of its own [G, B, D, L]: blocks of different directions can't wait for each other.
    directions = len(inputs.u)
    per_direction = _writable(out.unsqueeze(0)) if directions == 1 else _like(inputs.u)
    made = {"out": per_direction, "last_state": last_state, "kept": kept}
    _run("scan_forward.cu", "scan", inputs, reverse_from, {}, made)
    if directions == 2:
        torch.add(per_direction[0], per_direction[1], out=out)
    elif per_direction.data_ptr() != out.data_ptr():
        out.copy_(per_direction[0])


def backward(
    inputs: ScanInputs, reverse_from: int, dout: Tensor, kept: Tensor, du: Tensor, ddelta: Tensor, dz: Tensor | None
) -> tuple[Tensor, ...]:
    """Fills the gradients of u, delta and z. Returns those of A [D, N], B and C [G·B, L, N], D and delta_bias [D]."""
    u, A = inputs.u, inputs.A
    directions, batch, width, length = u.shape
    states, padded = A.shape[1], -(-width // CHANNELS) * CHANNELS
    wanted = {"du": du, "ddelta": ddelta} | ({"dz": dz} if dz is not None else {})
    written = {name: _writable(grad) for name, grad in wanted.items()}
    sums = {
        "dA": A.new_zeros(padded, STATES),
        "dB": A.new_zeros(directions * batch, length, STATES),
        "dC": A.new_zeros(directions * batch, length, STATES),
        "dD": A.new_zeros(padded),
        "dbias": A.new_zeros(padded),
    }
    dout = dout.expand_as(u)  # the same for all directions: their stride is 0
    given = {"dout": _readable(dout), "kept": kept}
    _run("scan_backward.cu", "scan_backward", inputs, reverse_from, given, {**written, **sums})
    for name, grad in wanted.items():
        if written[name] is not grad:
            grad.copy_(written[name])
    return (
        sums["dA"][:width, :states].contiguous(),
        sums["dB"][..., :states].contiguous(),
        sums["dC"][..., :states].contiguous(),
        sums["dD"][:width],
        sums["dbias"][:width],
    )


def _run(
    source: str,
    kernel: str,
    inputs: ScanInputs,
    reverse_from: int,
    given: dict[str, Tensor | None],
    made: dict[str, Tensor | None],
) -> None:
    u, delta, A, B, C, D, z, delta_bias, delta_softplus = inputs
    sequences = {"u": u, "delta": delta, "B": B, "C": C, "z": z}
    parameters = {"A": A, "D": D, "bias": delta_bias}
    given |= {name: None if t is None else _readable(t) for name, t in sequences.items()}
    given |= {name: None if t is None else t.contiguous() for name, t in parameters.items()}
    processors = load_gpu.processors(u.device)
    wanted = segments(_blocks(u), u.shape[3], processors, backward=kernel == "scan_backward")
    load_gpu.run(_plan, given, made, source, kernel, wanted, reverse_from, delta_softplus)


def _plan(
    source: str, kernel: str, wanted: int, reverse_from: int, softplus: bool, **tensors: Tensor | None
) -> load_gpu.Plan:
    u, A = tensors["u"], tensors["A"]
    assert u is not None
    assert A is not None
    _, batch, width, length = u.shape
    blocks = _blocks(u)
    sequences = {name: t for name, t in tensors.items() if name in _SEQUENCES and t is not None}
    aligned = int(all(load_gpu.in_quads(t.mT) for t in sequences.values()))
    module = load_gpu.module(source, u, DTYPE=load_gpu.DTYPES[u.dtype], ALIGNED=aligned, KEEP=KEEP)
    args = _Args(batch, width, length, A.shape[1], reverse_from, softplus=softplus)
    for name, t in sequences.items():
        setattr(args, name, strided(t))
    args.steps = steps = -(-length // (wanted * KEEP)) * KEEP
    args.segments = count = -(-length // steps)
    launches = [(module, kernel, (blocks, count, 1))]
    if count == 1:
        return load_gpu.Plan(args, launches)
    launches.insert(0, (module, f"{kernel}_segments", (blocks, count - 1, 1)))
    channels = count * blocks * CHANNELS
    return load_gpu.Plan(args, launches, scratch={"ends": channels * STATES, "sums": channels})


def _blocks(u: Tensor) -> int:
    directions, batch, width, _ = u.shape
    return directions * batch * -(-width // CHANNELS)


def _adjacent(x: Tensor) -> bool:
    """Whether the channels of x [G, B, D, L] are next to each other; no step is farther than the kernels count."""
    return (x.stride(2) == 1 or x.shape[2] == 1) and x.stride(3) < 2**31


def _like(x: Tensor) -> Tensor:
    """[G, B, D, L] with the channels next to each other."""
    directions, batch, width, length = x.shape
    return x.new_empty(directions, batch, length, width).mT


def _readable(x: Tensor) -> Tensor:
    return x if _adjacent(x) else x.mT.contiguous().mT


def _writable(x: Tensor) -> Tensor:
    return x if _adjacent(x) else _like(x)
