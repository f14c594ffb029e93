"""`torch.compile` of whole models: one graph, also for other batches and numbers of frames, forward and backward."""

import pytest
import timm
import torch
from torch._dynamo.utils import counters

import etmamba_timm  # noqa: F401

SMALL = {"img_size": 32, "num_frames": 4, "embed_dim": 16, "num_classes": 5, "drop_path_rate": 0.0}
# Sizes that are equal in the first clips are taken for one number: a batch of 3 would be the number of channels.
SHAPES = [(5, 3, 2, 32, 32), (4, 3, 2, 32, 32), (5, 3, 7, 32, 32)]


def small(name: str, **arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL | arguments))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["videomamba_ti", "etmamba_ti"])
def test_training_with_any_batch_and_number_of_frames_is_one_graph(name):
    model = small(name, depth=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in SHAPES:
        x = torch.randn(shape)
        grads = [torch.autograd.grad(f(x).square().sum(), list(model.parameters())) for f in (compiled, model)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert graphs() == 1


def test_inference_of_a_folded_model_in_bfloat16_is_one_graph():
    model = small("etmamba_ti", depth=1).eval().fold().bfloat16()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for shape in [*SHAPES, (3, 3, 4, 48, 32)]:
            x = torch.randn(shape).bfloat16()
            torch.testing.assert_close(compiled(x), model(x))
    assert graphs() <= 2  # the square has a graph of its own, in which height and width are one number


def test_recomputed_blocks_are_in_the_graph():
    model = small("etmamba_ti", depth=2).train()
    model.set_grad_checkpointing(every=2)
    x = torch.randn(SHAPES[0])
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.compile(backend="aot_eager", fullgraph=True)
    assert set(model.state_dict()) == set(small("etmamba_ti", depth=2).state_dict())
    grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)
    assert graphs() == 1


def test_what_to_use_instead_of_torchscript():
    model = small("videomamba_ti", depth=1).eval()
    with pytest.warns(torch.jit.TracerWarning, match="wrong for clips of another shape; use torch.export"):
        torch.jit.trace(model, torch.randn(1, 3, 2, 32, 32), check_trace=False)
    with pytest.raises(RuntimeError, match="torch.jit.script can't compile this model; use torch.export"):
        torch.jit.script(model)
