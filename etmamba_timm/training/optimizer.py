"""A recipe's optimiser and learning rates, and updates that are skipped on the device."""

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..models import EtMamba
from .recipe import Recipe

# PyTorch's optimisers that can skip a step on the device without a trace, as fused kernels. SGD leaves its momentum
# uninitialised if the first step is skipped; the others, timm's among them, count their steps on the host.
SKIP_ON_DEVICE = (torch.optim.Adam, torch.optim.AdamW)


def head_of(model: EtMamba) -> nn.ModuleList:
    """What `freeze_backbone` leaves to be trained: attention pooling if there is one, dropout and classifier."""
    return nn.ModuleList(filter(None, (model.attn_pool, model.head_drop, model.get_classifier())))


def new_optimizer(recipe: Recipe, model: nn.Module, accelerator: Accelerator) -> torch.optim.Optimizer:
    """The recipe's optimiser; as a fused kernel where it is one of `SKIP_ON_DEVICE`.

    Raises:
        TypeError, ValueError: an unknown optimiser, or arguments that it doesn't take.
    """
    can_skip = get_optimizer_class(recipe.opt, bind_defaults=False) in SKIP_ON_DEVICE
    is_fused = can_skip and accelerator.device.type in ("cpu", "cuda")
    return create_optimizer_v2(
        model,
        recipe.opt,
        lr=recipe.scaled(recipe.lr, accelerator.num_processes),
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        layer_decay=None if recipe.layer_decay == 1 else recipe.layer_decay,
        **({"fused": True} if is_fused else {}) | recipe.opt_args,
    )


def new_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, updates: int, processes: int) -> CosineLRScheduler:
    """Linear warm-up, then cosine decay; stepped after each of `updates` updates an epoch."""
    warmup = round(recipe.warmup_epochs * updates)
    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * updates - warmup,
        lr_min=recipe.scaled(recipe.min_lr, processes),
        warmup_t=warmup,
        warmup_lr_init=recipe.scaled(recipe.warmup_lr, processes),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def step_if(optimizer: AcceleratedOptimizer, is_finite: Tensor) -> None:
    """Steps, or changes nothing if the gradient isn't finite.

    `SKIP_ON_DEVICE` do this without a wait of the host for the device; for others, `is_finite` (a scalar) is read.
    """
    inner = optimizer.optimizer
    if optimizer.scaler is not None:  # it skips the step itself, and lowers its scale
        optimizer.step()
    elif type(inner) in SKIP_ON_DEVICE and inner.defaults["fused"]:
        inner.found_inf = is_finite.logical_not().float()  # as torch.amp.GradScaler hands it over
        try:
            optimizer.step()
        finally:
            del inner.found_inf
    elif is_finite:
        optimizer.step()


@torch.no_grad()
def average(ema: ModelEmaV3, model: nn.Module, update: int, is_finite: Tensor) -> None:
    """Averages the weights after an update, or changes nothing if its gradient wasn't finite, without a wait."""
    averaged = [v for v in ema.module.state_dict().values() if v.is_floating_point()]
    weights = [v for v in model.state_dict().values() if v.is_floating_point()]
    change = torch._foreach_sub(weights, averaged)
    torch._foreach_mul_(change, is_finite * (1 - ema.get_decay(update)))
    torch._foreach_add_(averaged, change)
