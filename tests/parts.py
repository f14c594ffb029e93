"""Small models and single parts of them, with all of their weights drawn, and what tests of layers do with them."""

import pytest
import timm
import torch
from torch import Tensor, nn

import etmamba_timm  # noqa: F401 (registers the models)
from etmamba_timm.layers import BiMambaBlock, EbsBlock, StcmBlock, Stfp
from etmamba_timm.ops import scan_backends

TOLERANCE = 1e-10  # in float64, relative to the largest value
GRID = (2, 3, 4)
TOKENS, CLIP = (2, 25, 20), (2, 3, 3, 5, 7)
PARTS = {
    "stfp": lambda: Stfp(3),
    "stcm": lambda: StcmBlock(20),
    "stcm, folded": lambda: folded(StcmBlock(20)),
    "stcm, d_conv=2": lambda: StcmBlock(20, d_conv=2),
    "ebs": lambda: EbsBlock(20),
    "ebs, folded": lambda: folded(EbsBlock(20)),
    "ebs, d_conv=0": lambda: EbsBlock(20, d_conv=0),
    "bimamba": lambda: BiMambaBlock(20),
    "bimamba, d_conv=0": lambda: BiMambaBlock(20, d_conv=0),
}
MODELS = ("videomamba_ti", "videomamba_ti_stfp", "etmamba_ti_ebs", "etmamba_ti")
SMALL = {"depth": 2, "embed_dim": 32, "img_size": 32, "num_frames": 3, "num_classes": 5, "global_pool": "avg"}
needs_kernels = pytest.mark.skipif(
    scan_backends()["cpu"] is not None, reason=f"the kernels can't run: {scan_backends()['cpu']}"
)


def folded(block: nn.Module) -> nn.Module:
    block.reparameterize()
    return block


def drawn(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module with noise on all of its parameters, so that nothing hides behind an initial 0 or 1."""
    module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def small(name: str = "etmamba_ti", dtype: torch.dtype = torch.float64, **kwargs) -> nn.Module:
    return drawn(timm.create_model(name, **(SMALL | kwargs)), dtype).eval()


def clip(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 3, 32, 32, dtype=dtype)


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules with weights, by name."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def run_part(part: nn.Module, x: Tensor) -> Tensor:
    return part(x) if isinstance(part, Stfp) else part(x, GRID)


def part_input(part: nn.Module) -> Tensor:
    return torch.randn(CLIP if isinstance(part, Stfp) else TOKENS, dtype=torch.float64, requires_grad=True)


def look(module, args, output) -> None:
    """A forward hook that changes nothing."""


def assert_close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    assert a.dtype == b.dtype
    assert b.any()
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces a submodule."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


class Half(nn.Module):
    """Half of what the wrapped module gives; it has no attribute of it."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x) * 0.5
