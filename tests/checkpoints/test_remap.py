"""A model's weights are found by what a file holds, whatever wraps them."""

import itertools

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.checkpoints import CheckpointError
from etmamba_timm.checkpoints.remap import find_weights

WEIGHTS = timm.create_model("etmamba_ti", img_size=32, num_frames=2, embed_dim=8, depth=1, num_classes=3).state_dict()
OTHER = {key: value + 1 for key, value in WEIGHTS.items()}


def prefixed(prefix: str, weights: dict = WEIGHTS) -> dict:
    return {prefix + key: value for key, value in weights.items()}


def found(raw) -> tuple[str, ...]:
    """Checks that WEIGHTS come out of `raw`, and returns what is unused."""
    weights = find_weights(raw, "w.pth")
    assert weights.tensors.keys() == WEIGHTS.keys()
    assert all(weights.tensors[key] is WEIGHTS[key] for key in WEIGHTS)
    return weights.unused


@pytest.mark.parametrize("name", ["net", "model", "backbone", "encoder", "student.video.encoder", "_forward_module"])
def test_lightning_modules_by_any_name(name):
    beside = {"criterion.weight": torch.ones(3), "loss.pos_weight": torch.ones(3), "val_top1.total": torch.zeros(())}
    raw = {"epoch": 2, "state_dict": prefixed(name + ".") | beside, "optimizer_states": [{"state": {}}]}
    assert set(found(raw)) == {"epoch", "optimizer_states", *(f"state_dict.{key}" for key in beside)}


@pytest.mark.parametrize("order", itertools.permutations(["module.", "_orig_mod.", "net."]), ids="".join)
def test_prefixes_in_any_order(order):
    assert found({"model": prefixed("".join(order))}) == ()


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_blocks_that_were_wrapped_one_by_one(wrapper):
    assert found({key.replace("blocks.0.", f"blocks.0.{wrapper}."): value for key, value in WEIGHTS.items()}) == ()


@pytest.mark.parametrize(
    "raw",
    [
        {"model": OTHER, "ema": WEIGHTS},
        {"model": OTHER, "model_ema": {"module": WEIGHTS}},
        {"state_dict": OTHER, "state_dict_ema": WEIGHTS},
        {"state_dict": prefixed("net.", OTHER) | prefixed("ema_net.module.")},
        {"state_dict": prefixed("net.", OTHER) | prefixed("ema.")},
        {"model": OTHER, "swa": {"n_averaged": torch.tensor(3)} | prefixed("module.")},
        {"model": WEIGHTS, "model_ema": None},
    ],
)
def test_averaged_weights_go_first(raw):
    found(raw)


def test_what_lies_beside_the_model_itself(caplog):
    assert found(WEIGHTS | {"criterion.weight": torch.ones(3), "epoch": 3}) == ("criterion.weight", "epoch")
    assert "w.pth: tensors that aren't the model's are left out: criterion.weight" in caplog.text
    assert "epoch" not in caplog.text
    assert found({"n_averaged": torch.tensor(7)} | prefixed("module.")) == ("n_averaged",)


def test_the_same_weights_twice_are_one_model():
    assert set(found({"model": WEIGHTS, "module": dict(WEIGHTS)})) == {"module"}
    module = nn.Module()
    module.net = module.same = timm.create_model("etmamba_ti", img_size=32, embed_dim=8, depth=1)
    assert find_weights(module.state_dict(), "w.pth").tensors["norm.weight"] is not None


def test_two_models_are_an_error():
    with pytest.raises(CheckpointError, match="w.pth holds several models, at 'student.', 'teacher.'; save the one"):
        find_weights(prefixed("student.") | prefixed("teacher.", OTHER), "w.pth")


def test_another_vision_transformer_beside_it_is_no_second_model():
    teacher = timm.create_model("test_vit", pretrained=False).state_dict()
    unused = found(prefixed("net.") | prefixed("teacher.", teacher))
    assert len(unused) == len(teacher)


def test_an_optimizer_that_knows_names_is_no_model():
    found({"model": WEIGHTS, "optimizer": {"exp_avg": OTHER, "state": OTHER}})


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, "it holds nothing"),
        ([WEIGHTS], "it holds a list"),
        ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "it holds entries such as a, b, c and 2 more (5 in all)"),
        ({"base_model.model.x.lora_A.weight": torch.ones(1)}, "merge them first, model.merge_and_unload()"),
    ],
)
def test_where_it_is_not_ours_the_message_says_what_was_looked_for(raw, said):
    with pytest.raises(CheckpointError) as error:
        find_weights(raw, "w.pth")
    assert "no tensor's name ends in 'patch_embed.proj.weight'" in str(error.value)
    assert said in str(error.value)


def test_a_name_twice_and_a_weight_that_is_none():
    with pytest.raises(CheckpointError, match="it holds blocks.0.norm.weight twice"):
        find_weights(WEIGHTS | {"layers.0.norm.weight": torch.ones(8)}, "w.pth")
    with pytest.raises(CheckpointError, match="norm.bias is a float, not a tensor"):
        find_weights(WEIGHTS | {"norm.bias": 1.0}, "w.pth")


SEGMENTS = st.sampled_from(["net", "module", "model", "_orig_mod", "backbone", "a", "state_dict", "encoder_q"])


@settings(max_examples=60, deadline=None)
@given(st.lists(SEGMENTS, max_size=3), st.lists(SEGMENTS, max_size=3), st.booleans())
def test_any_wrapping(path, prefix, with_others):
    raw: dict = prefixed("".join(segment + "." for segment in prefix))
    if with_others:
        raw |= {"zz.weight": torch.ones(2), "zz.bias": torch.ones(2)}
    for step in path:
        raw = {step: raw, "epoch": 3} if with_others else {step: raw}
    assert bool(found(raw)) == with_others
