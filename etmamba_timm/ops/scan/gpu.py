"""Launches of the GPU kernels of kernels/gpu/scan_forward.cu and scan_backward.cu, for the operator of fused.py.

The kernels want channels next to each other in memory, as the models hand them over, and read everything else where it
lies. Gradients that are sums over blocks (of A, B, C, D and delta_bias) are added up in no fixed order.
"""

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import load_gpu
from ..kernels.load_cpu import Strided, strided
from .backend import ScanInputs

STATES = 16  # the most that the kernels take; must match kernels/gpu/scan.h, like
CHANNELS = 32  # those of a block
KEEP = 16  # steps between kept states; forward and backward agree on it
_SHORTEST = 64  # steps of a segment


class _Args(ctypes.Structure):  # must match kernels/gpu/scan.h
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "width", "length", "states", "reverse_from")),
        *((name, ctypes.c_int64) for name in ("segments", "steps", "softplus")),
        *((name, ctypes.c_int64) for name in ("A_log", "A_dtype", "D_dtype", "bias_dtype")),
        *((name, Strided) for name in ("u", "delta", "z", "B", "C", "out")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "bias", "last_state", "kept", "ends", "sums")),
        *((name, Strided) for name in ("dout", "du", "ddelta", "dz")),
        *((name, ctypes.c_void_p) for name in ("dA", "dB", "dC", "dD", "dbias")),
    ]


_SEQUENCES = [name for name, *kinds in _Args._fields_ if kinds == [Strided]]


class _Cost(NamedTuple):
    """Nanoseconds a step that a multiprocessor needs for n blocks of a kernel: fixed + each * n, up to most of them.

    Fitted to one H200.
    """

    fixed: float
    each: float
    most: int

    def step(self, blocks: int, processors: int) -> float:
        """Of all blocks: a device takes them in waves, and the last of these may be nearly empty."""
        full, rest = divmod(-(-blocks // processors), self.most)
        return full * (self.fixed + self.each * self.most) + bool(rest) * (self.fixed + self.each * rest)


_FORWARD, _FORWARD_ALONE = _Cost(41, 26, 5), _Cost(41, 16, 8)
_BACKWARD, _BACKWARD_ALONE = _Cost(301, 55, 8), _Cost(41, 20, 8)
_LAUNCH = 6000.0  # nanoseconds of the kernel that segments need besides


@functools.cache
def segments(blocks: int, length: int, processors: int, backward: bool = False) -> int:
    """How many segments of the sequence run side by side: those that should take least time.

    More segments fill a device that has few blocks, or even out its waves of blocks. But then each step is worked
    twice: a first kernel takes all segments but one alone.

    Args:
        blocks: rows (batch times directions) times blocks of channels.
        length: time steps.
        processors: the device's multiprocessors.
    """
    main, alone = (_BACKWARD, _BACKWARD_ALONE) if backward else (_FORWARD, _FORWARD_ALONE)

    def nanoseconds(wanted: int) -> float:
        count, steps = _in_segments(length, wanted)
        if count == 1:
            return length * main.step(blocks, processors)
        per_step = main.step(blocks * count, processors) + alone.step(blocks * (count - 1), processors)
        return steps * per_step + _LAUNCH

    return min(range(1, max(1, length // _SHORTEST) + 1), key=nanoseconds)


def _in_segments(length: int, wanted: int) -> tuple[int, int]:
    """The number of segments, about as many as wanted, and their steps."""
    unit = max(16, KEEP)  # STEPS of kernels/gpu/scan.h
    steps = -(-length // (wanted * unit)) * unit
    return -(-length // steps), steps


def kept_states(inputs: ScanInputs) -> int:
    """The number of elements of the states that the forward pass keeps: [rows, blocks, chunks, CHANNELS, STATES]."""
    return _blocks(inputs.u) * -(-inputs.u.shape[3] // KEEP) * CHANNELS * STATES


def forward(inputs: ScanInputs, reverse_from: int, out: Tensor, last_state: Tensor, kept: Tensor) -> None:
    """Fills the output [B, D, L], the last states [G·B, D, N] and, unless it is empty, what is kept."""
    # Each direction has an output of its own [G, B, D, L]: blocks of different directions can't wait for each other.
    directions = len(inputs.u)
    per_direction = _writable(out.unsqueeze(0)) if directions == 1 else _like(inputs.u)
    made: dict[str, Tensor | None] = {"out": per_direction, "last_state": last_state, "kept": kept}
    _run("scan_forward.cu", "scan", inputs, reverse_from, {}, made)
    if directions == 2:
        torch.add(per_direction[0], per_direction[1], out=out)
    elif per_direction.data_ptr() != out.data_ptr():
        out.copy_(per_direction[0])


def backward(
    inputs: ScanInputs, reverse_from: int, dout: Tensor, kept: Tensor, du: Tensor, ddelta: Tensor, dz: Tensor | None
) -> tuple[Tensor, ...]:
    """Fills the gradients of u, delta and z. Returns those of A [D, N], B and C [G·B, L, N], D and delta_bias [D]."""
    u, A, D, delta_bias = inputs.u, inputs.A, inputs.D, inputs.delta_bias
    directions, batch, width, length = u.shape
    states, padded = A.shape[1], -(-width // CHANNELS) * CHANNELS
    wanted = {"du": du, "ddelta": ddelta} | ({"dz": dz} if dz is not None else {})
    written = {name: _writable(grad) for name, grad in wanted.items()}
    per_step = (directions * batch, length, STATES)
    shapes = {"dA": (padded, STATES), "dB": per_step, "dC": per_step, "dD": (padded,), "dbias": (padded,)}
    sums = {name: A.new_empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    torch._foreach_zero_(list(sums.values()))  # one kernel
    dout = dout.expand_as(u)  # the same for all directions: their stride is 0
    given: dict[str, Tensor | None] = {"dout": _readable(dout), "kept": kept}
    _run("scan_backward.cu", "scan_backward", inputs, reverse_from, given, {**written, **sums})
    for name, grad in wanted.items():
        if written[name] is not grad:
            grad.copy_(written[name])
    return (
        sums["dA"][:width, :states].to(A.dtype).contiguous(),
        sums["dB"][..., :states].contiguous(),
        sums["dC"][..., :states].contiguous(),
        sums["dD"][:width].to(A.dtype if D is None else D.dtype),
        sums["dbias"][:width].to(A.dtype if delta_bias is None else delta_bias.dtype),
    )


def _run(
    source: str,
    kernel: str,
    inputs: ScanInputs,
    reverse_from: int,
    given: dict[str, Tensor | None],
    made: dict[str, Tensor | None],
) -> None:
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, A_log = inputs
    sequences = {"u": u, "delta": delta, "B": B, "C": C, "z": z}
    parameters = {"A": A, "D": D, "bias": delta_bias}
    given |= {name: None if t is None else _readable(t) for name, t in sequences.items()}
    given |= {name: None if t is None else t.contiguous() for name, t in parameters.items()}
    processors = load_gpu.processors(u.device)
    wanted = segments(_blocks(u), u.shape[3], processors, backward=kernel == "scan_backward")
    load_gpu.run(_plan, given, made, source, kernel, wanted, reverse_from, delta_softplus, A_log)


def _plan(
    source: str, kernel: str, wanted: int, reverse_from: int, softplus: bool, A_log: bool, **tensors: Tensor | None
) -> load_gpu.Plan:
    u, A = tensors["u"], tensors["A"]
    assert u is not None
    assert A is not None
    _, batch, width, length = u.shape
    blocks = _blocks(u)
    sequences = {name: t for name, t in tensors.items() if name in _SEQUENCES and t is not None}
    aligned = int(all(load_gpu.in_quads(t.mT) for t in sequences.values()))
    module = load_gpu.module(source, u, DTYPE=load_gpu.DTYPES[u.dtype], ALIGNED=aligned, KEEP=KEEP)
    args = _Args(batch, width, length, A.shape[1], reverse_from, softplus=softplus, A_log=A_log)
    for name in ("A", "D", "bias"):
        parameter = tensors[name]
        setattr(args, f"{name}_dtype", 0 if parameter is None else load_gpu.DTYPES[parameter.dtype])
    for name, t in sequences.items():
        setattr(args, name, strided(t))
    args.segments, args.steps = count, _ = _in_segments(length, wanted)
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
