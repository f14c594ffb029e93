"""What training on a GPU keeps for the backward pass: on the emulated kernels, and in bytes by shapes alone."""

import gc

import pytest
import timm
import torch
from emulated import emulate, needs_emulation
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.layers import BLOCKS, Recomputing

NAMES = ("etmamba_ti", "etmamba_ti_ebs", "videomamba_ti")

pytestmark = needs_emulation


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    """Tensors of the CPU are taken for a GPU's."""
    emulate(monkeypatch)


class Calls(TorchDispatchMode):
    """Counts the calls of an operator, and adds up the memory of results that are still needed."""

    def __init__(self, operator: str = "scan") -> None:
        super().__init__()
        self.operator, self.count = operator, 0
        self.made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += func.overloadpacket.__name__ == self.operator
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made.append((StorageWeakRef(storage), storage.nbytes()))
        return out

    def kept(self) -> int:
        """Bytes."""
        gc.collect()
        return sum({ref.cdata: size for ref, size in self.made if not ref.expired()}.values())


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "num_classes": 5, "depth": 2}
    return timm.create_model(name, **sizes, drop_path_rate=0.0).train()


def clip() -> Tensor:
    return torch.randn(2, 3, 2, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(clip()).square().sum(), list(model.parameters()))


def set_recomputes(model: nn.Module, value: bool) -> None:
    for module in model.modules():
        if isinstance(module, Recomputing):
            module.recomputes = value


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same(name, autocast):
    model = small(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Calls() as again:
            grads = gradients(model)
        set_recomputes(model, False)
        with Calls() as once:
            expected = gradients(model)
    assert again.count == 2 * once.count > 0
    # The kernels add up the gradients of parameters in no fixed order.
    torch.testing.assert_close(grads, expected, rtol=3e-2 if autocast else 1e-4, atol=1e-2 if autocast else 1e-5)


@pytest.mark.parametrize(
    ("block", "folded", "most"),
    [("stcm", False, 290), ("stcm", True, 260), ("ebs", False, 235), ("bimamba", False, 260)],
)
def test_what_a_block_keeps(block, folded, most):
    """In MiB, its output among it, for 8 clips of 16×224² in ETMamba-M, bfloat16 autocast."""

    def kept(recomputes: bool) -> float:
        with FakeTensorMode():
            layer = BLOCKS[block](576)
            if folded:
                layer.reparameterize()
            set_recomputes(layer, recomputes)
            x = torch.empty(8, 3137, 576, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
                out = layer(x, (16, 14, 14))
            assert out.shape == x.shape
            return calls.kept() / 2**20

    assert kept(True) < most < kept(False) / 2


def test_a_block_that_is_recomputed_as_a_whole_is_so_once():
    model = small("etmamba_ti")
    expected = gradients(model)
    model.set_grad_checkpointing(every=2)
    with Calls() as calls:
        grads = gradients(model)
    assert calls.count == 2 * len(model.blocks)
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)
    model.set_grad_checkpointing(False)
    assert all(module.recomputes for module in model.modules() if isinstance(module, Recomputing))


def test_modules_with_hooks_are_called_once():
    model, seen = small("etmamba_ti"), []
    model.blocks[0].mixer.x_proj.register_forward_hook(lambda *_: seen.append("x_proj"))
    model.blocks[0].local.conv5.register_forward_hook(lambda *_: seen.append("conv5"))
    gradients(model)
    assert seen == ["x_proj", "conv5"]


def test_inference_recomputes_nothing():
    model = small("etmamba_ti").eval()
    with torch.no_grad(), Calls() as calls:
        model(clip())
    assert calls.count == len(model.blocks)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_have_no_checkpoints(strict):
    model = small("etmamba_ti").eval()
    program = torch.export.export(model, (clip(),), strict=strict)
    torch.testing.assert_close(program.module()(clip()), model(clip()))
    assert not [node for node in program.graph.nodes if "checkpoint" in str(node.target)]


@pytest.mark.parametrize("name", ["etmamba_ti", "videomamba_ti"])
def test_compiled_as_one_graph(name):
    model = small(name)
    expected = gradients(model)
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-5)
