"""Annotated videos as datasets of clips, for training and for evaluation."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .annotations import Annotations
from .sampling import random_clip, random_segments, sample_clips, sample_segments
from .transforms import ElongatedError, EvalTransform
from .video import VideoError, VideoReader

_logger = logging.getLogger(__name__)

MOST_FAILURES = 20  # videos in a row that can't be decoded


@dataclass(frozen=True)
class Sampling:
    """Which frames make a clip.

    Attributes:
        num_frames: frames of a clip.
        stride: frames from one to the next, in dense sampling; 0 for uniform sampling over the whole video.
    """

    num_frames: int = 16
    stride: int = 2

    def one(self, num_video_frames: int, generator: random.Random) -> list[int]:
        """A clip for training, drawn at random."""
        if self.stride:
            return random_clip(num_video_frames, self.num_frames, self.stride, random=generator)
        return random_segments(num_video_frames, self.num_frames, random=generator)

    def several(self, num_video_frames: int, num_clips: int) -> list[list[int]]:
        """Clips for evaluation, always the same."""
        if self.stride:
            return sample_clips(num_video_frames, self.num_frames, self.stride, num_clips)
        return sample_segments(num_video_frames, self.num_frames, num_clips)


class TrainClips(Dataset):
    """One random clip a video: {'clip': float32 [C, T, H, W], 'label': int, 'index': int}.

    What is drawn depends on `seed`, `epoch` and the video's index alone: not on workers, their number, or what was
    drawn before. In the place of a video that can't be decoded, which is logged once, comes the next that can, with its
    own label and index; so a batch keeps its size.

    Args:
        annotations: the videos.
        transform: uint8 [T, H, W, 3] -> float32 [C, T, H, W]; draws from the global generators.
        sampling: which frames make a clip.
        seed: of everything drawn.

    Raises:
        VideoError: when a clip is asked for, and `MOST_FAILURES` videos in a row, or all, can't be decoded.
    """

    def __init__(
        self, annotations: Annotations, transform: Callable[[Tensor], Tensor], sampling: Sampling, seed: int = 0
    ) -> None:
        self.annotations, self.transform, self.sampling, self.seed = annotations, transform, sampling, seed
        self.epoch = 0
        self._failed: set[int] = set()

    def __len__(self) -> int:
        return len(self.annotations.samples)

    def __getitem__(self, index: int) -> dict:
        tries = [(index + i) % len(self) for i in range(min(len(self), MOST_FAILURES))]
        for i in tries:
            path, label = self.annotations.samples[i]
            with seeded(self.seed, self.epoch, i):
                try:
                    reader = VideoReader(path)
                    frames = reader.read(self.sampling.one(reader.info.num_frames, random.Random(random.random())))
                except VideoError as error:
                    _failed(self._failed, i, error)
                    continue
                return {"clip": self.transform(frames), "label": label, "index": i}
        path = self.annotations.samples[index][0]
        raise VideoError(f"{path}: from this one on, {len(tries)} videos in a row can't be decoded; check the dataset")


class EvalClips(Dataset):
    """Fixed views of each video: {'clip': float32 [clips · crops, C, T, H, W], 'label': int, 'index': int}, or None.

    Args:
        annotations, sampling: as in `TrainClips`.
        transform: cuts the crops.
        num_clips, num_crops: views over time, and over space (1 or 3).
    """

    def __init__(
        self,
        annotations: Annotations,
        transform: EvalTransform,
        sampling: Sampling,
        num_clips: int = 1,
        num_crops: int = 1,
    ) -> None:
        self.annotations, self.transform, self.sampling = annotations, transform, sampling
        self.num_clips, self.num_crops = num_clips, num_crops
        self._failed: set[int] = set()

    def __len__(self) -> int:
        return len(self.annotations.samples)

    def __getitem__(self, index: int) -> dict | None:
        path, label = self.annotations.samples[index]
        try:
            reader = VideoReader(path)
            clips = self.sampling.several(reader.info.num_frames, self.num_clips)
            frames = reader.read([number for clip in clips for number in clip])
            views = [self.transform(part, self.num_crops) for part in frames.split(self.sampling.num_frames)]
        except VideoError as error:
            return _failed(self._failed, index, error)
        except ElongatedError as error:
            return _failed(self._failed, index, VideoError(f"{path}: {error}"))
        return {"clip": torch.cat(views), "label": label, "index": index}


def collate(items: Sequence[dict | None]) -> dict[str, Tensor] | None:
    """A batch of those items that could be decoded; None if none could."""
    given = [item for item in items if item is not None]
    return default_collate(given) if given else None


@contextmanager
def seeded(*seeds: int) -> Iterator[None]:
    """Seeds the global generators of `random`, NumPy and PyTorch (CPU), and sets them back afterwards."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    value = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.default_generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def _failed(known: set[int], index: int, error: VideoError) -> None:
    if index not in known:
        known.add(index)
        _logger.warning("left out: %s", error)
