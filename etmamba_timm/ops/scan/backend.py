"""What a scan takes, and what a backend of the scan offers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.choice import has_tangent, state_dtype


class ScanInputs(NamedTuple):
    """The arguments of a scan of B sequences with D channels, L time steps and N states a channel.

    The sequences u, delta, B, C and z share a dtype: float32, bfloat16, float16 or float64. The parameters A, D and
    delta_bias are float32, or float64 if the sequences are; with `A_log` each may have any of the four. Strides are
    free; all tensors are on one device.

    For both directions in one call the sequences are [2, B, ...], and the directions share the parameters.
    """

    u: Tensor  # the input [B, D, L]
    delta: Tensor  # the step sizes Δ, before bias and softplus [B, D, L]
    A: Tensor  # the state matrix's diagonal [D, N]
    B: Tensor  # how the input enters the state [B, N, L]
    C: Tensor  # how the state is read [B, N, L]
    D: Tensor | None = None  # the skip connection [D]
    z: Tensor | None = None  # the gate [B, D, L]
    delta_bias: Tensor | None = None  # added to delta [D]
    delta_softplus: bool = False  # whether Δ = softplus(delta + delta_bias)
    A_log: bool = False  # whether A is given as log(-A)

    def with_sequences(self, change: Callable[[Tensor], Tensor]) -> "ScanInputs":
        """The same inputs with every sequence changed."""
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, A_log = self
        z = None if z is None else change(z)
        return ScanInputs(change(u), change(delta), A, change(B), change(C), D, z, delta_bias, delta_softplus, A_log)

    def without_A_log(self) -> "ScanInputs":
        """The same inputs with A itself and parameters in the dtype of states."""
        if not self.A_log:
            return self
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, _ = self
        dtype = state_dtype(u.dtype)
        D, delta_bias = (None if t is None else t.to(dtype) for t in (D, delta_bias))
        return ScanInputs(u, delta, -torch.exp(A.to(dtype)), B, C, D, z, delta_bias, delta_softplus)


def _nothing(*_: ScanInputs) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute the scan: a row of `selective_scan.BACKENDS`.

    Attributes:
        name: as users write it.
        scan: takes inputs and a batch index, and returns the output [B, D, L] in u's dtype and the last state [B, D, N]
            in float32 or float64. Sequences from the index on run from the last time step to the first; the output
            stays in the input's order. The last state is the one after the last step taken, and may carry no gradient.
        both: takes inputs with two directions, the first forwards and the second backwards, and returns the sum of
            their outputs [B, D, L]. Without it, `scan` gets the two directions as one batch.
        devices: the device types that it is made for; none for any device.
        why_not: why this machine can't run it, with the remedy, or None. May be slow at its first call.
        limits: why it can't take inputs on its own devices, with the remedy, or None. Cheap.
        forward_mode: whether it has a forward-mode derivative.
        takes_A_log: whether it takes inputs with `A_log`; otherwise it gets A itself.
    """

    name: str
    scan: Callable[[ScanInputs, int], tuple[Tensor, Tensor]]
    both: Callable[[ScanInputs], Tensor] | None = None
    devices: tuple[str, ...] = ()
    why_not: Callable[[], str | None] = _nothing
    limits: Callable[[ScanInputs], str | None] = _nothing
    forward_mode: bool = False
    takes_A_log: bool = False

    def rejects(self, inputs: ScanInputs) -> str | None:
        """Why it can't take these inputs, with the remedy, or None."""
        device = inputs.u.device
        if self.devices and device.type not in self.devices:
            return f"the tensors are on {device}; move them to a {self.devices[0]} device"
        if not self.forward_mode and has_tangent(*inputs[:8]):
            return "it has no forward-mode derivative; 'auto' takes a backend that has"
        return self.limits(inputs)


def in_scan_order(x: Tensor, reverse_from: int) -> Tensor:
    """Turns the rows `reverse_from:` of x [B, ..., L] back to front; its own inverse."""
    if reverse_from == 0:
        return x.flip(-1)
    if reverse_from < x.shape[0]:
        return torch.cat([x[:reverse_from], x[reverse_from:].flip(-1)])
    return x
