"""What `FlopCounterMode` counts for our operators, which it can't look into: two operations a multiply-add.

PyTorch knows `addmm`, but not `addmm_`, which the layers use as well.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula


def count_flops(operator: str, formula: Callable[..., int]) -> None:
    """Registers the operations of `etmamba_timm::{operator}`, and twice as many for `{operator}_backward`.

    Twice is the usual convention: what the backward pass recomputes isn't counted.

    Args:
        operator: its name, without the namespace.
        formula: takes arguments of either operator by name, with a shape for each tensor, and ignores the others.
    """
    _register(operator, formula, 1)
    _register(f"{operator}_backward", formula, 2)


def _register(operator: str, formula: Callable[..., int], passes: int) -> None:
    packet = getattr(torch.ops.etmamba_timm, operator)
    names = [argument.name for argument in packet.default._schema.arguments]

    def flops(*args: Any, **kwargs: Any) -> int:
        return passes * formula(**dict(zip(names, args, strict=False)), **kwargs)

    # PyTorch 2.4 files a formula under the operator's overloads, but looks for it under the packet.
    flop_registry.setdefault(packet, register_flop_formula(packet)(flops))


flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])
