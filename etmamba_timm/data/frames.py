"""A video stored as a folder of its frames, such as `img_00001.jpg`, `img_00002.jpg`, ..."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from mimetypes import guess_type
from operator import index as as_index
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .embedded import VideoFile
from .ffmpeg import VideoError
from .video import VideoInfo, VideoReader, wanted_frames

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


def open_video(
    path: str | VideoFile, warn: Callable[[VideoFile, str], None] | None = None
) -> "VideoReader | FrameFolder":
    """A reader of a video file, a video in a dataset's row, or a folder of frames; raises VideoError as they do.

    `warn` is for `VideoReader`.
    """
    return FrameFolder(path) if isinstance(path, str | Path) and os.path.isdir(path) else VideoReader(path, warn)


class FrameFolder:
    """Reads the frames in the folder at `path`, with the methods of `VideoReader`; `info` describes the video.

    All pictures in the folder are frames, in natural order of their names (2.jpg before 10.jpg). Numbers may begin
    anywhere and have gaps. The frame rate is unknown. A picture that can't be read is an error, as there is no need to
    have one.

    Raises:
        VideoError: no pictures, or the first can't be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._names = sorted(_pictures(self.path), key=_natural)
        if not self._names:
            raise VideoError(
                f"{self.path}: is a folder without pictures; name a video file, or a folder of frames "
                f"(of videos, all: {_pattern(self.path)}; pictures: {', '.join(PICTURES[:3])}, ...)"
            )
        self._size: tuple[int, int] | None = None
        height, width = self._size = self._picture(0).shape[:2]
        self.info = VideoInfo(self.path, len(self._names), height, width, 0, 0.0, 0.0)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The frames with these numbers, in any order, repeated or not: uint8 [T, H, W, 3] RGB.

        Raises:
            IndexError: a number is not in 0 ... num_frames - 1.
            VideoError: a picture can't be read, or has another size than the first.
        """
        numbers = [as_index(i) for i in indices]
        wanted = wanted_frames(self.info, numbers)
        pictures = np.empty((len(wanted), self.info.height, self.info.width, 3), dtype=np.uint8)
        for row, number in enumerate(wanted):
            pictures[row] = self._picture(number)
        result = torch.from_numpy(pictures)
        return result if numbers == wanted else result[[wanted.index(i) for i in numbers]]

    def stream(self, indices: Iterable[int]) -> Iterator[Tensor]:
        """The frames with these numbers in ascending order, each once and one at a time: uint8 [H, W, 3] RGB.

        Raises:
            IndexError, VideoError: as `read`.
        """
        return (torch.from_numpy(self._picture(number)) for number in wanted_frames(self.info, indices))

    def times(self) -> list[float]:
        """Raises VideoError: the times of the frames are unknown."""
        raise VideoError(
            f"{self.path}: a folder of frames doesn't tell when they are shown; make a video of it with ffmpeg"
        )

    def _picture(self, number: int) -> np.ndarray:
        """A frame, turned as its file says: uint8 [H, W, 3] RGB."""
        file = self.path / self._names[number]
        try:
            with Image.open(file) as image:
                picture = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise VideoError(f"{file}: can't be read as a picture ({error}); extract the frames again") from error
        if self._size not in (None, picture.shape[:2]):
            sizes = ["×".join(map(str, size[::-1])) for size in (picture.shape[:2], self._size)]
            raise VideoError(
                f"{file}: is {sizes[0]} pixels, and the folder's first picture {sizes[1]}; the frames of a video have "
                "one size: extract them again, or move other pictures elsewhere"
            )
        return picture


def is_there(path: str | Path) -> bool:
    """Whether a path is a file, or a folder that directly holds pictures."""
    return os.path.isfile(path) or (os.path.isdir(path) and any(True for _ in _pictures(path)))


def is_picture(name: str) -> bool:
    """Whether a file's name is that of a picture."""
    return name.lower().endswith(PICTURES) and not name.startswith(".")


def _pattern(folder: Path) -> str:
    """A pattern for the shell that names the videos in a folder or in the folders there."""
    for depth in ("*", "*/*"):
        found = (path.suffix for path in folder.glob(depth) if (guess_type(path.name)[0] or "").startswith("video"))
        if suffix := next(found, None):
            return f"{folder}/{depth}{suffix}"
    return f"{folder}/*.mp4"


def _pictures(folder: str | Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if is_picture(entry.name))


def _natural(name: str) -> list:
    """A key that puts 2.jpg before 10.jpg; numbers stand at odd places, so that they are compared with numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def probe(path: str | Path) -> VideoInfo:
    """Describes the video at `path`, a file or a folder of frames; raises VideoError as `open_video` does."""
    return open_video(path).info


def read_frames(path: str | Path, indices: Sequence[int]) -> Tensor:
    """Frames of the video at `path` by number, as its reader reads them: uint8 [T, H, W, 3] RGB."""
    return open_video(path).read(indices)
