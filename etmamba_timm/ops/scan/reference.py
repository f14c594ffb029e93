"""The selective scan in plain PyTorch, one time step after another: the definition that other backends are held to.

It needs nothing but torch, is differentiable as often as you like, and slow: a few operations a time step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not() -> str | None:
    """None: plain PyTorch runs everywhere."""
    return None


def rejects(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D, z, delta_bias) -> str | None:
    """None: every argument that the public function lets through is fine."""
    return None


@torch.compiler.disable  # a graph of L unrolled steps would help nobody
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
    """`h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t`, `y_t = C_t·h_t + D u_t`, gated by `SiLU(z_t)`.

    Shapes are those of `selective_scan`. Batch rows `reverse_from:` run from the last time step to the first.
    The state is float32, or float64 where `A` is.

    Returns: the output [B, D, L] in `u`'s dtype, the state after the last step taken [B, D, N] in `A`'s dtype.
    """
    dtype, out_dtype = A.dtype, u.dtype
    u, delta, B, C = (_in_scan_order(t, reverse_from).to(dtype) for t in (u, delta, B, C))
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
    y = _in_scan_order(y, reverse_from)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out_dtype), h


def _in_scan_order(x: Tensor, reverse_from: int) -> Tensor:
    """Turns the rows `reverse_from:` of x [B, ..., L] back to front; its own inverse."""
    if reverse_from == 0:
        return x.flip(-1)
    if reverse_from < x.shape[0]:
        return torch.cat([x[:reverse_from], x[reverse_from:].flip(-1)])
    return x
