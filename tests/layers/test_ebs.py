"""EBS on the CPU: nothing is copied between the projection, the scan and the gate."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from etmamba_timm.layers import EbsBlock
from etmamba_timm.ops import scan_backends


class Copies(TorchDispatchMode):
    """The names of the operators that copy at least `size` elements."""

    NAMES = ("cat", "clone", "_to_copy", "copy_", "contiguous", "stack", "flip", "constant_pad_nd", "index")

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seen = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.NAMES and out.numel() >= self.size:
            self.seen.append(name)
        return out


@pytest.mark.skipif(scan_backends()["cpu"] is not None, reason=f"the kernels can't run: {scan_backends()['cpu']}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_copied(dtype):
    block = EbsBlock(64)
    block.reparameterize()
    x = torch.randn(2, 51, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        normalised = block.norm(x).to(dtype)
        block.mixer(normalised)  # autocast keeps the weights that it has cast
        with Copies(x.numel()) as copies:
            block.mixer(normalised)
    assert copies.seen == []
