"""What EBS and BiMamba share: Mamba's short convolution, its initialisation, and the call of the scan."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import short_conv


def conv_silu(x: Tensor, conv: nn.Conv1d | None, reverse: bool = False) -> Tensor:
    """Mamba's short convolution, then SiLU; None for the convolution leaves SiLU alone. See `short_conv` for shapes."""
    return F.silu(x) if conv is None else short_conv(x, conv.weight, conv.bias, reverse)


def ssm(
    scan: Callable[..., Tensor],
    u: Tensor,
    z: Tensor,
    x_proj: nn.Linear,
    dt_proj: nn.Linear,
    A_log: Tensor,
    D: Tensor,
    **scan_args,
) -> Tensor:
    """The selective SSM: Δ, B and C are projections of its input, the scan runs, and z gates the result.

    Args:
        scan: `selective_scan` or `bidirectional_scan`.
        u, z: input and gate [B, N, E], or [2, B, N, E] for both directions.
        x_proj: E -> R + 2S, the low-rank Δ, then B, then C, for state size S.
        dt_proj: R -> E; its bias is added within the scan.
        A_log [E, S], D [E]: kept in float32 in the scan (float64 in a float64 model), as is dt_proj's bias.

    Returns: [B, N, E].
    """
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    rank, d_state = dt_proj.in_features, A_log.shape[1]
    low_rank, b, c = x_proj(u).split([rank, d_state, d_state], dim=-1)
    delta = F.linear(low_rank, dt_proj.weight)
    y = scan(
        u.mT,  # [B, N, E] -> [B, E, N], a view
        delta.mT,
        -torch.exp(A_log.to(state_dtype)),
        b.mT,
        c.mT,
        D=D.to(state_dtype),
        z=z.mT,
        delta_bias=dt_proj.bias.to(state_dtype),
        delta_softplus=True,
        **scan_args,
    )
    return y.mT


@torch.no_grad()
def init_dt(dt_proj: nn.Linear) -> None:
    """Mamba's initialisation: weights uniform within ±R^-½; softplus of the bias log-uniform in [0.001, 0.1]."""
    bound = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -bound, bound)
    dt = torch.empty_like(dt_proj.bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
    dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def new_A_log(d_inner: int, d_state: int, device=None, dtype=None) -> nn.Parameter:
    """Mamba's initialisation of A (S4D-real): A = -[1, 2, …, d_state] in every channel. [E, S]."""
    steps = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
    return nn.Parameter(steps.log().to(dtype or torch.get_default_dtype()).repeat(d_inner, 1))


def dt_rank(dim: int) -> int:
    """Mamba's rank of Δ: ⌈D/16⌉."""
    return math.ceil(dim / 16)
