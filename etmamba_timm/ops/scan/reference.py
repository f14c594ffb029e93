"""The selective scan in plain PyTorch, one time step after another: what all other backends are tested against.

It needs only torch, can be differentiated any number of times, and is slow: a few operations a time step. In an
exported program it is one loop (ONNX's `Scan`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.choice import is_exporting
from .backend import Backend, ScanInputs


@torch.compiler.disable  # a graph of L unrolled steps would help nobody
def scan(inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
    """`h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t`, `y_t = C_t·h_t + D u_t`, gated by `SiLU(z_t)`; see `Backend.scan`.

    The state is float32, or float64 where `A` is. It carries a gradient.
    """
    dtype = inputs.A.dtype

    def turn(x: Tensor) -> Tensor:  # the rows that run backwards; x [L, B, ...]
        return torch.cat([x[:, :reverse_from], x[:, reverse_from:].flip(0)], 1) if reverse_from < x.shape[1] else x

    u, delta, A, B, C, D, z, delta_bias, delta_softplus, _ = inputs.with_sequences(
        lambda x: turn(x.permute(2, 0, 1).to(dtype))  # [B, R, L] -> [L, B, R]
    )
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    A = A.t().contiguous()  # [N, D]: the channels are next to each other

    def step(h: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The next state [B, N, D], and the output [B, 1, D]; delta, x [B, 1, D]; B [B, N, 1]; C [B, 1, N]."""
        delta, x, B, C = now
        h = torch.exp(delta * A) * h + x * B
        return h, C @ h

    rows, columns = (delta[:, :, None], (delta * u)[:, :, None]), (B[..., None], C[:, :, None])
    h, ys = _loop(step, A.new_zeros(u.shape[1], *A.shape), rows + columns)
    y = ys.squeeze(2)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return turn(y).permute(1, 2, 0).to(inputs.u.dtype), h.mT


BACKEND = Backend("reference", scan, forward_mode=True)


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
