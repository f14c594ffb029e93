"""The model class: what timm and its users ask of a model, any clip, bad clips, and the same result every way."""

import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import etmamba_timm  # noqa: F401

NAMES = ["videomamba_ti", "videomamba_ti_stfp", "etmamba_ti_ebs", "etmamba_ti"]
SMALL = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "depth": 3, "num_classes": 5}


def small(name: str, **arguments) -> torch.nn.Module:
    """A small model of the row `name` in evaluation mode, with every parameter drawn at random."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | arguments)).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "A_" not in parameter_name:
                p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.randn(2, 3, 2, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
class TestEveryRow:
    def test_pooling_and_head(self, name, clip):
        model = small(name)
        tokens = model.forward_features(clip)
        assert tokens.shape == (2, 1 + 2 * 2 * 2, 16)
        assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
        assert torch.equal(model(clip), model.head(tokens[:, 0]))
        model.reset_classifier(7, "avg")
        assert torch.equal(model(clip), model.head(tokens[:, 1:].mean(1)))
        model.reset_classifier(0)
        assert torch.equal(model(clip), tokens[:, 1:].mean(1))
        assert isinstance(model.get_classifier(), torch.nn.Identity)
        model.reset_classifier(0, "")
        assert torch.equal(model(clip), tokens)

    def test_image_is_a_clip_of_one_frame(self, name, clip):
        model = small(name)
        assert torch.equal(model(clip[:, :, 0]), model(clip[:, :, :1]))

    @pytest.mark.parametrize("shape", [(1, 32, 32), (5, 32, 32), (2, 48, 32), (3, 16, 80)])
    def test_any_number_of_frames_and_any_size(self, name, shape):
        model = small(name)
        t, h, w = shape
        x = torch.randn(1, 3, *shape)
        assert model.forward_features(x).shape == (1, 1 + t * h // 16 * w // 16, 16)
        resized = copy.deepcopy(model)
        resized.set_input_size(img_size=(h, w), num_frames=t)
        assert (resized.num_frames, resized.img_size) == (t, (h, w))
        torch.testing.assert_close(resized(x), model(x))

    def test_intermediates(self, name, clip):
        model = small(name)
        final, maps = model.forward_intermediates(clip)
        assert torch.equal(final, model.forward_features(clip))
        assert [tuple(m.shape) for m in maps] == [(2, 16, 2, 2, 2)] * 3
        normed, prefix = model.forward_intermediates(
            clip, indices=[-1], norm=True, return_prefix_tokens=True, intermediates_only=True
        )[0]
        assert torch.equal(torch.cat([prefix, normed.flatten(2).transpose(1, 2)], 1), final)
        (first,) = model.forward_intermediates(clip, indices=[0], stop_early=True, intermediates_only=True)
        assert torch.equal(first, maps[0])
        (last,) = model.forward_intermediates(clip, indices=1, output_fmt="NLC", intermediates_only=True)
        assert torch.equal(last, maps[2].flatten(2).transpose(1, 2))
        assert model.forward_intermediates(clip[:, :, 0], intermediates_only=True)[0].shape == (2, 16, 2, 2)

    def test_intermediate_layers_as_dino_names_them(self, name, clip):
        """With the arguments of timm's VisionTransformer."""
        model = small(name)
        maps = model.forward_intermediates(clip, intermediates_only=True)
        (last,) = model.get_intermediate_layers(clip)
        assert torch.equal(last, maps[2].flatten(2).transpose(1, 2))
        first, _ = model.get_intermediate_layers(clip, n=[0, 2], reshape=True)
        assert torch.equal(first, maps[0])
        [(tokens, prefix)] = model.get_intermediate_layers(clip, 1, return_prefix_tokens=True, norm=True)
        assert torch.equal(torch.cat([prefix, tokens], 1), model.forward_features(clip))

    def test_features_only(self, name, clip):
        torch.manual_seed(0)
        model = timm.create_model(name, **SMALL, features_only=True, out_indices=(0, 2)).eval()
        assert model.feature_info.channels() == [16, 16]
        assert model.feature_info.reduction() == [16, 16]
        assert model.feature_info.module_name() == ["blocks.0", "blocks.2"]
        assert [tuple(m.shape) for m in model(clip)] == [(2, 16, 2, 2, 2)] * 2

    def test_pruning(self, name, clip):
        model = small(name)
        expected = model.forward_intermediates(clip, indices=[1], intermediates_only=True)[0]
        assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
        assert len(model.blocks) == 2
        assert torch.equal(model(clip)[:, 1:], expected.flatten(2).transpose(1, 2))

    def test_checkpointing_changes_nothing_but_memory(self, name, clip):
        model = small(name, drop_path_rate=0.0).train()
        expected = torch.autograd.grad(model(clip).square().sum(), list(model.parameters()))
        model.set_grad_checkpointing()
        grads = torch.autograd.grad(model(clip).square().sum(), list(model.parameters()))
        torch.testing.assert_close(grads, expected)

    @pytest.mark.parametrize(("every", "recomputed"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0])])
    def test_every_nth_block_is_recomputed(self, name, clip, every, recomputed):
        model = small(name, drop_path_rate=0.0).train()
        expected = torch.autograd.grad(model(clip).square().sum(), list(model.parameters()))
        runs: list[int] = []
        for i, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
        model.set_grad_checkpointing(every=every)
        grads = torch.autograd.grad(model(clip).square().sum(), list(model.parameters()))
        torch.testing.assert_close(grads, expected)
        assert (runs[:3], sorted(runs[3:])) == ([0, 1, 2], recomputed)
        runs.clear()
        final, _ = model.forward_intermediates(clip)
        final.sum().backward()
        assert sorted(runs[3:]) == recomputed
        model.set_grad_checkpointing(False)
        runs.clear()
        model(clip).sum().backward()
        assert runs == [0, 1, 2]

    def test_float64_agrees_with_float32(self, name, clip):
        model = small(name)
        expected = copy.deepcopy(model).double()(clip.double())
        assert expected.dtype == torch.float64
        assert (model(clip) - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_bfloat16_as_a_whole_and_by_autocast(self, name, clip):
        model = small(name)
        expected = model(clip)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(clip)
        whole = model.bfloat16()(clip.bfloat16())
        assert whole.dtype == torch.bfloat16
        for out in (autocast, whole):
            assert (out.float() - expected).abs().max() <= 0.05 * expected.abs().max()

    def test_compiled_agrees_with_eager(self, name, clip):
        """The graph and its gradients in one piece; code generation is tested on one model below."""
        model = small(name, depth=1).train()
        out, expected = torch.compile(model, backend="aot_eager", fullgraph=True)(clip), model(clip)
        torch.testing.assert_close(out, expected)
        grads = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    def test_gradients_reach_every_parameter(self, name, clip):
        model = small(name, global_pool="avg", drop_path_rate=0.0).train()
        model(clip).square().sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_what_the_class_token_leaves_without_gradient(self, name, clip):
        """In the last block it alone is read. It has no neighbours, so the local convolutions feed nothing; and it is
        first, so a forward SSM of its own starts and ends there and has nothing to forget."""
        model = small(name, drop_path_rate=0.0).train()
        model(clip).square().sum().backward()
        without = {n for n, p in model.named_parameters() if not p.grad.any()}
        idle = {
            "videomamba_ti": ("blocks.2.mixer.A_log",),
            "videomamba_ti_stfp": ("blocks.2.mixer.A_log",),
            "etmamba_ti_ebs": (),
            "etmamba_ti": ("blocks.2.local.proj", "blocks.2.local.conv"),
        }[name]
        assert without == {n for n, _ in model.named_parameters() if n.startswith(idle or ("none",))}

    def test_both_directions_are_live(self, name, clip):
        """The last patch reaches the first and the first the last, through the mixers alone."""
        model = small(name, stem="none")
        before = model.forward_features(clip)
        last, first = (..., 1, slice(16, 32), slice(16, 32)), (..., 0, slice(0, 16), slice(0, 16))
        for changed, watched in ((last, 1), (first, -1)):
            x = clip.clone()
            x[changed] += 1
            assert ((model.forward_features(x) - before)[:, watched].abs() > 1e-6).any()

    def test_batch_rows_do_not_mix(self, name, clip):
        model = small(name)
        torch.testing.assert_close(model(clip)[:1], model(clip[:1]))

    def test_weight_decay_and_layer_decay(self, name):
        model = small(name)
        optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
        names = {id(p): n for n, p in model.named_parameters()}
        groups = {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
        assert set(groups) == set(names.values())
        for parameter_name, group in groups.items():
            leaf = parameter_name.rpartition(".")[2]
            decays = leaf == "weight" and "norm" not in parameter_name
            assert (group["weight_decay"] > 0) == decays, parameter_name
        scale = {n: g["lr_scale"] for n, g in groups.items()}
        assert scale["head.weight"] == 1.0
        assert scale["cls_token"] == scale["patch_embed.proj.weight"] < scale["blocks.0.norm.weight"]
        assert scale["blocks.0.mixer.A_log"] == 0.5 * scale["blocks.1.mixer.A_log"]

    @pytest.mark.parametrize("in_chans", [1, 4])
    def test_other_channels(self, name, in_chans):
        model = small(name, in_chans=in_chans)
        assert model(torch.randn(1, in_chans, 2, 32, 32)).shape == (1, 5)


def test_code_generation_agrees_with_eager(clip):
    model = small("etmamba_ti", depth=1)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(clip), model(clip), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="PyTorch 2.4 exports for fixed shapes alone")
@pytest.mark.parametrize("name", ["videomamba_ti", "etmamba_ti"])
@pytest.mark.parametrize("grad", [True, False])
def test_export_for_any_batch_and_number_of_frames(name, grad, clip):
    model = small(name, depth=1)
    dims = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim("frames", min=1, max=64)}
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(model, (clip,), dynamic_shapes=(dims,)).module()
    for x in (clip, torch.randn(3, 3, 5, 32, 32)):
        torch.testing.assert_close(exported(x), model(x))


def test_a_model_exported_frozen_can_be_trained(clip):
    """The scan was traced where no gradient was wanted, and keeps nothing for one: it is computed again."""
    model = small("etmamba_ti", depth=1)
    with torch.no_grad():
        exported = torch.export.export(model, (clip,)).module()
    exported.requires_grad_(True)
    exported(clip).square().sum().backward()
    model(clip).square().sum().backward()
    grads = {name: p.grad for name, p in exported.named_parameters()}
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_attention_pooling(name, clip):
    model = small(name, global_pool="map", embed_dim=128)
    tokens = model.forward_features(clip)
    assert model.attn_pool.num_heads == 2
    assert torch.equal(model.forward_head(tokens, pre_logits=True), model.attn_pool(tokens))
    assert torch.equal(model(clip), model.head(model.attn_pool(tokens)))
    assert model.forward_head(tokens, pre_logits=True).shape == (2, model.head_hidden_size)
    for shape in ((5, 32, 32), (1, 48, 32)):
        assert model(torch.randn(1, 3, *shape)).shape == (1, 5)
    exported = torch.export.export(model, (clip,)).module()
    torch.testing.assert_close(exported(clip), model(clip))
    model(clip).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if name.startswith("attn_pool.")}
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []


def test_attention_pooling_comes_and_goes_with_the_classifier(clip):
    model = small("etmamba_ti")
    model.reset_classifier(7, "map")
    pool = model.attn_pool
    assert not pool.training
    assert pool.num_heads == 1  # 16 channels
    assert not pool.kv.bias.any()
    assert 0.015 < pool.mlp.fc1.weight.std() < 0.025
    assert pool.latent.any()
    model.reset_classifier(3)
    assert model.attn_pool is pool
    assert model(clip).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(clip), pool(model.forward_features(clip)))
    model.prune_intermediate_layers([0])
    assert model.attn_pool is None
    assert not [key for key in model.state_dict() if key.startswith("attn_pool")]
    assert model(clip).shape == (2, 9, 16)


def test_attention_pooling_is_of_the_head_s_group_and_its_query_is_not_decayed():
    model = small("etmamba_ti", global_pool="map")
    assert "attn_pool.latent" in model.no_weight_decay()
    groups = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    own = {scale[id(p)] for part in (model.attn_pool, model.head) for p in part.parameters()}
    assert own == {1.0}
    assert scale[id(model.patch_embed.proj.weight)] < 0.5


def test_pruned_of_its_norm_alone_in_bfloat16(clip):
    model = small("etmamba_ti").bfloat16()
    model.prune_intermediate_layers([0], prune_norm=True, prune_head=False)
    assert model(clip.bfloat16()).dtype == torch.bfloat16


def test_one_channel_leaves_the_stem_out_and_says_so(caplog):
    model = small("etmamba_ti", in_chans=1)
    assert isinstance(model.stem, torch.nn.Identity)
    assert "in_chans=1" in caplog.text


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(3, 32, 32), r"input is \(3, 32, 32\); it must be a clip \[B, C, T, H, W\] or an image"),
        (torch.zeros(1, 1, 3, 2, 32, 32), "it must be a clip"),
        (torch.zeros(1, 3, 2, 32, 32, dtype=torch.uint8), "clip is torch.uint8; the model takes normalised floats"),
        (torch.zeros(1, 4, 2, 32, 32), "has 4 channels; this model takes 3, in dimension 1"),
        (torch.zeros(1, 2, 3, 32, 32), r"it looks like \[B, T, C, H, W\], so permute it"),
        (torch.zeros(1, 3, 2, 30, 32), "clip is 30×32; height and width must be multiples of 16"),
        (torch.zeros(1, 3, 30, 40), "clip is 30×40"),
        (torch.zeros(0, 3, 2, 32, 32), "is empty; it needs at least one sample"),
        (torch.zeros(1, 3, 0, 32, 32), "is empty"),
        (torch.zeros(1, 3, 2, 0, 32), "is empty"),
    ],
)
def test_clips_that_do_not_fit(clip, message):
    with pytest.raises(ValueError, match=message):
        small("etmamba_ti")(clip)


@pytest.mark.parametrize("argument", [{"img_size": 40}, {"num_frames": 0}, {"img_size": 64, "num_frames": 0}])
def test_set_input_size_refuses_what_makes_no_model(argument):
    model = small("etmamba_ti")
    with pytest.raises(ValueError, match=r"must be"):
        model.set_input_size(**argument)
    assert (model.num_frames, model.img_size) == (2, (32, 32))


def test_reset_classifier_refuses_what_makes_no_head():
    model = small("etmamba_ti")
    with pytest.raises(ValueError, match="num_classes is -1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="unknown global_pool 'max'"):
        model.reset_classifier(3, "max")
    assert model.head.out_features == 5


def test_numpy_integers_will_do(clip):
    import numpy as np

    model = small("etmamba_ti", num_classes=np.int64(5), num_frames=np.int64(2))
    assert model(clip).shape == (2, 5)


def test_initialisation():
    """Output projections are divided by √depth; Δ starts within Mamba's bounds; A is -1 … -16; D is 1."""
    torch.manual_seed(0)
    model = timm.create_model("etmamba_ti", embed_dim=64, depth=4, img_size=32, num_frames=2)
    for block in model.blocks:
        assert block.mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.mixer.out_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert block.fusion.weight.std().item() == pytest.approx(0.01, rel=0.05)
        dt = torch.nn.functional.softplus(block.mixer.dt_proj.bias)
        assert 0.00099 < dt.min() < dt.max() < 0.1001
        assert block.mixer.dt_proj.weight.abs().max() <= 4**-0.5
        assert torch.allclose(-block.mixer.A_log.exp(), -torch.arange(1.0, 17.0).expand(64, 16))
        assert (block.mixer.D == 1).all()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    drop_path = [block.drop_path.drop_prob for block in model.blocks]
    assert drop_path == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
