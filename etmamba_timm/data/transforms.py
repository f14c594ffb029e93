"""The transform for evaluation, from frames to a model's input: resize, crop, normalise."""

from dataclasses import dataclass

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ..words import number_of

MOST_PIXELS = 2**22  # of a resized frame; only extremely elongated frames exceed it
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


class ElongatedError(ValueError):
    """The frames' aspect ratio is so extreme that resizing would make them huge."""


@dataclass(frozen=True)
class EvalTransform:
    """The transform for evaluation; calling it returns one or three views of a clip.

    Frames are resized, with antialiasing and keeping their aspect ratio, until they just cover `size / crop_pct`: for
    a square size, this is the length of the short side. Views of `size` are cropped, scaled to [0, 1] and normalised.

    Attributes:
        size: (height, width) of a view, in pixels.
        mean, std: one value per channel, for images in [0, 1]; three for RGB, one for luminance.
        interpolation: "bilinear", "bicubic" or "nearest".
        crop_pct: fraction of the resized frame's short side that a view covers, above 0 and up to 1.

    Raises:
        ValueError: an invalid setting.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bilinear"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size is {self.size}; give (height, width) in pixels, each 1 or more")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError(
                f"mean has {number_of(len(self.mean), 'value')} and std {len(self.std)}; give 3 each (RGB) or 1 "
                "each (luminance)"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; every value must be above 0 (1 for no scaling)")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}; choose one of {', '.join(_INTERPOLATIONS)}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}; it must be above 0 and at most 1 (for no extra crop)")

    @classmethod
    def from_model(cls, model: nn.Module, **overrides) -> "EvalTransform":
        """The transform of a timm model's `pretrained_cfg`; `overrides` are attributes of this class.

        For a model with one channel (by its `in_chans`, else by the cfg), three values of mean and std are averaged.

        Raises:
            ValueError: the model takes neither 1 nor 3 channels, or an invalid override.
        """
        cfg = resolve_model_data_config(model)
        channels = getattr(model, "in_chans", cfg["input_size"][0])
        if channels not in (1, 3):
            raise ValueError(
                f"the model takes {number_of(channels, 'channel')}; video frames have 3 (RGB) or 1 (luminance)"
            )
        mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
        if channels == 1:
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        fields = {"size": tuple(cfg["input_size"][1:]), "mean": mean, "std": std}
        fields |= {name: cfg[name] for name in ("interpolation", "crop_pct")}
        return cls(**fields | overrides)

    def __call__(self, frames: Tensor | np.ndarray, num_crops: int = 1) -> Tensor:
        """Returns views of a clip: `crop`, then `normalize`.

        Args:
            frames: uint8 [T, H, W, 3] RGB, a tensor or a NumPy array.
            num_crops: 1 for the centre; 3 for start, centre and end along the side with more to crop.

        Returns:
            float32 [num_crops, C, T, h, w], with C the number of values in `mean`.

        Raises:
            ValueError: other frames, or another number of crops.
            ElongatedError: the resized frames would be too large.
        """
        return self.normalize(self.crop(frames, num_crops))

    def crop(self, frames: Tensor | np.ndarray, num_crops: int = 1) -> Tensor:
        """Resizes and crops: uint8 [num_crops, T, h, w, C]. Arguments and errors are as in `__call__`."""
        given = f"{frames.dtype} {list(frames.shape)}" if hasattr(frames, "dtype") else f"a {type(frames).__name__}"
        if isinstance(frames, np.ndarray) and frames.dtype == np.uint8:
            frames = torch.from_numpy(frames.copy())  # which refuses negative strides (BGR to RGB) and read-only arrays
        if (
            not isinstance(frames, Tensor)
            or frames.dtype != torch.uint8
            or frames.ndim != 4
            or frames.shape[-1] != 3
            or not frames.numel()
        ):
            raise ValueError(
                f"frames are {given}; give uint8 [T, H, W, 3] RGB, a tensor or a NumPy array, as VideoReader reads"
            )
        if num_crops not in (1, 3):
            raise ValueError(f"num_crops is {num_crops}; use 1 (centre) or 3 (start, centre, end)")
        height, width = self.size
        covering = self._covering(*frames.shape[1:3])
        if covering[0] * covering[1] > MOST_PIXELS:
            before, after = "×".join(map(str, frames.shape[1:3])), "×".join(map(str, covering))
            raise ElongatedError(
                f"frames are {before} and would become {after} to cover {height}×{width}: too elongated; crop them "
                "first"
            )
        clip = frames.permute(0, 3, 1, 2)  # [T, H, W, 3] -> [T, 3, H, W]; channels last in memory resizes faster
        mode = InterpolationMode(self.interpolation)
        clip = functional.resize(clip, covering, interpolation=mode, antialias=True)
        if len(self.mean) == 1:
            clip = functional.rgb_to_grayscale(clip)
        clip = clip.permute(0, 2, 3, 1)  # -> [T, H, W, C]
        free_y, free_x = clip.shape[1] - height, clip.shape[2] - width
        y, x = round(free_y / 2), round(free_x / 2)
        corners = [(y, x)]
        if num_crops == 3:
            corners = [(y, 0), (y, x), (y, free_x)] if free_x >= free_y else [(0, x), (y, x), (free_y, x)]
        return torch.stack([clip[:, y : y + height, x : x + width] for y, x in corners])

    def normalize(self, views: Tensor) -> Tensor:
        """Scales to [0, 1] and normalises on the views' device: uint8 [B, T, h, w, C] -> float32 [B, C, T, h, w]."""
        clips = views.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        mean, std = (clips.new_tensor(values).view(-1, 1, 1, 1) for values in (self.mean, self.std))
        return clips.sub_(mean).div_(std)

    def _covering(self, height: int, width: int) -> list[int]:
        """The size [H, W] with the aspect ratio of height×width that just covers `size / crop_pct`."""
        least_height, least_width = (int(side / self.crop_pct) for side in self.size)
        if height * least_width <= width * least_height:
            return [least_height, width * least_height // height]
        return [height * least_width // width, least_width]
