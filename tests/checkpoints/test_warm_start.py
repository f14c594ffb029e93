"""ETMamba started from VideoMamba: what is pruned, what is kept, what is fresh."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from etmamba_timm.checkpoints import read_checkpoint
from etmamba_timm.checkpoints.warm_start import noise_clips, prune, warm_start
from etmamba_timm.layers import BiMamba, Ebs
from etmamba_timm.models import EtMamba

MODULE = sys.modules[warm_start.__module__]
GOLDEN = Path(__file__).parents[1] / "golden" / "videomamba_small_f4.safetensors"
SMALL = {"img_size": 32, "num_frames": 2, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}
ROW_A = {"stem": "none", "block": "bimamba"}


def build(**arguments) -> EtMamba:
    return EtMamba(**(SMALL | {"drop_path_rate": 0.0} | arguments)).eval()


def videomamba(**arguments) -> EtMamba:
    """A VideoMamba whose weights are all of a trained model's size: every tensor matters."""
    model = build(**ROW_A, **arguments)
    with torch.no_grad():
        for name, value in model.named_parameters():
            matrix = value.ndim > 1 and not name.endswith("A_log")
            value.add_(torch.randn_like(value) * (value[0].numel() ** -0.5 if matrix else 0.2))
    return model


def start(source: Mapping, model: EtMamba, clips: torch.Tensor | None = None) -> dict:
    return warm_start(read_checkpoint(source), model, clips)


def started(source: EtMamba, clips: torch.Tensor | None = None, **arguments) -> EtMamba:
    model = build(**arguments).to(next(source.parameters()).dtype)
    model.load_state_dict(start(source.state_dict(), model, clips))
    return model


@torch.no_grad()
def prune_by_hand(mixer: BiMamba) -> None:
    """Silences three channels in four: nothing reads them. The others' idle direction gives exactly 0."""
    gone = torch.ones(mixer.D.numel(), dtype=torch.bool)
    gone[torch.randperm(len(gone))[: len(gone) // 4]] = False
    for layer in (mixer.out_proj, mixer.x_proj, mixer.x_proj_b):
        layer.weight[:, gone] = 0
    mixer.conv1d.bias.zero_()
    mixer.conv1d_b.bias.zero_()


def structured() -> tuple[BiMamba, torch.Tensor, torch.Tensor]:
    """A mixer and two lots of tokens [B, N, D] such as training makes: channels of very different weight, in no order;
    tokens of low rank around their mean."""
    mixer = videomamba(depth=1, embed_dim=32).blocks[0].mixer
    with torch.no_grad():
        mixer.out_proj.weight.mul_(torch.randn(mixer.D.numel()).exp())
        mixer.D.mul_(torch.randn(mixer.D.numel()).exp())
        mixer.D_b.mul_(torch.randn(mixer.D.numel()).exp())
        for layer in (mixer.x_proj, mixer.x_proj_b):
            layer.weight.mul_(0.75)
    tokens = torch.randn(32, 40, 8) @ torch.randn(8, 32) / 8**0.5 + torch.randn(32)
    return mixer, *tokens.chunk(2)


def miss(old: BiMamba, new: Ebs, x: torch.Tensor) -> float:
    """Relative error of the pruned mixer's output."""
    with torch.no_grad():
        return ((new(x) - old(x)).norm() / old(x).norm()).item()


class TestPruning:
    def test_a_mixer_with_no_more_than_fits_is_kept_exactly(self):
        """Each direction with the SSM of its own."""
        old, new = videomamba(depth=1).double().blocks[0].mixer, Ebs(16).double()
        prune_by_hand(old)
        x = torch.randn(3, 20, 16, dtype=torch.float64)
        with torch.no_grad():
            prune(old, new, x, x)
        other = torch.randn(2, 31, 16, dtype=torch.float64)
        assert old(other).abs().max() > 0.01
        torch.testing.assert_close(new(other), old(other), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("block", ["ebs", "stcm"])
    def test_a_model_with_no_more_than_fits_is_kept_exactly(self, block):
        """With a residual stream of mean 0 over channels, where LayerNorm is RMSNorm, up to the last norm."""
        source = videomamba().double()
        with torch.no_grad():
            for old in source.blocks:
                prune_by_hand(old.mixer)
                old.mixer.out_proj.weight.sub_(old.mixer.out_proj.weight.mean(0))
            for weight in (source.patch_embed.proj.weight, source.patch_embed.proj.bias):
                weight.sub_(weight.mean(0))
            for weight in (source.cls_token, source.pos_embed, source.temporal_pos_embedding):
                weight.sub_(weight.mean(-1, keepdim=True))
        model = started(source, stem="none", block=block)
        x = torch.randn(2, 3, 2, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("seed", range(3))
    def test_the_chosen_channels_beat_others(self, seed, monkeypatch):
        torch.manual_seed(seed)
        old, x, other = structured()
        chosen = miss(old, pruned(old, x), other)
        for pick in ("first", "last", "random", "random", "random"):
            order = {"first": torch.arange(128), "last": torch.arange(128).flip(0), "random": torch.randperm(128)}[pick]
            monkeypatch.setattr(MODULE, "choose_pairs", lambda y, w, n, order=order: order[:n].sort().values)
            assert chosen < 0.7 * miss(old, pruned(old, x), other), pick

    @pytest.mark.parametrize("seed", range(3))
    def test_refitting_makes_up_for_lost_channels(self, seed, monkeypatch):
        torch.manual_seed(seed)
        old, x, other = structured()
        refitted = miss(old, pruned(old, x), other)
        monkeypatch.setattr(MODULE, "RIDGE", 1e12)
        copied = pruned(old, x)
        assert refitted < 0.95 * miss(old, copied, other)
        columns = old.out_proj.weight.T
        assert all((row == columns).all(1).any() for row in copied.out_proj.weight.T)  # else plain copies

    def test_both_directions_are_there(self):
        model = started(videomamba(), stem="none", block="ebs")
        x = torch.randn(1, 20, 16)
        first, last = x.clone(), x.clone()
        first[:, 0] += 1
        last[:, -1] += 1
        mixer = model.blocks[0].mixer
        assert (mixer(first) - mixer(x))[:, -1].abs().max() > 1e-6
        assert (mixer(last) - mixer(x))[:, 0].abs().max() > 1e-6


def pruned(old: BiMamba, x: torch.Tensor) -> Ebs:
    with torch.no_grad():
        return prune(old, Ebs(x.shape[-1]), x, x)


class TestTheWholeMap:
    def test_local_branch_starts_silent(self):
        source = videomamba()
        torch.manual_seed(1)
        model, ebs = started(source), started(source, block="ebs")
        ebs.stem.load_state_dict(model.stem.state_dict())
        x = torch.randn(1, 3, 2, 32, 32)
        assert torch.equal(model(x), ebs(x))

    def test_row_b_is_videomamba_behind_a_quiet_stem(self):
        source = videomamba()
        model = started(source, block="bimamba")
        x = torch.randn(2, 3, 2, 32, 32)
        change = (model(x) - source(x)).norm() / source(x).norm()
        assert 0 < change < 0.1
        nn.init.zeros_(model.stem.conv3.norm.weight)
        assert torch.equal(model(x), source(x))

    def test_row_a_is_videomamba(self):
        source = videomamba()
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in started(source, **ROW_A).state_dict().items())

    def test_a_stem_in_the_source_is_kept(self):
        torch.manual_seed(1)
        source = build(block="bimamba")
        assert torch.equal(started(source).stem.conv3.norm.weight, torch.ones(3))
        assert torch.equal(started(source).stem.conv1.depthwise.weight, source.stem.conv1.depthwise.weight)
        assert torch.equal(started(source, in_chans=4).stem.conv3.norm.weight, torch.ones(4))
        started(source, in_chans=1)

    def test_every_key_of_the_model(self):
        model = build()
        own, out = model.state_dict(), start(videomamba().state_dict(), model)
        assert list(out) == list(own)
        assert all((v.shape, v.dtype) == (own[k].shape, own[k].dtype) and v.isfinite().all() for k, v in out.items())
        assert all(v.data_ptr() != own[k].data_ptr() for k, v in out.items())

    @pytest.mark.parametrize("block", ["ebs", "stcm", "bimamba"])
    def test_every_key_of_the_source_has_a_place(self, block):
        source, model = videomamba().state_dict(), build(block=block)
        out = start(source, model)
        for key in source:
            changed = start(source | {key: source[key] + 0.5 * torch.randn_like(source[key])}, model)
            assert any(not torch.equal(changed[k], out[k]) for k in out), key

    def test_every_parameter_has_a_gradient_after_two_steps(self):
        model = started(videomamba(), global_pool="avg").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 2, 32, 32)).square().sum().backward()
            optimizer.step()
        assert not [name for name, value in model.named_parameters() if not value.grad.any()]

    def test_the_same_every_time_and_nothing_else_changes(self):
        source, model = videomamba().state_dict(), build()
        before = {k: v.clone() for k, v in (source | model.state_dict()).items()}
        state = torch.get_rng_state()
        one, two = start(source, model), start(source, model)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(one[k], two[k]) for k in one)
        assert all(torch.equal(v, before[k]) for k, v in (source | model.state_dict()).items())

    def test_what_is_fresh_is_told_once(self, caplog):
        caplog.set_level(logging.INFO, logger=MODULE.__name__)
        source = videomamba().state_dict()
        del source["temporal_pos_embedding"]
        start(source, build(num_classes=3))
        start(source, build(**ROW_A))
        assert [r.getMessage() for r in caplog.records if r.name == MODULE.__name__] == [
            "warm start from VideoMamba; fresh: blocks.*.local, head, stem, temporal_pos_embedding",
            "warm start from VideoMamba; fresh: temporal_pos_embedding",
        ]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        source = videomamba().state_dict()
        model = build().to(dtype)
        out = start({k: v.to(dtype) for k, v in source.items()}, model)
        assert all(v.dtype == dtype and v.isfinite().all() for v in out.values())


class TestOtherShapes:
    def test_an_upstream_file_as_it_is(self):
        weights = {k: v for k, v in load_file(GOLDEN).items() if k.startswith("model.")}
        weights["model.patch_embed.proj.weight"] = weights["model.patch_embed.proj.weight"].squeeze(2)
        size = {"img_size": 32, "patch_size": 16, "depth": 3, "embed_dim": 48, "num_classes": 7, "num_frames": 4}
        model = build(**size)
        model.load_state_dict(start(weights, model))
        assert torch.equal(model.patch_embed.proj.weight[:, :, 0], weights["model.patch_embed.proj.weight"])
        assert torch.equal(model.head.weight, weights["model.head.weight"])

    @pytest.mark.parametrize("block", ["stcm", "bimamba"])
    @pytest.mark.parametrize(
        "other",
        [{"num_frames": 5}, {"img_size": (48, 32)}, {"in_chans": 1}, {"in_chans": 4}, {"num_classes": 3}],
        ids=str,
    )
    def test_another_clip_or_task(self, block, other):
        source = videomamba()
        model = started(source, block=block, **other)
        unchanged = started(source, block=block).state_dict()
        differ = {k for k, v in model.state_dict().items() if v.shape != unchanged[k].shape}
        expected = {
            "num_frames": "temporal_pos_embedding",
            "img_size": "pos_embed",
            "num_classes": "head",
            "in_chans": "",
        }
        assert all(k.startswith((expected[next(iter(other))], "stem", "patch_embed")) for k in differ)
        assert torch.equal(model.cls_token, source.cls_token)
        if block == "bimamba":  # as where VideoMamba's own weights load
            assert torch.equal(model.blocks[1].mixer.in_proj.weight, source.blocks[1].mixer.in_proj.weight)

    def test_positions_are_resampled(self):
        source = videomamba()
        weights = start(source.state_dict(), build(img_size=64, num_frames=5))
        source.set_input_size(64, 5)
        assert torch.equal(weights["pos_embed"], source.pos_embed)
        assert torch.equal(weights["temporal_pos_embedding"], source.temporal_pos_embedding)

    def test_no_head(self):
        assert "head.weight" not in start(videomamba().state_dict(), build(num_classes=0))
        headless = {k: v for k, v in videomamba().state_dict().items() if not k.startswith("head.")}
        model = build()
        assert torch.equal(start(headless, model)["head.weight"], model.head.weight)

    def test_without_the_short_convolution(self):
        started(videomamba(d_conv=0), d_conv=0)

    def test_clips_of_ones_own(self):
        source = videomamba()
        clips = torch.randn(4, 3, 3, 48, 32)
        weights = [started(source, c, block="ebs").blocks[0].mixer.x_proj.weight for c in (None, clips)]
        assert not torch.equal(*weights)


class TestErrors:
    def test_another_size(self):
        source = build(embed_dim=192, depth=24, img_size=8, num_frames=1, **ROW_A).state_dict()
        message = r"has embed_dim 192 and depth 24 \(videomamba_ti\); the model has embed_dim 16 and depth 2"
        with pytest.raises(ValueError, match=message):
            start(source, build())

    def test_missing_tensors_are_listed(self):
        source = videomamba().state_dict()
        for key in ("cls_token", "blocks.1.mixer.D_b", "norm.weight"):
            del source[key]
        with pytest.raises(ValueError, match=r"lacks blocks.1.mixer.D_b, cls_token, norm.weight"):
            start(source, build())
        with pytest.raises(ValueError, match="no tensor's name ends in .* it holds nothing"):
            start({}, build())

    def test_no_videomamba(self):
        with pytest.raises(ValueError, match=r"is no VideoMamba; it looks like etmamba_ti"):
            start(build().state_dict(), build())
        with pytest.raises(ValueError, match=r"has more than .*: blocks.0.norm.bias"):
            start(videomamba().state_dict() | {"blocks.0.norm.bias": torch.zeros(16)}, build())

    def test_other_shapes(self):
        with pytest.raises(ValueError, match=r"has patch_size 8 \(.*\); the model has patch_size 16"):
            start(videomamba().state_dict(), build(patch_size=16))
        with pytest.raises(ValueError, match=r"has d_state 16 \(.*\); the model has d_state 8"):
            start(videomamba().state_dict(), build(d_state=8))


@pytest.mark.parametrize("arguments", [{}, {"in_chans": 1, "num_frames": 1}, {"img_size": (40, 24), "num_frames": 7}])
def test_noise_clips(arguments):
    model = build(**arguments)
    clips = noise_clips(model)
    batch, channels, frames, height, width = clips.shape
    assert (channels, frames, (height, width)) == (model.in_chans, min(4, model.num_frames), model.img_size)
    assert batch >= 4
    assert clips.isfinite().all()
    assert 0.3 < clips.std() < 2
    assert torch.equal(clips, noise_clips(model))
