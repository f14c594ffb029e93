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

from ..clip import Clip
from ..words import number_of
from .annotations import Annotations, Label
from .embedded import VideoFile
from .ffmpeg import VideoError
from .frames import open_video
from .sampling import draw_clip, fixed_clips
from .transforms import ElongatedError, EvalTransform

_logger = logging.getLogger(__name__)

MOST_FAILURES = 20  # undecodable videos in a row before TrainClips gives up
MOST_BYTES = 2**27  # of frames as decoded, in memory at a time; one clip may have more


class TrainClips(Dataset):
    """One random clip per video: {'clip': float32 [C, T, H, W], 'label': int, 'index': int}.

    If videos have several labels, 'label' is float32 [classes] of zeros and ones.

    Random choices depend only on `seed`, `epoch` and the item's number, not on the workers or the order of access. With
    n videos, items i + n, i + 2n, ... are further clips of video i in the same epoch; 'index' is the video's. A video
    that can't be decoded is logged once (see `Warned`) and replaced by the next one that can, with that one's label and
    index, so batches keep their size.

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
        self._warned = Warned([path for path, _ in annotations.samples])

    def __len__(self) -> int:
        return len(self.annotations.samples)

    def __getitem__(self, index: int) -> dict:
        again = index // len(self)
        tries = [(index + i) % len(self) for i in range(min(len(self), MOST_FAILURES))]
        for i in tries:
            path, label = self.annotations.samples[i]
            with seeded(self.seed, self.epoch, i, again):  # NumPy's seeds are the same without a last 0
                try:
                    reader = open_video(path, self._warned)
                    frames = reader.read(draw_clip(self.clip, reader.info.num_frames, random.Random(random.random())))
                except VideoError as error:
                    self._warned.failed(path, error)
                    continue
                wanted = target(label, len(self.annotations.classes))
                return {"clip": self.transform(frames), "label": wanted, "index": i}
        path = self.annotations.samples[tries[0]][0]
        raise VideoError(
            f"{path}: {number_of(len(tries), 'video')} in a row, starting with this one, can't be decoded; check the "
            "dataset"
        )


class Warned:
    """One warning about each file, however often and in how many worker processes it is read; one more if it fails.

    What was said of which file is marked in memory that the workers share.

    Args:
        files: the files that may be warned of.
    """

    def __init__(self, files: Sequence[VideoFile]) -> None:
        self._marks = torch.zeros(len(files), dtype=torch.uint8).share_memory_()
        self._number = {str(file): number for number, file in enumerate(files)}

    def __call__(self, file: VideoFile, message: str, level: int = 1) -> None:
        """Logs the message, unless the file was warned of before, at this level or a higher one."""
        number = self._number.get(str(file))
        if number is None or self._marks[number] < level:
            _logger.warning("%s", message)
        if number is not None:
            self._marks[number] = max(level, int(self._marks[number]))

    def failed(self, file: VideoFile, error: VideoError) -> None:
        """Warns of a file that can't be decoded."""
        self(file, f"left out: {error}", 2)


@dataclass(frozen=True)
class Views:
    """Fixed views of video files: some clips of each, and some crops of each clip.

    Attributes:
        files: the videos.
        transform: makes the crops, and normalises them.
        clip: how frames are sampled; its `num_frames` is the length T of a view.
        num_clips, num_crops: views in time and in space (1 or 3).
        warned: says what is wrong with a file once, however often it is read; None: each time.

    Raises:
        ValueError: another number of clips or crops.
    """

    files: Sequence[VideoFile]
    transform: EvalTransform
    clip: Clip
    num_clips: int = 1
    num_crops: int = 1
    warned: "Warned | None" = None

    def __post_init__(self) -> None:
        if self.num_clips < 1 or self.num_crops not in (1, 3):
            raise ValueError(
                f"num_clips is {self.num_clips} and num_crops {self.num_crops}; use 1 clip or more, and 1 crop "
                "(centre) or 3 (start, centre, end)"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a view as read: T, h, w, C."""
        return self.clip.num_frames, *self.transform.size, len(self.transform.mean)

    def read(self, index: int) -> Iterator[Tensor]:
        """The crops of each clip of a file, one clip after the other: uint8 [num_crops, T, h, w, C].

        Raises:
            VideoError: the file can't be decoded, or its frames are too elongated.
        """
        for frames in self.frames(index):
            try:
                yield self.transform.crop(frames, self.num_crops)
            except ElongatedError as error:
                raise VideoError(f"{self.files[index]}: {error}") from error

    def frames(self, index: int) -> Iterator[Tensor]:
        """The frames of each clip of a file, one clip after the other: uint8 [T, H, W, 3].

        Clips are decoded together, as frames they share are then decoded once, as far as all frames fit into
        `MOST_BYTES`.

        Raises:
            VideoError: the file can't be decoded.
        """
        reader = open_video(self.files[index], self.warned)
        info, length = reader.info, self.clip.num_frames
        clips = fixed_clips(self.clip, info.num_frames, self.num_clips)
        together = max(1, MOST_BYTES // (length * info.height * info.width * 3))
        for first in range(0, len(clips), together):
            yield from reader.read([i for clip in clips[first : first + together] for i in clip]).split(length)


class EvalClips(Dataset):
    """Fixed views of each video: {'clip': float32 [clips · crops, C, T, H, W], 'label': int, 'index': int}, or None.

    Labels are as in `TrainClips`.

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
        self._files = [file for file, _ in annotations.samples]
        self._warned = Warned(self._files)

    def __len__(self) -> int:
        return len(self.annotations.samples)

    def __getitem__(self, index: int) -> dict | None:
        path, label = self.annotations.samples[index]
        try:
            views = [self.transform(frames, self.num_crops) for frames in self.views().frames(index)]
        except VideoError as error:
            self.leave_out(index, error)
            return None
        except ElongatedError as error:
            self.leave_out(index, VideoError(f"{path}: {error}"))
            return None
        return {"clip": torch.cat(views), "label": target(label, len(self.annotations.classes)), "index": index}

    def views(self) -> Views:
        """The same views of all videos, without their labels."""
        return Views(self._files, self.transform, self.clip, self.num_clips, self.num_crops, self._warned)

    def leave_out(self, index: int, error: VideoError) -> None:
        """Logs once that a video can't be decoded."""
        self._warned.failed(self._files[index], error)


def target(label: Label, num_classes: int) -> int | Tensor:
    """What a loss takes: the class index, or for several labels float32 [num_classes] of zeros and ones."""
    if isinstance(label, int):
        return label
    return torch.zeros(num_classes).index_fill(0, torch.tensor(label, dtype=torch.int64), 1.0)


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
