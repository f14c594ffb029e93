"""Augmentation for training: timm's and torchvision's, the same for all frames of a clip, and blending with stills."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop, functional

from ..words import number_of

MOST_MAGNITUDE = 9.99  # at 10, timm posterises to 0 bits: a black image, and an error in newer versions of Pillow


def blend_still(clips: Tensor, most: float) -> Tensor:
    """Blends each clip with a still frame of another one, so that motion tells more of its class, and the scene less.

    After "background erasing" (Wang et al. 2021), which takes a frame of the same clip. It uses PyTorch's global random
    generator.

    Args:
        clips: [B, C, T, H, W].
        most: the greatest share of the still frame, in [0, 1]; each clip's share is drawn uniformly.
    """
    count, _, length = clips.shape[:3]
    shares, times = torch.rand(count, 1, 1, 1, 1) * most, torch.randint(length, (count,))
    stills = clips.roll(1, 0)[torch.arange(count), :, times, None]  # [B, C, 1, H, W]
    return clips.lerp(stills, shares.to(clips))


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, flip, RandAugment, normalisation and random erasing; calling it transforms a clip.

    It uses the global random generators of `random`, NumPy and PyTorch.

    Attributes:
        size: (height, width) of the clip, in pixels.
        mean, std: as in `EvalTransform`, with three values.
        scale: range of the fraction of the frame's area that is cropped.
        ratio: range of the crop's aspect ratio, width over height; (1, 1) for square crops.
        flip: probability of a horizontal flip; 0 if left and right distinguish classes (Something-Something).
        rand_augment: timm's configuration, or '' for none. The paper's has magnitude 9 and deviation 0.5. Magnitudes
            stay just below 10, whatever `mmax` says.
        erasing: probability of random erasing, with noise; the same rectangle in all frames.

    Raises:
        ValueError: an invalid setting.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(
                f"mean has {number_of(len(self.mean), 'value')} and std {len(self.std)}; give 3 each, for RGB"
            )
        for name, value in (("flip", self.flip), ("erasing", self.erasing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; a probability must be between 0 and 1")
        if self.rand_augment:
            try:
                rand_augment_transform(self.rand_augment, {})
            except Exception as error:  # timm raises AssertionError, KeyError, ValueError, ...
                raise ValueError(
                    f"rand_augment is {self.rand_augment!r}, which timm can't parse; give a configuration such as "
                    "'rand-m9-mstd0.5-inc1', or leave it empty for none"
                ) from error

    def __call__(self, frames: Tensor) -> Tensor:
        """frames: uint8 [T, H, W, 3] RGB -> float32 [3, T, h, w], normalised."""
        clip = frames.permute(0, 3, 1, 2)  # [T, H, W, 3] -> [T, 3, H, W]
        clip = RandomResizedCrop(self.size, self.scale, self.ratio)(clip)
        if torch.rand(()) < self.flip:
            clip = functional.horizontal_flip(clip)
        if self.rand_augment:
            clip = self._rand_augment(clip)
        clip = clip.transpose(0, 1).contiguous().float().div_(255)  # -> [3, T, h, w]
        mean, std = (clip.new_tensor(values).view(-1, 1, 1, 1) for values in (self.mean, self.std))
        clip = clip.sub_(mean).div_(std)
        if self.erasing:
            erase = RandomErasing(self.erasing, mode="pixel", device="cpu")
            clip = erase(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])  # as one image of 3·T channels
        return clip

    def _rand_augment(self, clip: Tensor) -> Tensor:
        """RandAugment with the same choices for all frames: the generators are reset before each frame."""
        colour = tuple(round(255 * value) for value in self.mean)
        shift = int(0.45 * min(self.size))  # pixels at magnitude 10; timm's fraction
        settings = {"translate_const": shift, "img_mean": colour, "magnitude_max": MOST_MAGNITUDE}
        augment = rand_augment_transform(self.rand_augment, settings)
        states = random.getstate(), np.random.get_state()
        augmented = []
        for frame in clip:
            random.setstate(states[0])
            np.random.set_state(states[1])
            augmented.append(functional.pil_to_tensor(augment(functional.to_pil_image(frame))))
        return torch.stack(augmented)
