"""Which operators a block calls on whole sequences: nothing is copied between products, convolutions and scans."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from etmamba_timm.layers import BLOCKS, Stfp
from etmamba_timm.ops import scan_backends
from etmamba_timm.ops.kernels import choice, load_gpu

BATCH, GRID, WIDTH = 2, (4, 5, 5), 64
TOKENS = 1 + 4 * 5 * 5

NORM, LINEAR, CONV, SCAN = "norm", "addmm", "short_conv", "scan"
X_PROJ, DT_PROJ = "mm", "mm"
MIXED = [CONV, X_PROJ, DT_PROJ, SCAN]
LOCAL = [LINEAR, "local_conv", NORM]
EBS = [NORM, LINEAR, *MIXED]
OPERATORS = {
    # block, folded: what it calls. Unfolded, EBS projects x and z apart, so that PW_s finds x without gaps.
    ("ebs", False): [NORM, LINEAR, LINEAR, LINEAR, *MIXED, LINEAR, "add"],
    ("ebs", True): [NORM, LINEAR, *MIXED, LINEAR, "add"],
    ("stcm", False): [NORM, LINEAR, LINEAR, LINEAR, *MIXED, LINEAR, *LOCAL, LINEAR, "addmm_", "add"],
    ("stcm", True): [NORM, LINEAR, *MIXED, *LOCAL, LINEAR, "addmm_", "add"],
    ("bimamba", False): [NORM, "mm", *MIXED, *MIXED, "add", "mm", "add"],
}
NOT_COPIES = ("_unsafe_view", "empty_like", "empty", "new_empty")


class Operators(TorchDispatchMode):
    """The names of the operators that write for each token of the clip, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        first = out[0] if isinstance(out, tuple | list) else out
        copies = isinstance(first, torch.Tensor) and not func.is_view and name not in NOT_COPIES
        if copies and first.numel() % TOKENS == 0:  # of parameters, no number of elements is a multiple of 101
            self.names.append("norm" if name == "native_layer_norm" else name)
        return out


@pytest.mark.skipif(scan_backends()["cpu"] is not None, reason=f"the kernels can't run: {scan_backends()['cpu']}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize(("block", "folded"), OPERATORS)
def test_nothing_is_copied(monkeypatch, block, folded, where, dtype):
    if where == "gpu":  # only shapes: a fake tensor of the CPU goes the way of a GPU's
        monkeypatch.setattr(load_gpu, "DEVICES", ("cpu", "cuda"))
        monkeypatch.setattr(choice, "gpu_why_not", lambda device: None)
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        layer: nn.Module = BLOCKS[block](WIDTH, dtype=None if dtype == "autocast" else dtype).eval()
        if folded:
            layer.reparameterize()
        x = torch.empty(BATCH, TOKENS, WIDTH)  # the residual stream is always float32
        layer(x, GRID)  # autocast keeps the weights that it has cast
        with Operators() as operators:
            layer(x, GRID)
    assert operators.names == OPERATORS[block, folded]


@pytest.mark.skipif(scan_backends()["cpu"] is not None, reason=f"the kernels can't run: {scan_backends()['cpu']}")
def test_the_stem_is_four_operators():
    with FakeTensorMode(), torch.no_grad(), Operators() as operators:
        Stfp(3)(torch.empty(BATCH, 3, 4, 16, TOKENS))
    assert operators.names == ["conv_norm_relu"] * 4


def test_shapes_without_data():
    """Devices such as 'meta' have no autocast to ask for."""
    layer = BLOCKS["stcm"](WIDTH, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.empty(BATCH, TOKENS, WIDTH, device="meta"), GRID)
    assert (out.shape, out.dtype) == ((BATCH, TOKENS, WIDTH), torch.float32)
