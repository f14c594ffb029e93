"""EBS, the Efficient Bidirectional Sharing mixer (paper 3.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import bidirectional_scan
from .plain import in_autocast, plain_weights
from .recompute import Recomputing
from .ssm import conv_silu, dt_rank, init_dt, new_A_log, ssm


class Ebs(Recomputing):
    """A bidirectional Mamba mixer whose two directions share everything but their projections.

    `EBS = Lin_out(SSM_s(u_F) ⊗ SiLU(Fz) + SSM_s(u_B) ⊗ SiLU(Bz))` with `u_d = SiLU(Conv_s(PW_s(dx)))`. For the
    backward direction the convolution and the SSM run over the tokens in reverse order. Folded, `pw` is None, and in
    an STCM block `out_proj` too: the output is then [B, N, E].

    Args:
        dim: token width D.
        depth: blocks in the model; the output projection starts divided by √depth.
        d_state: state size of the SSM.
        expand: width of both directions together, in D; each has E = expand·D/2.
        d_conv: width of the short causal convolution; 0 leaves it out.
    """

    def __init__(
        self, dim: int, depth: int = 1, d_state: int = 16, expand: int = 2, d_conv: int = 4, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if expand * dim % 2:
            raise ValueError(f"expand·embed_dim is {expand * dim}; it must be even: half of it goes each direction")
        d_inner = expand * dim // 2
        rank = dt_rank(dim)
        self.depth, self.d_conv = depth, d_conv
        self.in_proj = nn.Linear(dim, 4 * d_inner, **dd)  # Fx, Bx, Fz, Bz
        self.pw: nn.Linear | None = nn.Linear(d_inner, d_inner, **dd)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, **dd) if d_conv else None
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(rank, d_inner, **dd)
        self.A_log = new_A_log(d_inner, d_state, **dd)
        self.D = nn.Parameter(torch.ones(d_inner, **dd))
        self.out_proj: nn.Linear | None = nn.Linear(d_inner, dim, **dd)

    def init_weights(self) -> None:
        """Mamba's Δ; the output projection divided by √depth. After the linear layers' own initialisation."""
        init_dt(self.dt_proj)
        if self.out_proj is not None:
            with torch.no_grad():
                self.out_proj.weight.div_(self.depth**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x: normalised tokens [B, N, D] -> [B, N, D]."""
        modules = [self.pw, self.conv1d, self.x_proj, self.dt_proj]
        y = self.recomputed(self._mix, modules, *self._project(x), parameters=("A_log", "D"))
        return y if self.out_proj is None else self.out_proj(y)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] -> x and z [B, N, 2, E], forwards and backwards; for PW_s, x has no gaps in memory."""
        weights = None if self.pw is None else plain_weights(self.in_proj, nn.Linear)
        if weights is None:
            xz = self.in_proj(x)
            x, z = xz.view(*xz.shape[:-1], 2, 2, -1).unbind(-3)
            return x, z
        (x_weight, z_weight), (x_bias, z_bias) = (in_autocast(x, w).chunk(2) for w in weights)
        x, z = F.linear(x, x_weight, x_bias), F.linear(x, z_weight, z_bias)
        return x.view(*x.shape[:-1], 2, -1), z.view(*z.shape[:-1], 2, -1)

    def _mix(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z: [B, N, 2, E] -> the gated sum of both directions [B, N, E]."""
        if self.pw is not None:
            x = self.pw(x)
        x, z = (t.permute(2, 0, 1, 3) for t in (x, z))  # [2, B, N, E]
        u = conv_silu(x, self.conv1d, self.d_conv)
        return ssm(bidirectional_scan, u, z, self.x_proj, self.dt_proj, self.A_log, self.D)
