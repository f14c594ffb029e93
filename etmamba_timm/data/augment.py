"""The transform for training: timm's and torchvision's augmentations, alike on all frames of a clip."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop, functional

MOST_MAGNITUDE = 9.99  # at 10, timm would posterise to 0 bits: a black picture, and an error of newer Pillows


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, flip, RandAugment, normalisation, random erasing; calling it makes a clip of frames.

    It draws from the global generators of `random`, NumPy and PyTorch.

    Attributes:
        size: (height, width) of the clip, in pixels.
        mean, std: as in `EvalTransform`, three values.
        scale: least and most share of the frame's area that the crop covers; (1, 1) with `ratio` (1, 1) crops a square.
        ratio: least and most of the crop's width to height.
        flip: chance of a mirror image. 0 where left and right are the class (Something-Something).
        rand_augment: timm's configuration, or '' for none. The paper's: magnitude 9, its deviation 0.5. Magnitudes end
            just below 10, whatever `mmax` says.
        erasing: chance of random erasing, with noise; the same rectangle in all frames.
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
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give 3 each, for RGB")
        for name, value in (("flip", self.flip), ("erasing", self.erasing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; a chance lies within 0 and 1")
        if self.rand_augment:
            try:
                rand_augment_transform(self.rand_augment, {})
            except Exception as error:  # timm asserts, looks up, converts
                raise ValueError(
                    f"rand_augment is {self.rand_augment!r}, none of timm's configurations such as "
                    "'rand-m9-mstd0.5-inc1'; leave it empty for none"
                ) from error

    def __call__(self, frames: Tensor) -> Tensor:
        """frames: uint8 [T, H, W, 3] RGB -> float32 [3, T, h, w], normalised."""
        clip = frames.permute(0, 3, 1, 2)  # [T, H, W, 3] -> [T, 3, H, W]
        clip = RandomResizedCrop(self.size, self.scale, self.ratio)(clip)
        if torch.rand(()) < self.flip:
            clip = functional.horizontal_flip(clip)
        if self.rand_augment:
            clip = self._rand_augment(clip)
        clip = clip.transpose(0, 1).contiguous().float().div_(255)  # -> [3, T, h, w], and so in memory
        mean, std = (clip.new_tensor(values).view(-1, 1, 1, 1) for values in (self.mean, self.std))
        clip = clip.sub_(mean).div_(std)
        if self.erasing:
            erase = RandomErasing(self.erasing, mode="pixel", device="cpu")
            clip = erase(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])  # one picture of 3·T channels
        return clip

    def _rand_augment(self, clip: Tensor) -> Tensor:
        """timm draws anew for each picture; the generators are set back before each frame, so all are treated alike."""
        colour = tuple(round(255 * value) for value in self.mean)
        farthest = int(0.45 * min(self.size))  # pixels at magnitude 10; timm's share
        settings = {"translate_const": farthest, "img_mean": colour, "magnitude_max": MOST_MAGNITUDE}
        augment = rand_augment_transform(self.rand_augment, settings)
        states = random.getstate(), np.random.get_state()
        pictures = []
        for frame in clip:
            random.setstate(states[0])
            np.random.set_state(states[1])
            pictures.append(functional.pil_to_tensor(augment(functional.to_pil_image(frame))))
        return torch.stack(pictures)
