"""Multiply-adds: against PyTorch's own counter, the spec of the models, and VideoMamba's published figure."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from etmamba_timm.models import VARIANTS, count_cost
from etmamba_timm.ops import scan_backends


@pytest.mark.parametrize("d_conv", [4, 0])
@pytest.mark.parametrize("name", [name for name in VARIANTS if "_ti" in name])
def test_agrees_with_pytorchs_counter(name, d_conv):
    """With the kernels its counter sees the scan as well; without them, all but the scan."""
    model = timm.create_model(name, depth=2, img_size=(32, 48), num_frames=3, num_classes=11, d_conv=d_conv)
    for frames, height, width in ((3, 32, 48), (5, 64, 32)):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, frames, height, width))
        cost = count_cost(model, frames, (height, width))
        seen = cost.total_macs if scan_backends()["cpu"] is None else cost.macs
        assert 2 * seen == counter.get_total_flops()


def test_attention_pooling_agrees_too():
    model = timm.create_model("etmamba_ti", depth=2, img_size=32, num_frames=3, num_classes=11, global_pool="map")
    model.attn_pool.fused_attn = False  # PyTorch's counter misses its fused attention on CPUs
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 5, 64, 32))
    cost = count_cost(model, 5, (64, 32))
    seen = cost.total_macs if scan_backends()["cpu"] is None else cost.macs
    assert 2 * seen == counter.get_total_flops()


def test_a_backward_pass_counts_twice():
    model = timm.create_model("etmamba_ti", depth=2, img_size=32, num_frames=3, num_classes=11)
    clip = torch.randn(1, 3, 3, 32, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(clip).sum().backward()
    seen = count_cost(model).total_macs if scan_backends()["cpu"] is None else count_cost(model).macs
    assert 6 * seen == counter.get_total_flops()


@pytest.mark.parametrize(("name", "giga"), [("etmamba_ti", 28), ("etmamba_s", 109), ("etmamba_m", 323)])
def test_default_clip(name, giga):
    cost = count_cost(timm.create_model(name, device="meta"))
    assert round(cost.macs / 1e9) == giga
    assert cost.tokens == 3137


def test_videomambas_convention_gives_its_figure():
    """VideoMamba-M, 16 frames: 2.424 T for 12 views, 202 G each."""
    cost = count_cost(timm.create_model("videomamba_m", device="meta"))
    assert cost.videomamba_macs / 1e9 == pytest.approx(202, rel=0.005)
    assert round(cost.macs / 1e9) == 226


def test_scan_by_hand():
    model = timm.create_model("etmamba_ti", depth=1, img_size=32, num_frames=2, embed_dim=16)
    tokens, channels, states = 1 + 2 * 4, 16, 16
    assert count_cost(model).scan_macs == 2 * tokens * channels * (4 * states + 3)
    assert count_cost(model).total_macs == count_cost(model).macs + count_cost(model).scan_macs
