"""How far float32 and bfloat16 autocast are from float64, output and gradients, in every row of the ablation."""

import copy

import pytest
import timm
import torch

# Largest of the logits' errors relative to the largest logit; norm of all gradients' errors relative to theirs.
BOUNDS = {"float32": (1e-5, 1e-5), "bfloat16": (2e-2, 1e-2)}


def run(model: torch.nn.Module, clip: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and all gradients in a row, in float64."""
    logits = model(clip)
    (logits.to(weight.dtype) * weight).sum().backward()
    return logits.detach().double(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", ["etmamba_ti", "etmamba_ti_ebs", "videomamba_ti", "videomamba_ti_stfp"])
def test_against_float64(name, precision):
    sizes = {"depth": 4, "embed_dim": 64, "img_size": 64, "num_frames": 4, "num_classes": 11}
    model = timm.create_model(name, **sizes, global_pool="avg", drop_path_rate=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    clip, weight = torch.randn(2, 3, 4, 64, 64), torch.randn(2, 11)
    wanted_logits, wanted_grads = run(copy.deepcopy(model).double(), clip.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        logits, grads = run(model, clip, weight)
    of_logits, of_grads = BOUNDS[precision]
    assert (logits - wanted_logits).abs().max() <= of_logits * wanted_logits.abs().max()
    assert (grads - wanted_grads).norm() <= of_grads * wanted_grads.norm()
