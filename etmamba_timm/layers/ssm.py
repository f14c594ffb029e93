"""What EBS and BiMamba share: Mamba's short convolution, its initialisation, and the call of the scan."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import on_gpu, short_conv
from .plain import is_plain, plain_conv, plain_weights


def conv_silu(x: Tensor, conv: nn.Module | None, d_conv: int, reverse: bool = False) -> Tensor:
    """Mamba's short convolution, then SiLU; without a convolution, SiLU alone.

    Args:
        x: [B, N, E], or [2, B, N, E] for both directions, forwards and backwards, with shared weights.
        conv: an `nn.Conv1d` of E channels without padding, or what replaced it; it is called on [B, E, N + d_conv - 1].
        d_conv: its width.
        reverse: whether [B, N, E] is convolved from the last step to the first.

    Returns: as x.
    """
    if conv is None:
        return F.silu(x)
    if weights := plain_conv(conv, nn.Conv1d, (x.shape[-1], 1, d_conv)):
        return short_conv(x, *weights, reverse)
    if x.ndim == 4:
        both = _called_conv(torch.cat([x[0], x[1].flip(1)]), conv, d_conv)  # [2B, N, E]
        forward, backward = both.unflatten(0, (2, -1))
        return torch.stack([forward, backward.flip(1)])
    return _called_conv(x.flip(1), conv, d_conv).flip(1) if reverse else _called_conv(x, conv, d_conv)


def _called_conv(x: Tensor, conv: nn.Module, d_conv: int) -> Tensor:
    y = conv(F.pad(x.mT, (d_conv - 1, 0)))  # [B, N, E] -> [B, E, N + d_conv - 1] -> [B, E, N]
    return F.silu(y.mT).to(x.dtype)


def ssm(
    scan: Callable[..., Any],
    u: Tensor,
    z: Tensor,
    x_proj: nn.Module,
    dt_proj: nn.Module,
    A_log: Tensor,
    D: Tensor,
    **scan_args: Any,
) -> Tensor:
    """The selective SSM: Δ, B and C are projections of its input, the scan runs, and z gates the result.

    Args:
        scan: `selective_scan` or `bidirectional_scan`.
        u, z: input and gate [B, N, E], or [2, B, N, E] for both directions.
        x_proj: E -> R + 2S, the low-rank Δ, then B, then C, for state size S.
        dt_proj: R -> E. The bias of a plain `nn.Linear` is added within the scan; any other module is called.
        A_log [E, S], D [E]: kept in float32 in the scan (float64 in a float64 model), as is a plain dt_proj's bias.

    Returns: [B, N, E].
    """
    d_state = A_log.shape[1]
    weights = plain_weights(dt_proj, nn.Linear)
    dt_weight = weights[0] if weights else None
    if dt_weight is not None and on_gpu(u) and is_plain(x_proj, nn.Linear):
        projected, dt_weight = _in_eights(u, x_proj, dt_weight)
    else:
        projected = x_proj(u)
    projected = projected.to(u.dtype)  # under autocast, what a wrapper returns may differ
    low_rank, b, c = projected.split([projected.shape[-1] - 2 * d_state, d_state, d_state], dim=-1)
    delta_bias = None
    if weights and dt_weight is not None:
        delta, delta_bias = F.linear(low_rank, dt_weight), weights[1]
    else:
        delta = dt_proj(low_rank)
    y = scan(
        u.mT,  # [B, N, E] -> [B, E, N], a view
        delta.to(u.dtype).mT,
        A_log,
        b.mT,
        c.mT,
        D=D,
        z=z.to(u.dtype).mT,
        delta_bias=delta_bias,
        delta_softplus=True,
        A_log=True,
        **scan_args,
    )
    return y.mT


def _in_eights(u: Tensor, x_proj: nn.Module, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """`x_proj(u)` and the weight of dt_proj, with the rank of Δ filled up to a multiple of 8.

    A GPU's matrix units need rows of whole 16 bytes: with ETMamba-M's 36 columns, products are several times slower.
    What is added to Δ's columns doesn't matter, since dt_proj's weight is 0 there.
    """
    weight, rank = cast(Tensor, x_proj.weight), dt_weight.shape[1]
    if more := -rank % 8:
        of_delta, of_b_and_c = weight.split([rank, len(weight) - rank])
        filling = weight.detach()[:more] if len(weight) >= more else weight.new_zeros(more, weight.shape[1])
        weight = torch.cat([of_delta, filling, of_b_and_c])
        dt_weight = F.pad(dt_weight, (0, more))
    return F.linear(u, weight), dt_weight


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
