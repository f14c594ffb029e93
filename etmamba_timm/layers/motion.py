"""What moves, instead of what is there: an input for models that learn actions from few clips."""

import torch
from torch import Tensor, nn

GREY, CHANGE = 0.3, 3.0  # in the input's units, so that both vary by about as much as colours do


class Motion(nn.Module):
    """Three channels in the place of colours: luminance, its change to the next frame, and that from the one before.

    From few clips a model learns scenes sooner than actions, if it sees colours. Beyond both ends of a clip nothing
    changes. There are no weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: clip [B, 3, T, H, W], normalised -> [B, 3, T, H, W]."""
        grey = x.mean(1, keepdim=True)
        after = torch.cat([grey[:, :, 1:], grey[:, :, -1:]], 2)
        before = torch.cat([grey[:, :, :1], grey[:, :, :-1]], 2)
        return torch.cat([GREY * grey, CHANGE * (after - grey), CHANGE * (grey - before)], 1)
