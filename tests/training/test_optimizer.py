"""Updates that are skipped leave no trace, and the others don't wait for the device."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.utils import ModelEmaV3
from torch import nn

from etmamba_timm.training.optimizer import average, new_optimizer, step_if
from etmamba_timm.training.progress import Progress
from etmamba_timm.training.recipe import Recipe


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield Accelerator()
    AcceleratorState._reset_state()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def gradients(update: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(update)
    return [torch.randn(p.shape, generator=generator) for p in small().parameters()]


def trained(accelerator: Accelerator, recipe: Recipe, updates: list[int | None]) -> tuple[dict, dict, dict, dict]:
    """Weights, optimiser's state, averaged weights and what was counted after updates by `gradients`; None is infinite.

    The averaged weights come after the same number of updates whatever is skipped, as their decay depends on it.
    """
    model = small()
    optimizer = accelerator.prepare(new_optimizer(recipe, model, accelerator))
    ema, progress = ModelEmaV3(model, 0.9), Progress(torch.device("cpu"))
    for update in updates:
        for p, grad in zip(model.parameters(), gradients(update or 0), strict=True):
            p.grad = grad
        if update is None:
            next(model.parameters()).grad[0, 0] = float("inf")
        if accelerator.scaler is not None:
            scale = accelerator.scaler.scale(torch.ones(()))
            for p in model.parameters():
                p.grad *= scale
            accelerator.scaler.unscale_(optimizer.optimizer)  # accelerate does, but for fp16 alone, which needs a GPU
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        step_if(optimizer, norm.isfinite())
        progress.count(torch.tensor(1.0 if update else torch.nan), norm, norm.isfinite())
        average(ema, model, 100, norm.isfinite())
    return model.state_dict(), optimizer.state_dict(), ema.module.state_dict(), progress.read()


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize(
    ("opt", "opt_args"), [("adamw", {}), ("adamw", {"amsgrad": True}), ("adam", {}), ("sgd", {}), ("lamb", {})]
)
def test_a_skipped_update_changes_nothing(accelerator, opt, opt_args, scaler):
    recipe = Recipe(opt=opt, opt_args=opt_args, lr=1.0)
    if scaler:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    with_skips = trained(accelerator, recipe, [None, 1, None, None, 2, 3, None])
    if scaler:
        assert accelerator.scaler.get_scale() == 8.0 / 2**4
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    without = trained(accelerator, recipe, [1, 2, 3])
    assert not torch.equal(without[0]["0.weight"], small().state_dict()["0.weight"])
    for a, b in zip(with_skips[:3], without[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    same = {"losses": 3.0, "norms": without[3]["norms"], "counted": 3}
    assert without[3] == same | {"skipped": 0, "in_a_row": 0, "most_in_a_row": 0}
    assert with_skips[3] == same | {"skipped": 4, "in_a_row": 1, "most_in_a_row": 2}


def test_fused_kernels_do_the_same_as_others(accelerator):
    fused, plain = (
        trained(accelerator, Recipe(lr=1.0, opt_args=opt_args), [1, 2, 3])[0] for opt_args in ({}, {"fused": False})
    )
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-7)


def test_averages_are_timms():
    model = small()
    ema = ModelEmaV3(model, 0.9, use_warmup=True)
    expected = copy.deepcopy(ema)
    for update in range(1, 6):
        for p in model.parameters():
            p.data += torch.randn_like(p)
        average(ema, model, update, torch.tensor(True))
        expected.update(model, update)
        torch.testing.assert_close(ema.module.state_dict(), expected.module.state_dict(), rtol=1e-6, atol=1e-7)


def test_progress_survives_its_saved_state():
    progress = Progress(torch.device("cpu"))
    for norm in (0.1, float("inf"), float("nan"), 0.7):
        norm = torch.tensor(norm)
        progress.count(torch.tensor(1.1), norm, norm.isfinite())
    progress.replaced, progress.best, progress.best_epoch = 3, 0.25, 1
    loaded = Progress(torch.device("cpu"))
    loaded.load_state_dict(progress.state_dict())
    assert loaded.state_dict() == progress.state_dict()
    assert (loaded.update, loaded.read()["most_in_a_row"]) == (4, 2)
    for each in (progress, loaded):
        each.start_row()
        each.count(torch.tensor(0.3), torch.tensor(float("inf")), torch.tensor(False))
    assert loaded.state_dict() == progress.state_dict()
    read = loaded.read()
    assert (read["losses"], read["counted"], read["skipped"], read["in_a_row"]) == (0.0, 0, 3, 1)
