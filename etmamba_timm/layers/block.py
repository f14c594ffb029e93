"""The pre-norm residual block around a mixer: rows (a) to (c) of the paper's ablation, and the base of (d)."""

from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn

from .bimamba import BiMamba
from .ebs import Ebs
from .fold import fold_weights
from .norm import LayerNorm, RmsNorm


class MixerBlock(nn.Module):
    """`X ← X + DropPath(Mixer(Norm(X)))`; a subclass names the norm and the mixer.

    Args:
        dim: token width D.
        drop_path: rate of stochastic depth.
        depth, d_state, expand, d_conv: see the mixer.
    """

    norm_layer: type[LayerNorm | RmsNorm]
    mixer_layer: type[nn.Module]

    def __init__(
        self,
        dim: int,
        depth: int = 1,
        d_state: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = self.norm_layer(dim, before_linear=True, **dd)
        self.mixer = self.mixer_layer(dim, depth, d_state, expand, d_conv, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """x: tokens [B, 1 + t·h·w, D], class token first; grid (t, h, w), which these blocks don't need."""
        return x + self.drop_path(self.mixer(self.norm(x)))


@register_notrace_module
class EbsBlock(MixerBlock):
    """EBS alone: row (c)."""

    norm_layer = LayerNorm
    mixer_layer = Ebs
    mixer: Ebs

    @property
    def folded(self) -> bool:
        """Whether `reparameterize` has been called."""
        return self.mixer.pw is None

    def reparameterize(self) -> None:
        """Folds the block (see `fold_weights`), in place. timm's `reparameterize_model` calls this."""
        if not self.folded:
            weights = self._folded_weights("mixer.in_proj", "mixer.pw")
            self.mixer.pw = None
            self.load_state_dict(weights)

    def _folded_weights(self, *layers: str) -> dict[str, Tensor]:
        """The block's state dict, folded; `layers` names what the folding merges.

        Raises:
            ValueError: one of them was wrapped or replaced, so that its weight isn't what it computes with.
        """
        weights = self.state_dict()
        if wrapped := [layer for layer in layers if f"{layer}.weight" not in weights]:
            raise ValueError(
                f"can't fold a block whose {', '.join(wrapped)} isn't a plain nn.Linear; first merge the adapter, or "
                "make the pruning or parametrisation permanent (a quantised model can't be folded: fold, then quantise)"
            )
        return fold_weights(weights)


@register_notrace_module
class BiMambaBlock(MixerBlock):
    """VideoMamba's block: rows (a) and (b)."""

    norm_layer = RmsNorm
    mixer_layer = BiMamba
    norm: RmsNorm
    mixer: BiMamba
