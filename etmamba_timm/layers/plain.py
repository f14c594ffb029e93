"""Which submodules a fused kernel may stand in for.

Some kernels of `ops` compute in one go what several submodules would compute in turn. They read the weights, so these
submodules' own forward never runs. That is right for a plain module and wrong for one that was wrapped, replaced, or
given hooks: adapters, quantisation, pruning, parametrisations and hooks all act on calls. The layers therefore ask
here for the weights of each submodule that a kernel would fuse. If one of them isn't plain, all of that group are
called, with PyTorch's operations between them.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

Weights = tuple[Tensor, Tensor]

_GLOBAL_HOOKS = (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)


def plain_weights(module: nn.Module, kind: type[nn.Module]) -> Weights | None:
    """Weight and bias of a plain module, or None for a module that has to be called, or has no bias."""
    if not is_plain(module, kind):
        return None
    weight, bias = module.weight, module.bias
    return None if weight is None or bias is None else (cast(Tensor, weight), cast(Tensor, bias))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's call is what its class and weights say.

    Plain means: of exactly the type `kind` (a parametrisation changes the type), with no hooks on its call, and with
    its class's forward. Hooks that are registered for all modules at once count as well, except those of PyTorch's own
    trackers (of `FlopCounterMode`, say). These only watch, and what they measure should be what the model runs without
    them.
    """
    return not (
        type(module) is not kind
        or "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (_any_global_hooks() and not all(_is_pytorchs(hook) for hooks in _GLOBAL_HOOKS for hook in hooks.values()))
    )


def _any_global_hooks() -> bool:
    # Not any(_GLOBAL_HOOKS): PyTorch 2.4 can't compile that.
    return bool(
        _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
    )


def plain_conv(
    conv: nn.Module, kind: type[nn.Module], shape: tuple[int, ...], padding: int = 0, dilation: int = 1
) -> Weights | None:
    """`plain_weights` of a convolution with this shape of weight, padding with zeros, and stride 1; else None."""
    weights = plain_weights(conv, kind)
    if weights is None or weights[0].shape != shape or conv.padding_mode != "zeros":
        return None
    dims = len(shape) - 2
    as_wanted = conv.stride == (1,) * dims and conv.padding == (padding,) * dims and conv.dilation == (dilation,) * dims
    return weights if as_wanted else None


def in_autocast(x: Tensor, weight: Tensor) -> Tensor:
    """A weight as autocast would hand it to a product with x: for weights of which each product takes a part.

    Autocast would cast every part for itself, and each part's gradient back.
    """
    kind = x.device.type
    if x.is_meta or weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return weight
    return weight.to(torch.get_autocast_dtype(kind))


def _is_pytorchs(hook: object) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.")
