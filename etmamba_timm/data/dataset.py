"""Annotated videos as datasets of clips, for training and for evaluation."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..clip import Clip
from .annotations import Annotations
from .sampling import draw_clip, fixed_clips
from .transforms import ElongatedError, EvalTransform
from .video import VideoError, VideoReader

_logger = logging.getLogger(__name__)

MOST_FAILURES = 20  # undecodable videos in a row before TrainClips gives up


class TrainClips(Dataset):
    """One random clip per video: {'clip': float32 [C, T, H, W], 'label': int, 'index': int}.

    Random choices depend only on `seed`, `epoch` and the video's index, not on the workers or the order of access. A
    video that can't be decoded is logged once and replaced by the next one that can, with that one's label and index,
    so batches keep their size.

    Args:
        annotations: the videos.
        transform: uint8 [T, H, W, 3] -> float32 [C, T, H, W]; may use the global random generators.
        clip: how frames are sampled.
        seed: the random seed.

    Raises:
        VideoError: on access, when `MOST_FAILURES` videos in a row, or all of them, can't be decoded.
    """

    def __init__(
        self, annotations: Annotations, transform: Callable[[Tensor], Tensor], clip: Clip, seed: int = 0
    ) -> None:
        self.annotations, self.transform, self.clip, self.seed = annotations, transform, clip, seed
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
                    frames = reader.read(draw_clip(self.clip, reader.info.num_frames, random.Random(random.random())))
                except VideoError as error:
                    _log_failure(self._failed, i, error)
                    continue
                return {"clip": self.transform(frames), "label": label, "index": i}
        path = self.annotations.samples[index][0]
        raise VideoError(
            f"{path}: {len(tries)} videos in a row, starting with this one, can't be decoded; check the dataset"
        )


class EvalClips(Dataset):
    """Fixed views of each video: {'clip': float32 [clips · crops, C, T, H, W], 'label': int, 'index': int}, or None.

    Args:
        annotations, clip: as in `TrainClips`.
        transform: makes the crops.
        num_clips, num_crops: views in time and in space (1 or 3).
    """

    def __init__(
        self,
        annotations: Annotations,
        transform: EvalTransform,
        clip: Clip,
        num_clips: int = 1,
        num_crops: int = 1,
    ) -> None:
        self.annotations, self.transform, self.clip = annotations, transform, clip
        self.num_clips, self.num_crops = num_clips, num_crops
        self._failed: set[int] = set()

    def __len__(self) -> int:
        return len(self.annotations.samples)

    def __getitem__(self, index: int) -> dict | None:
        path, label = self.annotations.samples[index]
        try:
            reader = VideoReader(path)
            clips = fixed_clips(self.clip, reader.info.num_frames, self.num_clips)
            frames = reader.read([number for clip in clips for number in clip])
            views = [self.transform(part, self.num_crops) for part in frames.split(self.clip.num_frames)]
        except VideoError as error:
            _log_failure(self._failed, index, error)
            return None
        except ElongatedError as error:
            _log_failure(self._failed, index, VideoError(f"{path}: {error}"))
            return None
        return {"clip": torch.cat(views), "label": label, "index": index}


def collate(items: Sequence[dict | None]) -> dict[str, Tensor] | None:
    """Batches the items that could be decoded; None if none could."""
    decoded = [item for item in items if item is not None]
    return default_collate(decoded) if decoded else None


@contextmanager
def seeded(*seeds: int) -> Iterator[None]:
    """Seeds the global generators of `random`, NumPy and PyTorch (CPU), and restores their states afterwards."""
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


def _log_failure(logged: set[int], index: int, error: VideoError) -> None:
    if index not in logged:
        logged.add(index)
        _logger.warning("left out: %s", error)
