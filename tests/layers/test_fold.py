"""Folding: the same output for fewer multiply-adds, in every way that a model is made, saved and loaded."""

import pytest
import timm
import torch
from timm.models import reparameterize_model, save_for_hf

from etmamba_timm.checkpoints import fit, read_checkpoint
from etmamba_timm.models import count_cost

SMALL = {"depth": 2, "img_size": 32, "num_frames": 3, "num_classes": 5, "embed_dim": 24}
FOLDABLE = ("etmamba_ti", "etmamba_ti_ebs")


def make(name: str, dtype: torch.dtype = torch.float64, **kwargs) -> torch.nn.Module:
    """A small model, all of whose parameters (biases too) are drawn."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | kwargs)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def clip(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 3, 32, 32, dtype=dtype)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("expand", [2, 3])
@pytest.mark.parametrize("name", FOLDABLE)
def test_same_output(name, expand, dtype, bound):
    model, x = make(name, dtype, expand=expand), clip(dtype)
    expected = model(x)
    folded = reparameterize_model(model)
    assert (folded.folded, model.folded) == (True, False)
    assert torch.equal(model(x), expected)
    assert error(folded(x), expected) < bound
    assert error(model.fold()(x), expected) < bound
    assert model.fold().folded  # once more changes nothing
    assert error(model(x), expected) < bound


def test_cost_of_the_largest():
    models = [timm.create_model("etmamba_m", device="meta", folded=folded) for folded in (False, True)]
    assert [round(count_cost(model).macs / 1e9) for model in models] == [323, 223]


def test_nothing_to_fold_is_said(caplog):
    model = make("videomamba_ti")
    expected = model(x := clip())
    assert torch.equal(model.fold()(x), expected)
    assert "nothing to fold" in caplog.text
    assert not model.folded
    with pytest.raises(ValueError, match="block 'bimamba' can't be folded"):
        make("videomamba_ti", folded=True)


@pytest.mark.parametrize("name", FOLDABLE)
def test_saves_and_loads_as_what_it_is(name, tmp_path):
    model, x = make(name, torch.float32).fold(), clip(torch.float32)
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.folded
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_folded_model_takes_an_unfolded_checkpoint(name):
    model, x = make(name), clip()
    folded = make(name, folded=True)
    folded.load_state_dict(fit(read_checkpoint(model.state_dict()), folded))
    assert error(folded(x), model(x)) < 1e-10


@pytest.mark.parametrize("name", FOLDABLE)
def test_an_unfolded_model_refuses_a_folded_checkpoint(name):
    with pytest.raises(ValueError, match="create the model with folded=True"):
        fit(read_checkpoint(make(name, folded=True).state_dict()), make(name))


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_folded_model_trains(name):
    model, x, y = make(name, torch.float32).fold().train(), clip(torch.float32), torch.tensor([0, 1])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_fresh_folded_model_is_a_fresh_one_folded(name):
    torch.manual_seed(0)
    fresh = timm.create_model(name, **SMALL).fold().state_dict()
    torch.manual_seed(0)
    for key, value in timm.create_model(name, **SMALL, folded=True).state_dict().items():
        assert torch.equal(value, fresh[key]), key
