"""Frames of a video file by their number, decoding no more than must be.

A pass over the packets, without decoding them, gives every frame's time and so its number, also where the frame rate
varies. To read, the file is entered at the keyframe before the first wanted frame and decoded from there; where the
next wanted frame lies behind a later keyframe, the way between is skipped. Frames are known by their times; a file that
does not tell them reliably is decoded from its start and its frames are counted: slower, never wrong.
"""

import logging
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import index as as_index
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from . import ffmpeg
from .embedded import EmbeddedVideo, VideoFile
from .ffmpeg import VideoError

_logger = logging.getLogger(__name__)

_TIMED = ("mov", "matroska", "flv")  # containers that store when each frame is shown; elsewhere FFmpeg works it out
_NEAR = 12  # frames that are decoded sooner than skipped
_LATE = 16  # frames by which a decoder may be late; a wanted frame that is later is lost


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
        path: the file.
        num_frames: frames that can be asked for.
        height, width: of a frame as shown, i.e. turned, in pixels.
        rotation: how far the stored frames are turned clockwise to be shown: 0, 90, 180 or 270 degrees.
        fps: frames a second, on average; 0 if the file does not tell.
        duration: seconds; 0 if the file does not tell.
    """

    path: VideoFile
    num_frames: int
    height: int
    width: int
    rotation: int
    fps: float
    duration: float


class VideoReader:
    """Reads frames of the video file at `path`, or of a video in a dataset's row; `info` says what it holds.

    It keeps the file's index but not the file open: it needs no closing and can be pickled. Of several video streams it
    reads the first. A frame that cannot be decoded is replaced by the nearest earlier one that can (by a later one, if
    there is none); what a decoder patches up itself counts as decoded. One warning for each reader tells of such
    frames, or that an mp4 is cut off and only its first part can be read. Mirroring and non-square pixels are ignored.

    Raises:
        VideoError: there is no such file, it is empty, cut off or no video, or none of its frames can be decoded.
    """

    def __init__(self, path: str | Path | EmbeddedVideo) -> None:
        self.path = path if isinstance(path, EmbeddedVideo) else Path(path)
        self._warned = False
        self._given: dict[int, int] | None = None  # times of packets that are worked out, by their places in the file
        ffmpeg.check_file(self.path)
        with ffmpeg.opened(self.path) as (container, stream):
            timed, is_avi = container.format.name.startswith(_TIMED), container.format.name == "avi"
            codec = stream.codec_context.name
            stored = []  # of each packet with a frame to show: time of showing, whether a keyframe, place and order

            def indexed() -> Iterator[av.Packet]:
                for packet in ffmpeg.packets_of(container, stream):
                    if not ffmpeg.is_hidden(packet, codec):
                        is_b = ffmpeg.is_b_frame(packet, codec) if is_avi else None
                        stored.append((packet.pts, packet.is_keyframe, packet.pos, packet.dts, is_b))
                    yield packet

            packets = indexed()
            first = next(ffmpeg.decode(packets, stream), None)  # it tells size and rotation
            deque(packets, maxlen=0)  # the rest isn't decoded
            self._tick = float(stream.time_base or 0)  # seconds
            rate = float(stream.average_rate or stream.guessed_rate or 0)
        if is_avi:
            self._given = ffmpeg.times_in_avi([packet[2:] for packet in stored])
        shown = [(self._given[pos] if self._given else pts, is_key) for pts, is_key, pos, *_ in stored]
        count, times = len(shown), {time for time, _ in shown}
        if first is None:
            raise VideoError(
                f"{self.path}: none of its {count} frames can be decoded; it looks damaged: copy or download it again"
            )
        # Where times are in doubt, all frames must be seen to keep them.
        known = None not in times and len(times) == count
        if not (known and (self._given or (timed and first.pts in times))):
            seen = [frame.pts for frame in self._frames()]
            if not (known and times.issuperset(seen) and seen == sorted(seen)):
                known, count = False, len(seen)

        self._times = sorted(times) if known else None  # of each frame; None: frames are counted instead
        self._keys = [0]  # numbers of the frames that decoding can start from
        if known:
            self._keys = sorted({0} | {bisect_left(self._times, time) for time, is_key in shown if is_key})
            span = (self._times[-1] - self._times[0]) * self._tick
            rate = (count - 1) / span if span else rate
        turn = ffmpeg.rotation_of(first)
        height, width = (first.width, first.height) if turn % 180 else (first.height, first.width)
        self.info = VideoInfo(self.path, count, height, width, turn, rate, count / rate if rate else 0.0)
        if ffmpeg.is_cut_off(self.path):
            self._warn(f"the file is cut off; only its first {count} frames can be read")

    def read(self, indices: Sequence[int]) -> Tensor:
        """The frames of these numbers, in any order, also repeated: uint8 [T, H, W, 3] RGB.

        Raises:
            IndexError: a number is not in 0 ... num_frames - 1.
        """
        info, indices = self.info, [as_index(i) for i in indices]
        wanted = self._wanted(indices)
        rows = {number: row for row, number in enumerate(wanted)}
        pictures = np.empty((len(wanted), info.height, info.width, 3), dtype=np.uint8)
        missed = self._read_from_keyframes(rows, pictures)
        lost = self._read_from_start(missed, rows, pictures) if missed else 0
        if lost:
            self._warn(f"{lost} of {len(wanted)} wanted frames cannot be decoded; the nearest ones stand in")
        result = torch.from_numpy(pictures)
        return result if indices == wanted else result[[rows[i] for i in indices]]

    def stream(self, indices: Iterable[int]) -> Iterator[Tensor]:
        """The frames of these numbers, ascending and each once, one after the other: uint8 [H, W, 3] RGB.

        The file is decoded in one pass from its start, and nothing is kept: for many frames of a long video.

        Raises:
            IndexError: as `read`.
        """
        wanted, lost = self._wanted(indices), 0
        for _, frame, is_own in self._in_one_pass(wanted):
            lost += not is_own
            yield torch.from_numpy(np.ascontiguousarray(self._picture(frame)))
        if lost:
            self._warn(f"{lost} of {len(wanted)} wanted frames cannot be decoded; the nearest ones stand in")

    def times(self) -> list[float]:
        """When each frame is shown, in seconds from the first one on, ascending.

        Raises:
            VideoError: the file tells no frame rate.
        """
        if not self.info.fps:
            raise VideoError(f"{self.path}: doesn't tell when its frames are shown; convert it to mp4 with ffmpeg")
        if self._times is not None and self._tick:
            return [(time - self._times[0]) * self._tick for time in self._times]
        return [number / self.info.fps for number in range(self.info.num_frames)]

    def _wanted(self, indices: Iterable[int]) -> list[int]:
        """These numbers in order, each once."""
        wanted = sorted(set(indices))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < self.info.num_frames:
            raise IndexError(
                f"{self.path}: frames {wanted[0]} to {wanted[-1]} are wanted; "
                f"choose from 0 to {self.info.num_frames - 1}"
            )
        return wanted

    def _read_from_keyframes(self, rows: dict[int, int], pictures: np.ndarray) -> list[int]:
        """Fill `pictures[row]` for each of `{number: row}`, ascending; return those numbers that did not come."""
        todo, missed = deque(rows), []
        with ffmpeg.opened(self.path) as file:
            while todo:
                start = self._key_before(todo[0])
                for number, frame in self._numbered(start, file):
                    if number in todo:
                        pictures[rows[number]] = self._picture(frame)
                        todo.remove(number)
                    while todo and todo[0] < number - _LATE:
                        missed.append(todo.popleft())
                    if not todo or self._key_before(todo[0]) > max(start, number + _NEAR):
                        break  # done, or the next one is had sooner from a later keyframe
                else:
                    missed += todo
                    todo.clear()
        return missed

    def _read_from_start(self, missed: list[int], rows: dict[int, int], pictures: np.ndarray) -> int:
        """Fill in these frames, ascending, with themselves or a stand-in; return the number of stand-ins.

        A frame may not have come because it is damaged, but also because a stream calls frames keyframes that are none.
        """
        stand_ins = 0
        for number, frame, is_own in self._in_one_pass(missed):
            pictures[rows[number]] = self._picture(frame)
            stand_ins += not is_own
        return stand_ins

    def _in_one_pass(self, numbers: Iterable[int]) -> Iterator[tuple[int, av.VideoFrame, bool]]:
        """For each of these ascending numbers: its frame or the one that stands in, and whether it is its own."""
        todo, before = deque(numbers), None
        for number, frame in self._numbered(0):
            while todo and todo[0] < number:
                yield todo.popleft(), before or frame, False
            if not todo:
                return
            if todo[0] == number:
                yield todo.popleft(), frame, True
            before = frame
        for number in todo:
            yield number, before, False

    def _key_before(self, number: int) -> int:
        """The last frame, up to `number`, that decoding can start from."""
        return self._keys[bisect_right(self._keys, number) - 1]

    def _numbered(self, start: int, file: tuple | None = None) -> Iterator[tuple[int, av.VideoFrame]]:
        """The decodable frames with their numbers, from keyframe `start` or an earlier one on."""
        for count, frame in enumerate(self._frames(start, file)):
            if self._times is None:
                yield count, frame
            elif frame.pts is not None:
                number = bisect_left(self._times, frame.pts)
                if number < len(self._times) and self._times[number] == frame.pts:
                    yield number, frame

    def _frames(self, start: int = 0, file: tuple | None = None) -> Iterator[av.VideoFrame]:
        """The decodable frames in the order of showing, from keyframe `start` or an earlier one on.

        `file` is the file if it is open; for `start` 0 as it was opened.
        """
        with nullcontext(file) if file else ffmpeg.opened(self.path) as (container, stream):
            if start:
                packets = ffmpeg.packets_from(container, stream, self._times[start])
            else:
                packets = ffmpeg.packets_of(container, stream)
            if packets is not None:
                if self._given:
                    packets = ffmpeg.timed(packets, self._given)
                yield from ffmpeg.decode(packets, stream)
                return
        yield from self._frames()  # the file cannot be entered there

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        """A frame as shown: uint8 [H, W, 3] RGB. Should frames differ in size, the first one's holds."""
        height, width, turn = self.info.height, self.info.width, self.info.rotation
        if turn % 180:
            height, width = width, height
        try:
            picture = frame.to_ndarray(format="rgb24", height=height, width=width)
        except (av.FFmpegError, ValueError, MemoryError) as error:
            raise VideoError(f"{self.path}: a frame has no RGB form ({error}); convert it with ffmpeg") from error
        return np.rot90(picture, -turn // 90)

    def _warn(self, message: str) -> None:
        if not self._warned:
            _logger.warning("%s: %s", self.path, message)
        self._warned = True


def probe(path: str | Path) -> VideoInfo:
    """What the video file at `path` holds; raises VideoError as VideoReader does."""
    return VideoReader(path).info


def read_frames(path: str | Path, indices: Sequence[int]) -> Tensor:
    """Frames of the video file at `path` by number, as VideoReader reads them: uint8 [T, H, W, 3] RGB."""
    return VideoReader(path).read(indices)
