"""Frames of a video file by number, decoding as few as possible.

A first pass over the packets, without decoding, gives the time of every frame and so its number, even if the frame rate
varies. Reading then seeks to the keyframe before the first wanted frame and decodes from there; if a later keyframe
comes before the next wanted frame, it seeks again. Frames are identified by their times. A file whose times aren't
reliable is decoded from its start and its frames are counted, which is slower but never wrong.
"""

import logging
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import index as as_index
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from ..words import number_of
from . import ffmpeg
from .embedded import EmbeddedVideo, VideoFile
from .ffmpeg import VideoError

_logger = logging.getLogger(__name__)

_TIMED = ("mov", "matroska", "flv")  # containers that store display times; for others FFmpeg computes them
_NEAR = 12  # up to so many frames are decoded rather than skipped
_LATE = 16  # frames by which a decoder may be late; a wanted frame that is later is lost


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds.

    Attributes:
        path: the file, or the folder of frames.
        num_frames: number of frames that can be read.
        height, width: of a frame as displayed, after rotation, in pixels.
        rotation: clockwise rotation of the stored frames for display: 0, 90, 180 or 270 degrees.
        fps: average frames per second; 0 if unknown.
        duration: in seconds; 0 if unknown.
    """

    path: VideoFile
    num_frames: int
    height: int
    width: int
    rotation: int
    fps: float
    duration: float


class VideoReader:
    """Reads frames of the video file at `path`, or of a video in a dataset's row; `info` describes the video.

    It keeps an index but no open file, so it needs no closing and can be pickled. Only the first video stream is read.
    A frame that cannot be decoded is replaced by the nearest earlier frame (by a later one, if there is no earlier);
    a frame that the decoder repairs counts as decoded. Each reader warns once of such frames, or of an mp4 that is cut
    off and of which only the first part can be read; `warn(path, message)` takes the warning instead of the log.
    Mirroring and non-square pixels are ignored.

    Raises:
        VideoError: the file doesn't exist, is empty, cut off or no video, or none of its frames can be decoded.
    """

    def __init__(self, path: str | Path | EmbeddedVideo, warn: Callable[[VideoFile, str], None] | None = None) -> None:
        self.path = path if isinstance(path, EmbeddedVideo) else Path(path)
        self._report, self._warned = warn, False
        self._given: dict[int, int] | None = None  # computed times, by the packets' positions
        ffmpeg.check_file(self.path)
        with ffmpeg.opened(self.path) as (container, stream):
            timed, is_avi = container.format.name.startswith(_TIMED), container.format.name == "avi"
            codec = stream.codec_context.name
            # For each packet with a frame to show: display time, is keyframe, position, decoding time, is B-frame.
            stored: list[tuple[int | None, bool, int | None, int | None, bool | None]] = []

            def indexed() -> Iterator[av.Packet]:
                for packet in ffmpeg.packets_of(container, stream):
                    if not ffmpeg.is_hidden(packet, codec):
                        is_b = ffmpeg.is_b_frame(packet, codec) if is_avi else None
                        stored.append((packet.pts, packet.is_keyframe, packet.pos, packet.dts, is_b))
                    yield packet

            packets = indexed()
            first = next(ffmpeg.decode(packets, stream), None)  # gives size and rotation
            deque(packets, maxlen=0)  # the rest isn't decoded
            self._tick = float(stream.time_base or 0)  # seconds
            rate = float(stream.average_rate or stream.guessed_rate or 0)
        if is_avi:
            self._given = ffmpeg.times_in_avi([packet[2:] for packet in stored])
        given = self._given
        shown = [(given[pos] if given and pos is not None else pts, is_key) for pts, is_key, pos, *_ in stored]
        count, times = len(shown), {time for time, _ in shown if time is not None}
        if first is None:
            raise VideoError(
                f"{self.path}: none of its frames ({count}) can be decoded; it looks damaged: copy or download it again"
            )
        # Times that may be wrong are checked by decoding all frames.
        known = len(times) == count
        if not (known and (self._given or (timed and first.pts in times))):
            frames = [frame.pts for frame in self._frames()]
            seen = [time for time in frames if time is not None]
            if not (known and len(seen) == len(frames) and times.issuperset(seen) and seen == sorted(seen)):
                known, count = False, len(frames)

        self._times = sorted(times) if known else None  # of each frame; None: frames are counted instead
        self._keys = [0]  # numbers of the frames that decoding can start from
        if self._times:
            keys = {time for time, is_key in shown if is_key and time is not None}
            self._keys = sorted({0} | {bisect_left(self._times, time) for time in keys})
            span = (self._times[-1] - self._times[0]) * self._tick
            rate = (count - 1) / span if span else rate
        turn = ffmpeg.rotation_of(first)
        height, width = (first.width, first.height) if turn % 180 else (first.height, first.width)
        self.info = VideoInfo(self.path, count, height, width, turn, rate, count / rate if rate else 0.0)
        if ffmpeg.is_cut_off(self.path):
            self._warn(f"the file is cut off; only its beginning can be read ({number_of(count, 'frame')})")

    def read(self, indices: Sequence[int]) -> Tensor:
        """The frames with these numbers, in any order, repeated or not: uint8 [T, H, W, 3] RGB.

        Raises:
            IndexError: a number is not in 0 ... num_frames - 1.
        """
        info, indices = self.info, [as_index(i) for i in indices]
        wanted = wanted_frames(self.info, indices)
        rows = {number: row for row, number in enumerate(wanted)}
        pictures = np.empty((len(wanted), info.height, info.width, 3), dtype=np.uint8)
        missed = self._read_from_keyframes(rows, pictures)
        lost = self._read_from_start(missed, rows, pictures) if missed else 0
        if lost:
            self._warn(f"{lost} of {len(wanted)} wanted frames cannot be decoded; the nearest ones stand in")
        result = torch.from_numpy(pictures)
        return result if indices == wanted else result[[rows[i] for i in indices]]

    def stream(self, indices: Iterable[int]) -> Iterator[Tensor]:
        """The frames with these numbers in ascending order, each once and one at a time: uint8 [H, W, 3] RGB.

        Decodes the file once from its start and keeps nothing in memory: for many frames of a long video.

        Raises:
            IndexError: as `read`.
        """
        wanted, lost = wanted_frames(self.info, indices), 0
        for _, frame, is_own in self._in_one_pass(wanted):
            lost += not is_own
            yield torch.from_numpy(np.ascontiguousarray(self._picture(frame)))
        if lost:
            self._warn(f"{lost} of {len(wanted)} wanted frames cannot be decoded; the nearest ones stand in")

    def times(self) -> list[float]:
        """The time of each frame in seconds after the first, ascending.

        Raises:
            VideoError: the file has no frame rate.
        """
        if not self.info.fps:
            raise VideoError(f"{self.path}: doesn't tell when its frames are shown; convert it to mp4 with ffmpeg")
        if self._times and self._tick:
            return [(time - self._times[0]) * self._tick for time in self._times]
        return [number / self.info.fps for number in range(self.info.num_frames)]

    def _read_from_keyframes(self, rows: dict[int, int], pictures: np.ndarray) -> list[int]:
        """Fill `pictures[row]` for each of `{number: row}`, ascending; return the numbers that weren't found."""
        todo = deque(rows)
        missed: list[int] = []
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
                        break  # done, or seeking to a later keyframe is quicker
                else:
                    missed += todo
                    todo.clear()
        return missed

    def _read_from_start(self, missed: list[int], rows: dict[int, int], pictures: np.ndarray) -> int:
        """Fill in these frames, ascending, or their stand-ins; return the number of stand-ins.

        A frame may be missed as it is damaged, or as the stream marks frames as keyframes that are none.
        """
        stand_ins = 0
        for number, frame, is_own in self._in_one_pass(missed):
            pictures[rows[number]] = self._picture(frame)
            stand_ins += not is_own
        return stand_ins

    def _in_one_pass(self, numbers: Iterable[int]) -> Iterator[tuple[int, av.VideoFrame, bool]]:
        """For each of these ascending numbers: its frame or a stand-in, and whether it is its own."""
        todo = deque(numbers)
        before: av.VideoFrame | None = None
        for number, frame in self._numbered(0):
            while todo and todo[0] < number:
                yield todo.popleft(), before or frame, False
            if not todo:
                return
            if todo[0] == number:
                yield todo.popleft(), frame, True
            before = frame
        for number in todo:
            if before is None:
                raise VideoError(f"{self.path}: no frame can be decoded any more; the file has changed: read it anew")
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
        """The decodable frames in display order, from keyframe `start` or an earlier one on.

        `file` is the open file, if there is one; for `start` 0 nothing may have been read from it.
        """
        with nullcontext(file) if file else ffmpeg.opened(self.path) as (container, stream):
            packets: Iterator[av.Packet] | None
            if start and self._times:
                packets = ffmpeg.packets_from(container, stream, self._times[start])
            else:
                packets = ffmpeg.packets_of(container, stream)
            if packets is not None:
                if self._given:
                    packets = ffmpeg.timed(packets, self._given)
                yield from ffmpeg.decode(packets, stream)
                return
        yield from self._frames()  # the file can't be entered there

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        """A frame as displayed: uint8 [H, W, 3] RGB. If frames differ in size, they are scaled to the first one's."""
        height, width, turn = self.info.height, self.info.width, self.info.rotation
        if turn % 180:
            height, width = width, height
        try:
            picture = ffmpeg.to_rgb(frame, height, width)
        except (av.FFmpegError, ValueError, MemoryError) as error:
            raise VideoError(f"{self.path}: a frame has no RGB form ({error}); convert it with ffmpeg") from error
        return np.rot90(picture, -turn // 90)

    def _warn(self, message: str) -> None:
        if self._report is not None:
            self._report(self.path, f"{self.path}: {message}")
        elif not self._warned:
            _logger.warning("%s: %s", self.path, message)
        self._warned = True


def wanted_frames(info: VideoInfo, indices: Iterable[int]) -> list[int]:
    """These numbers in order, each once.

    Raises:
        IndexError: a number is not in 0 ... num_frames - 1.
    """
    wanted = sorted(set(indices))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < info.num_frames:
        raise IndexError(
            f"{info.path}: frames {wanted[0]} to {wanted[-1]} are wanted; choose from 0 to {info.num_frames - 1}"
        )
    return wanted
