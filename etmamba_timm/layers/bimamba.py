"""VideoMamba's bidirectional mixer, with an SSM of its own for each direction: the baseline."""

import torch
from torch import Tensor, nn

from ..ops import selective_scan
from .recompute import Recomputing
from .ssm import conv_silu, dt_rank, init_dt, new_A_log, ssm


class BiMamba(Recomputing):
    """Vision Mamba's "v2" mixer as VideoMamba has it; parameters of the backward direction end in `_b`.

    Args:
        dim: token width D.
        depth: blocks in the model; the output projection starts divided by √depth.
        d_state: state size of the SSMs.
        expand: width E of each direction, in D.
        d_conv: width of the short causal convolutions; 0 leaves them out.
    """

    def __init__(
        self, dim: int, depth: int = 1, d_state: int = 16, expand: int = 2, d_conv: int = 4, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        d_inner = expand * dim
        rank = dt_rank(dim)
        self.depth, self.d_conv = depth, d_conv
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=False, **dd)  # x, z
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, **dd) if d_conv else None
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(rank, d_inner, **dd)
        self.A_log = new_A_log(d_inner, d_state, **dd)
        self.D = nn.Parameter(torch.ones(d_inner, **dd))
        self.conv1d_b = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, **dd) if d_conv else None
        self.x_proj_b = nn.Linear(d_inner, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj_b = nn.Linear(rank, d_inner, **dd)
        self.A_b_log = new_A_log(d_inner, d_state, **dd)
        self.D_b = nn.Parameter(torch.ones(d_inner, **dd))
        self.out_proj = nn.Linear(d_inner, dim, bias=False, **dd)

    def init_weights(self) -> None:
        """Mamba's Δ; the output projection divided by √depth. After the linear layers' own initialisation."""
        init_dt(self.dt_proj)
        init_dt(self.dt_proj_b)
        with torch.no_grad():
            self.out_proj.weight.div_(self.depth**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x: normalised tokens [B, N, D] -> [B, N, D]."""
        x, z = self.in_proj(x).chunk(2, dim=-1)  # each [B, N, E]
        y = self.recomputed(self._forwards, [self.conv1d, self.x_proj, self.dt_proj], x, z, parameters=("A_log", "D"))
        y = y + self.recomputed(
            self._backwards, [self.conv1d_b, self.x_proj_b, self.dt_proj_b], x, z, parameters=("A_b_log", "D_b")
        )
        return self.out_proj(y)

    def _forwards(self, x: Tensor, z: Tensor) -> Tensor:
        u = conv_silu(x, self.conv1d, self.d_conv)
        return ssm(selective_scan, u, z, self.x_proj, self.dt_proj, self.A_log, self.D)

    def _backwards(self, x: Tensor, z: Tensor) -> Tensor:
        u = conv_silu(x, self.conv1d_b, self.d_conv, reverse=True)
        return ssm(selective_scan, u, z, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True)
