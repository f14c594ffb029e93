"""From a clip to patches."""

import torch
from torch import nn

from etmamba_timm.layers.embed import PatchEmbed
from etmamba_timm.ops.kernels import load_gpu


def test_the_product_on_a_gpu_is_the_convolution(monkeypatch):
    embed = PatchEmbed(4, 3, 10, dtype=torch.float64)
    clip = torch.randn(2, 3, 5, 8, 12, dtype=torch.float64, requires_grad=True)
    inputs = [clip, embed.proj.weight, embed.proj.bias]
    results = []
    for devices in (load_gpu.DEVICES, ("cpu",)):  # the second takes the CPU for a GPU
        monkeypatch.setattr(load_gpu, "DEVICES", devices)
        out = embed(clip)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(results[1], results[0])
    assert results[1][0].shape == (2, 10, 5, 2, 3)


def test_another_convolution_is_called_on_a_gpu(monkeypatch):
    embed, clip = PatchEmbed(4, 3, 10), torch.randn(1, 3, 4, 8, 8)
    embed.proj = nn.Conv3d(3, 10, (2, 4, 4), stride=(2, 4, 4))
    monkeypatch.setattr(load_gpu, "DEVICES", ("cpu",))
    assert torch.equal(embed(clip), embed.proj(clip))


def test_a_wrapped_convolution_is_called_on_a_gpu(monkeypatch):
    embed, clip, calls = PatchEmbed(4, 3, 10), torch.randn(1, 3, 2, 8, 8), []
    monkeypatch.setattr(load_gpu, "DEVICES", ("cpu",))
    embed.proj.register_forward_hook(lambda *_: calls.append(1))
    embed(clip)
    embed.proj = nn.Sequential(embed.proj)
    embed(clip)
    assert len(calls) == 2
