"""Within `plain_operators` a model is PyTorch's own operators: it can be exported, and differentiated in every way."""

import pytest
import timm
import torch
from emulated import emulate, needs_emulation
from torch import Tensor, nn

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.ops import plain_operators

NAMES = ("etmamba_ti", "etmamba_ti_ebs", "videomamba_ti")


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "num_classes": 5, "depth": 2}
    return timm.create_model(name, **sizes).eval()


def clips(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 2, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_results_are_the_same(name):
    model = small(name)
    parameters = list(model.parameters())
    with plain_operators():
        out = model(clips())
        grads = torch.autograd.grad(out.square().sum(), parameters)
    expected = model(clips())
    torch.testing.assert_close(out, expected)
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@needs_emulation
def test_tensors_of_a_gpu_as_well(monkeypatch):
    emulate(monkeypatch)
    model = small("etmamba_ti").train()
    with plain_operators():
        grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, clips()).sum())(
            dict(model.named_parameters())
        )
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_for_each_clip(name):
    """torch.func's vmap of grad."""
    model = small(name)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, clip):
        return torch.func.functional_call(model, parameters, clip[None]).square().sum()

    with plain_operators():
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, clips())
    for i, clip in enumerate(clips()):
        expected = torch.autograd.grad(model(clip[None]).square().sum(), list(model.parameters()))
        torch.testing.assert_close([grad[i] for grad in each.values()], list(expected), rtol=1e-4, atol=1e-5)


def test_second_derivatives():
    """Along a direction, against differences of the kernels' gradients; and by reverse and by forward mode alike."""
    model = small("etmamba_ti").double()
    x = clips(1).double().requires_grad_()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))

    def slope(x: Tensor, **options) -> Tensor:
        return torch.autograd.grad(model(x).square().sum(), x, **options)[0]

    with plain_operators():
        [found] = torch.autograd.grad((slope(x, create_graph=True) * direction).sum(), x)
        _, forwards = torch.func.jvp(torch.func.grad(lambda x: model(x).square().sum()), (x.detach(),), (direction,))
    step = 1e-5
    ahead, behind = (slope((x.detach() + s * direction).requires_grad_()) for s in (step, -step))
    expected = (ahead - behind) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    torch.testing.assert_close(forwards, found)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="needs PyTorch 2.7 or newer")
@pytest.mark.parametrize("name", NAMES)
def test_exported_programs_have_none_of_our_operators(name):
    model = small(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    with plain_operators(), torch.no_grad():
        program = torch.export.export(model, (clips(),), dynamic_shapes=({0: batch},), strict=False)
    assert not [node for node in program.graph.nodes if "etmamba" in str(node.target)]
    assert len(program.graph.nodes) < 1000  # the steps are a loop, and not unrolled
    for size in (1, 5):
        with torch.no_grad():
            torch.testing.assert_close(program.module()(clips(size)), model(clips(size)))


def test_the_kernels_are_back_afterwards():
    model, x = small("etmamba_ti"), clips()

    def operators() -> set[str]:
        program = torch.export.export(model, (x,), strict=False)
        return {str(node.target).split(".")[1] for node in program.graph.nodes if "etmamba" in str(node.target)}

    before = operators()
    with pytest.raises(KeyError), plain_operators():
        raise KeyError
    assert operators() == before
