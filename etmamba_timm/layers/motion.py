"""What moves, instead of what is there: an input for models that learn actions from few clips."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = (0.3, 3.0, 3.0)  # so that luminance and its changes vary about as much as colours do


class Motion(nn.Module):
    """Three channels in the place of colours: luminance, its change to the next frame, and that from the one before.

    From few clips a model learns scenes sooner than actions, if it sees colours. Beyond both ends of a clip nothing
    changes. The channels' scales aren't trained; they are kept with the weights, which tells what these are for.
    """

    scale: Tensor

    def __init__(self, device=None, dtype=None) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(SCALE, device=device, dtype=dtype))

    def init_weights(self) -> None:
        """Sets the scales, for a model that was made on 'meta'."""
        self.scale.copy_(torch.tensor(SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """x: clip [B, 3, T, H, W], normalised -> [B, 3, T, H, W]."""
        grey = x.mean(1, keepdim=True)
        longer = F.pad(grey, (0, 0, 0, 0, 1, 1), mode="replicate")
        channels = torch.cat([grey, longer[:, :, 2:] - grey, grey - longer[:, :, :-2]], 1)
        return channels * self.scale.to(x.dtype).view(-1, 1, 1, 1)
