"""The selective scan in plain PyTorch, one time step after another: what all other backends are tested against.

It needs only torch, can be differentiated any number of times, and is slow: a few operations a time step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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

    h = A.new_zeros(u.shape[0], *A.shape)  # [B, D, N]
    ys = []
    for t in range(u.shape[-1]):
        delta_t = delta[:, :, t, None]
        h = torch.exp(delta_t * A) * h + delta_t * u[:, :, t, None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
    y = torch.stack(ys, dim=-1)  # [B, D, L]
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return in_scan_order(y, reverse_from).to(inputs.u.dtype), h


BACKEND = Backend("reference", scan, forward_mode=True)
