"""Starts an ETMamba from a VideoMamba checkpoint: VideoMamba pruned, not a mixture of its weights.

VideoMamba's mixer is a sum over pairs of a channel and a direction, `Σ out_c · (SSM_f(u)_c + SSM_b(u)_c) · SiLU(z_c)`;
each of the 2·E_v pairs has its own short convolution, Δ, A and D. EBS keeps E of them. A channel of EBS computes its
pair in that pair's direction; in the other one its rows of `in_proj` start at 0, which shuts its gate: SiLU(0) = 0.
"""

import logging
import math
import re
from collections.abc import Iterable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import BiMamba, BiMambaBlock, Ebs, EbsBlock, Motion, StcmBlock
from ..layers.ssm import conv_silu, ssm
from ..models import VARIANTS, EtMamba
from ..ops import selective_scan
from .errors import CheckpointError
from .fit import fit
from .read import TIMES, LoadedCheckpoint, architecture_of

_logger = logging.getLogger(__name__)

SHARED = ("embed_dim", "depth", "patch_size", "d_state", "expand", "d_conv")  # by the source and what it starts
STEM_SCALE = 0.05  # of STFP's last norm: nearly silent, yet not 0, where its ReLU would never train
RIDGE = 0.1  # how strongly a refitted projection is held to VideoMamba's, in mean squares of its inputs
# EBS's parameters with a row for each channel <- those of VideoMamba's forward and backward direction.
PAIRED = {
    "conv1d.weight": ("conv1d.weight", "conv1d_b.weight"),
    "conv1d.bias": ("conv1d.bias", "conv1d_b.bias"),
    "dt_proj.weight": ("dt_proj.weight", "dt_proj_b.weight"),
    "dt_proj.bias": ("dt_proj.bias", "dt_proj_b.bias"),
    "A_log": ("A_log", "A_b_log"),
    "D": ("D", "D_b"),
}


@torch.no_grad()
def warm_start(source: LoadedCheckpoint, model: EtMamba, clips: Tensor | None = None) -> dict[str, Tensor]:
    """The state dict that `model` starts from: VideoMamba's weights wherever they have a place in it.

    The block 'bimamba' takes them as they are, 'ebs' and 'stcm' a pruned mixer (`prune`). The local branch of 'stcm'
    starts silent, Fuse = [I | 0], and a fresh STFP nearly so. Patch weight and positions are made to fit as whenever
    weights load, and the head is kept where it has as many classes. What has no source stays as `model` has it, and is
    logged. The whole map, with reasons, is in `weights/README.md`.

    Args:
        source: VideoMamba's checkpoint, of videos or of images. With a stem (ablation row b) its stem is taken too.
        model: of the same embed_dim, depth, patch_size, d_state, expand and d_conv. It is left as it is.
        clips: normalised clips [B, C, T, H, W] on which channels are weighed and projections refitted; a few of the
            data to come serve best. `noise_clips` by default.

    Raises:
        CheckpointError: a source that is no VideoMamba, or of another width, depth, patch or SSM.
    """
    own = model.state_dict()
    video = _videomamba(source, model)
    weights = video.state_dict()
    mapped = {k: v for k, v in weights.items() if k in source.tensors and k in own and v.shape == own[k].shape}
    if not isinstance(model.blocks[0].mixer, BiMamba):
        mapped["norm.bias"] = torch.zeros_like(weights["norm.weight"])
        clips = noise_clips(model) if clips is None else clips
        x, grid = video._embed(clips.to(weights["patch_embed.proj.weight"]))
        for i, (old, new) in enumerate(zip(video.blocks, model.blocks, strict=True)):
            assert isinstance(old, BiMambaBlock)
            assert isinstance(new, EbsBlock)
            centred = F.layer_norm(x, x.shape[-1:], old.norm.weight)
            mixer = prune(old.mixer, deepcopy(new.mixer).to(x), old.norm(x), centred)
            block = {"norm.weight": old.norm.weight, "norm.bias": torch.zeros_like(old.norm.weight)}
            block |= {f"mixer.{k}": v for k, v in mixer.state_dict().items()}
            if isinstance(new, StcmBlock):
                block["fusion.weight"] = torch.eye(*new.fusion.weight.shape)  # [D, 2D]
                block["fusion.bias"] = torch.zeros(new.fusion.out_features)
            mapped |= {f"blocks.{i}.{k}": v for k, v in block.items()}
            x = old(x, grid)
    out = {k: mapped.get(k, v).to(v, copy=True) for k, v in own.items()}
    if "stem.conv3.norm.weight" in own and "stem.conv3.norm.weight" not in mapped:
        out["stem.conv3.norm.weight"].fill_(STEM_SCALE)
    _logger.info("warm start from VideoMamba; fresh: %s", _summary(own.keys() - mapped.keys()) or "nothing")
    return out


def size_for(source: LoadedCheckpoint, variant: str) -> dict:
    """Constructor arguments of the variant that a VideoMamba starts: the source's, unless it is another variant's."""
    row, own = VARIANTS[variant], VARIANTS[source.variant]
    if any(row[key] != own[key] for key in ("embed_dim", "depth")):
        return {}
    return {key: source.architecture[key] for key in SHARED}


def prune(old: BiMamba, new: Ebs, x: Tensor, x_new: Tensor) -> Ebs:
    """`new`, made a pruned `old`: it keeps the E pairs of channel and direction that add most to `old`'s output.

    Then `x_proj`, which has lost most of its inputs, and `out_proj` are refitted to give on `x_new` what `old`'s give
    on `x`.

    Args:
        old, new: mixers of the same D; `new` is written to and returned.
        x, x_new: the tokens [B, N, D] that `old` and `new` see, each after its own norm.
    """
    below, z = old.in_proj(x).chunk(2, dim=-1)  # each [B, N, E_v]
    u_f = conv_silu(below, old.conv1d, old.d_conv)
    u_b = conv_silu(below, old.conv1d_b, old.d_conv, reverse=True)
    y_f = ssm(selective_scan, u_f, z, old.x_proj, old.dt_proj, old.A_log, old.D)
    y_b = ssm(selective_scan, u_b, z, old.x_proj_b, old.dt_proj_b, old.A_b_log, old.D_b, reverse=True)
    kept = choose_pairs(torch.cat([y_f, y_b], dim=-1), old.out_proj.weight, new.D.numel())  # [E]
    channel, is_backward = kept % old.D.numel(), (kept >= old.D.numel())[:, None]
    rows = [half[channel] for half in old.in_proj.weight.chunk(2)]  # x, z
    directions = [row * mask for row in rows for mask in (~is_backward, is_backward)]  # Fx, Bx, Fz, Bz
    parts = dict(old.named_parameters())
    weights = {k: torch.zeros_like(v) for k, v in new.state_dict().items()}  # biases stay 0
    weights |= {k: torch.cat([parts[f], parts[b]])[kept] for k, (f, b) in PAIRED.items() if f in parts}
    weights["in_proj.weight"] = torch.cat(directions)
    weights["pw.weight"] = torch.eye(len(kept))
    weights["x_proj.weight"] = torch.cat([old.x_proj.weight, old.x_proj_b.weight], dim=1)[:, kept]
    weights["out_proj.weight"] = old.out_proj.weight[:, channel]
    new.load_state_dict(weights)
    assert new.out_proj is not None  # it isn't folded
    _refit(new, new.x_proj, x_new, torch.stack([old.x_proj(u_f), old.x_proj_b(u_b)]))
    assert new.out_proj is not None  # only a folded mixer has none
    _refit(new, new.out_proj, x_new, old.out_proj(y_f + y_b))
    return new


def choose_pairs(y: Tensor, out_weight: Tensor, count: int) -> Tensor:
    """The pairs with most energy in the mixer's output: mean square of y times that of the pair's column of `out_proj`.

    Args:
        y: gated outputs of the forward channels, then of the backward ones [B, N, 2·E_v].
        out_weight: `out_proj`'s, one column for both directions of a channel [D, E_v].

    Returns: indices into y's channels [count], in rising order.
    """
    energy = y.square().mean((0, 1)) * out_weight.square().sum(0).repeat(2)
    return energy.argsort(descending=True, stable=True)[:count].sort().values


def noise_clips(model: EtMamba) -> Tensor:
    """Drifting noise with the 1/f spectrum of natural pictures, of any contrast and colour: [B, C, T, H, W].

    Always the same for the same shape. Up to 4 frames, at least 4 clips, at least 4·D tokens in all.
    """
    generator = torch.Generator().manual_seed(0)
    frames, (height, width) = min(model.num_frames, 4), model.img_size
    tokens = frames * math.prod(model.grid_size)
    batch, chans = max(4, math.ceil(4 * model.embed_dim / tokens)), model.in_chans

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    fy, fx = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    falloff = 1 / fy.hypot(fx).clamp(min=1 / max(height, width))
    spectrum = torch.fft.rfft2(normal(1, 1, height, width) + 0.5 * normal(chans, 1, height, width)) * falloff
    dy, dx = (2 * normal(2, 1, 1, 1, 1)).unbind(1)  # pixels a frame
    drift = torch.arange(frames)[:, None, None] * (fy * dy + fx * dx)  # [B, 1, T, H, W/2 + 1]
    clips = torch.fft.irfft2(spectrum * torch.exp(-2j * math.pi * drift), s=(height, width))
    contrast = torch.linspace(0.2, 1.4, batch).view(-1, 1, 1, 1, 1)  # 1 is a normalised clip's
    return clips / clips.std((1, 2, 3, 4), keepdim=True) * contrast + 0.7 * normal(chans, 1, 1, 1)


def _refit(mixer: nn.Module, layer: nn.Linear, x: Tensor, wanted: Tensor) -> None:
    """Ridge regression of `wanted` on what `layer` sees in `mixer(x)`, towards the layer's own weight; not its bias."""
    seen = []
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        mixer(x)
    inputs = seen[0].flatten(0, -2).double()  # [rows, in]
    missed = (wanted - F.linear(seen[0], layer.weight)).flatten(0, -2).double()  # [rows, out]
    gram = inputs.T @ inputs
    gram += RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram)).to(gram)
    layer.weight += torch.linalg.solve(gram, inputs.T @ missed).T.to(layer.weight)


def _videomamba(source: LoadedCheckpoint, model: EtMamba) -> EtMamba:
    """The source as a model for the clips of `model`, in float32 at least."""
    found, wanted = source.architecture, architecture_of(model.state_dict())
    if found["block"] != "bimamba":
        raise CheckpointError(f"{source.source} is no VideoMamba; it looks like {source.name}")
    if differing := [key for key in SHARED if found[key] != wanted[key]]:
        there, here = (" and ".join(f"{key} {side[key]}" for key in differing) for side in (found, wanted))
        raise CheckpointError(f"the checkpoint has {there} ({source.name}); the model has {here}")
    video = EtMamba(
        model.img_size,
        model.num_frames,
        model.in_chans,
        source.num_classes,
        stem=found["stem"],
        block="bimamba",
        motion=isinstance(model.motion, Motion),
        device="meta",
        **{key: found[key] for key in SHARED},
    )
    weights = fit(source, video)
    if TIMES not in source.tensors:
        weights[TIMES] = model.temporal_pos_embedding.detach()
    video.load_state_dict(
        {k: v.to(torch.promote_types(v.dtype, torch.float32)) for k, v in weights.items()}, assign=True
    )
    return video.eval()


def _summary(names: Iterable[str]) -> str:
    """Parameter names -> 'blocks.*.local, head, stem'."""
    short = {re.sub(r"^blocks\.\d+", "blocks.*", name) for name in names}
    return ", ".join(sorted({".".join(name.split(".")[: 3 if name.startswith("blocks") else 1]) for name in short}))
