"""The cost of a clip: parameters and multiply-adds, counted from the shapes of a model's weights."""

from dataclasses import dataclass

from torch import nn

from ..layers import Ebs
from .etmamba import EtMamba

# VideoMamba's published counts omit these layers, which its fused operator hides from the counter.
_HIDDEN_FROM_VIDEOMAMBA = ("conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b")


@dataclass(frozen=True)
class Cost:
    """The cost of one clip. A multiply-add counts as one operation.

    Attributes:
        params: parameters.
        tokens: tokens of the clip, including the class token.
        macs: multiply-adds of all linear maps, convolutions and attention, including those at padded positions.
        scan_macs: multiply-adds of the selective scans: for each token and channel of a direction, 4 per state
            (Δ·A, decay, input, read-out) plus 3 (Δ·u, D·u, gate). Exponentials aren't counted.
        videomamba_macs: `macs` as VideoMamba counts them: without the short convolutions, x_proj and dt_proj, which
            are part of its fused operator (nor the scan). Lower than the true cost; for comparison with its tables.
    """

    params: int
    tokens: int
    macs: int
    scan_macs: int
    videomamba_macs: int

    @property
    def total_macs(self) -> int:
        """The true cost: `macs + scan_macs`."""
        return self.macs + self.scan_macs


def count_cost(model: EtMamba, num_frames: int | None = None, img_size: int | tuple[int, int] | None = None) -> Cost:
    """Counts the cost of one clip. The model isn't run, so it may be on the 'meta' device.

    Args:
        model: the model.
        num_frames: frames of the clip; by default the model's.
        img_size: height and width of the clip in pixels, an int or (H, W); by default the model's.

    Returns: the cost.
    """
    frames = num_frames or model.num_frames
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size or model.img_size
    pixels = frames * height * width
    patches = frames * (height // model.patch_size) * (width // model.patch_size)
    tokens = 1 + patches

    macs = hidden = scan = 0
    shared: set[str] = set()  # EBS runs these once per direction
    for name, module in model.named_modules():
        if isinstance(module, Ebs):
            shared.update(f"{name}.{leaf}" for leaf in ("pw", "conv1d", "x_proj", "dt_proj"))
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            positions = 2 * tokens if name in shared else _positions(name, tokens, patches, pixels)
            if name.rpartition(".")[2] in _HIDDEN_FROM_VIDEOMAMBA:
                hidden += module.weight.numel() * positions
            macs += module.weight.numel() * positions
        if hasattr(module, "A_log"):  # a mixer: two directions, with one SSM or two
            channels, states = module.A_log.shape
            scan += 2 * tokens * channels * (4 * states + 3)
    if model.attn_pool is not None:
        macs += 2 * tokens * model.embed_dim  # the query's products with the keys, and the sum of the values
    params = sum(p.numel() for p in model.parameters())
    return Cost(params, tokens, macs, scan, macs - hidden)


def _positions(name: str, tokens: int, patches: int, pixels: int) -> int:
    """How many times one clip uses each weight of the module `name`."""
    if name.startswith("stem."):
        return pixels
    if name == "patch_embed.proj" or ".local.conv" in name:
        return patches
    return tokens if name == "attn_pool.kv" or not name.startswith(("attn_pool.", "head")) else 1
