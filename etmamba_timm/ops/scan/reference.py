"""The selective scan in plain PyTorch, one time step after another: what all other backends are tested against.

It needs only torch, can be differentiated any number of times, and is slow: a few operations a time step. In an
exported program it is one loop (ONNX's `Scan`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.choice import is_exporting
from .backend import Backend, ScanInputs, in_scan_order


@torch.compiler.disable  # a graph of L unrolled steps would help nobody
def scan(inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
    """`h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t`, `y_t = C_t·h_t + D u_t`, gated by `SiLU(z_t)`; see `Backend.scan`.

    The state is float32, or float64 where `A` is. It carries a gradient.
    """
    dtype = inputs.A.dtype
    u, delta, A, B, C, D, z, delta_bias, delta_softplus = inputs.with_sequences(
        lambda x: in_scan_order(x, reverse_from).to(dtype)
    )
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    delta_, x, B, C = (x.permute(2, 0, 1) for x in (delta, delta * u, B, C))  # [L, B, D] or [L, B, N]
    A = A.t()  # [N, D]: the channels are next to each other
    rates = A.expand(len(x), *A.shape)  # an exported loop sees only its arguments
    h, ys = _loop(
        _step,
        A.new_zeros(u.shape[0], *A.shape),
        (rates, delta_[:, :, None], x[:, :, None], B[..., None], C[:, :, None]),
    )
    y = ys.permute(1, 3, 2, 0).flatten(1, 2)  # [L, B, 1, D] -> [B, D, L]
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return in_scan_order(y, reverse_from).to(inputs.u.dtype), h.mT


BACKEND = Backend("reference", scan, forward_mode=True)


def _step(h: Tensor, step: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The next state [B, N, D], and the output [B, 1, D]; A [N, D]; delta, x [B, 1, D]; B [B, N, 1]; C [B, 1, N]."""
    A, delta, x, B, C = step
    h = torch.exp(delta * A) * h + x * B
    return h, C @ h


def _loop(body: Callable, h: Tensor, steps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """`h, y = body(h, (steps[0][t], steps[1][t], ...))` for each t: the last h, and all y stacked."""
    if is_exporting():
        from torch._higher_order_ops.scan import scan as loop

        return loop(body, h, tuple(x.contiguous() for x in steps))
    ys = []
    for step in zip(*(x.unbind() for x in steps), strict=True):
        h, y = body(h, step)
        ys.append(y)
    return h, torch.stack(ys)
