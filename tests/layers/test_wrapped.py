"""A submodule that was wrapped, replaced, pruned, quantised or adapted acts, also where a kernel would fuse it."""

import copy

import pytest
import timm
import torch
from parts import (
    GRID,
    MODELS,
    PARTS,
    TOKENS,
    Half,
    assert_close,
    clip,
    drawn,
    leaves,
    look,
    part_input,
    put,
    run_part,
    small,
)
from torch import nn
from torch.nn.utils import parametrizations, prune

from etmamba_timm.layers import StcmBlock

# --- wrapped and replaced ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("way", ["forward on the instance", "a module around it", "a subclass"])
def test_wrapped_one_by_one(name, way):
    part = drawn(PARTS[name]())
    x = part_input(part).detach()
    for leaf_name, leaf in leaves(part).items():
        wrapped, halved = copy.deepcopy(part), copy.deepcopy(part)
        with torch.no_grad():
            for parameter in halved.get_submodule(leaf_name).parameters():
                parameter.mul_(0.5)
        inner = wrapped.get_submodule(leaf_name)
        if way == "forward on the instance":  # as offloading and some adapters do it
            inner.forward = lambda x, forward=inner.forward: forward(x) * 0.5
        elif way == "a module around it":
            put(wrapped, leaf_name, Half(inner))
        else:
            kind = type(leaf)
            inner.__class__ = type(
                "Other", (kind,), {"forward": lambda self, x, kind=kind: kind.forward(self, x) * 0.5}
            )
        assert_close(run_part(wrapped, x), run_part(halved, x))


def test_replaced_by_a_convolution_of_another_kind():
    """Of the same type, but not what the kernel computes: it is called, not taken for the one that was there."""
    block = drawn(StcmBlock(20))
    x = torch.randn(TOKENS, dtype=torch.float64)
    for name, kwargs in {
        "local.conv3": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        "local.conv5": {"kernel_size": 3, "padding": 1},
        "local.conv7": {"kernel_size": 7, "padding": 3},
        "mixer.conv1d": {"kernel_size": 2, "dilation": 3},
    }.items():
        other, old = copy.deepcopy(block), block.get_submodule(name)
        width = old.in_channels
        new = type(old)(width, width, groups=width, **kwargs).double()
        put(other, name, new)
        expected = copy.deepcopy(other)
        expected.get_submodule(name).register_forward_hook(look)
        assert_close(other(x, GRID), expected(x, GRID), 0)
    for name in ("local.conv3", "mixer.conv1d", "mixer.dt_proj"):
        without, zeros = copy.deepcopy(block), copy.deepcopy(block)
        without.get_submodule(name).bias = None
        nn.init.zeros_(zeros.get_submodule(name).bias)
        assert_close(without(x, GRID), zeros(x, GRID))


def test_a_compiled_submodule_is_called():
    part = drawn(StcmBlock(20))
    x = torch.randn(TOKENS, dtype=torch.float64)
    expected = run_part(part, x)
    for name in leaves(part):
        put(part, name, torch.compile(part.get_submodule(name), backend="eager"))
    assert_close(run_part(part, x), expected)


def test_pruned():
    """As when the pruning is made permanent; what is cut gets no gradient."""
    model, x = small(), clip()
    untouched = model(x)
    for leaf in leaves(model).values():
        prune.random_unstructured(leaf, "weight", 0.3)
    out = model(x)
    out.square().sum().backward()
    for leaf in leaves(model).values():
        assert leaf.weight_orig.grad.any()
        assert not leaf.weight_orig.grad[leaf.weight_mask == 0].any()
        prune.remove(leaf, "weight")
    assert_close(out, model(x))
    assert (out - untouched).abs().max() > 0.01 * untouched.abs().max()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (parametrizations.weight_norm, lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight")),
        (parametrizations.spectral_norm, lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight")),
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    ],
)
def test_weight_and_spectral_norm(wrap, unwrap):
    model, x = small(), clip()
    chosen = [leaf for leaf in leaves(model).values() if leaf.weight.ndim > 1]
    for leaf in chosen:
        wrap(leaf)
    model.eval()
    out = model(x)
    out.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    for leaf in chosen:
        unwrap(leaf)
    assert_close(out, model(x))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_quantised(name):
    """PyTorch's dynamic quantisation replaces every linear layer by one whose weight is a method."""
    model, x = small(name, torch.float32), clip(torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(m, nn.Linear) for m in quantised.modules())
    with torch.no_grad():
        expected, out = model(x), quantised(x)
        assert not torch.equal(out, expected)
        assert_close(out, expected, 0.1)
        # each layer acts: with one's scale doubled, the output is another one
        for layer in ("dt_proj", "x_proj"):
            mixer = quantised.blocks[0].mixer
            with getattr(mixer, layer).register_forward_hook(lambda module, args, y: y * 2):
                assert (quantised(x) - out).abs().max() > 1e-3 * out.abs().max()


# --- low-rank adapters ---------------------------------------------------------------------------


def with_lora(model: nn.Module, target_modules: str | list[str] = "all-linear", rank: int = 4) -> nn.Module:
    """The model in peft's wrapper, with adapters that do something from the start."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=rank, target_modules=target_modules, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("name", MODELS)
def test_lora_on_every_linear_layer(name):
    model = timm.create_model(name, img_size=32, num_frames=3, num_classes=5, global_pool="avg")
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    keys, x = model.state_dict().keys(), clip(torch.float32)
    untouched = model.eval()(x)
    adapted = with_lora(model, linear).eval()
    out = adapted(x)
    out.square().sum().backward()
    adapters = {n: p for n, p in adapted.named_parameters() if "lora" in n}
    assert len(adapters) == 2 * len(linear)
    assert [n for n, p in adapters.items() if p.grad is None or not p.grad.any()] == []
    assert {n for n, p in adapted.named_parameters() if p.grad is not None} == adapters.keys()
    assert (out - untouched).abs().max() > 0.01 * untouched.abs().max()
    adapted.merge_adapter()
    assert_close(adapted(x), out, 1e-5)
    adapted.unmerge_adapter()
    merged = adapted.merge_and_unload()
    assert merged.state_dict().keys() == keys
    assert_close(merged(x), out, 1e-5)


def test_lora_on_all_linear():
    """By peft's own name for them."""
    adapted = with_lora(small(dtype=torch.float32))
    adapted(clip(torch.float32)).square().sum().backward()
    adapters = {n: p for n, p in adapted.named_parameters() if "lora" in n}
    assert sum("dt_proj" in n for n in adapters) == 4
    assert [n for n, p in adapters.items() if p.grad is None or not p.grad.any()] == []


def test_lora_on_convolutions():
    """On those that peft can adapt: its adapters know no dilation, and it doesn't merge depthwise ones."""
    convolutions = ["depthwise", "pointwise", "local.conv3", "conv1d"]
    with pytest.warns(UserWarning, match="groups > 1"):
        adapted = with_lora(small(dtype=torch.float32), convolutions, rank=96)
    adapted(clip(torch.float32)).square().sum().backward()
    adapters = {n: p for n, p in adapted.named_parameters() if "lora" in n}
    assert len(adapters) == 2 * (3 + 4 + 2 * 2)
    assert [n for n, p in adapters.items() if p.grad is None or not p.grad.any()] == []


# --- folding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["in_proj", "pw", "out_proj", "fusion"])
def test_a_wrapped_block_refuses_to_be_folded(layer):
    model, x = small(), clip()
    wrapped = next(m for n, m in model.named_modules() if n.endswith(layer))
    prune.random_unstructured(wrapped, "weight", 0.3)
    expected = model(x)
    with pytest.raises(
        ValueError, match=rf"can't fold a block whose (mixer\.)?{layer} isn't a plain nn\.Linear; first"
    ):
        model.fold()
    assert torch.equal(model(x), expected)
    prune.remove(wrapped, "weight")
    assert_close(model.fold()(x), expected)


def test_adapters_on_what_folding_leaves_alone():
    """They work on a folded model as on the model itself, and don't hinder the folding."""
    model, x = small(), clip()
    for mixer in (block.mixer for block in model.blocks):
        mixer.dt_proj, mixer.conv1d = Half(mixer.dt_proj), Half(mixer.conv1d)
    expected = model(x)
    assert_close(model.fold()(x), expected)
