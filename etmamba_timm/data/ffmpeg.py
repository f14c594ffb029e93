"""A video file through FFmpeg: opening it, its packets, its decoded frames, and what can be wrong with it."""

import logging
import math
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from .embedded import VideoFile

_logger = logging.getLogger(__name__)

_PYAV = int(av.__version__.split(".")[0])
# Titles in other encodings; PyAV 19 and newer have no such argument, and take them.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if _PYAV < 19 else {}
_ONE_THREAD: dict[str, Any] = {"threads": 1} if _PYAV >= 17 else {}  # older ones take no more
_ATTACHED_PICTURE = 0x400  # FFmpeg's mark of a cover, as music files have one
# Demuxers that draw bytes as pictures, or open the files that a list names.
_NO_VIDEO = {"tty", "cdg", "bin", "concat", "hls", "dash", "sdp", "rtsp"}
_IN_ORDER = {"mjpeg", "msmpeg4v1", "msmpeg4v2", "msmpeg4"}  # codecs that show frames as they are stored
_VOP = b"\0\0\1\xb6"  # begins a frame of MPEG-4's visual part
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")  # what an mp4 or mov may begin with


class VideoError(ValueError):
    """A video file can't be read. The message names the file, the reason and a remedy."""


def check_file(path: VideoFile) -> None:
    """Raise VideoError if the path is no file, or the file is empty or a text.

    FFmpeg would draw a text as pictures, and would open the files and addresses that a playlist names.
    """
    try:
        mode = path.stat().st_mode if isinstance(path, Path) else stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise VideoError(f"{path}: is a folder; `open_video` reads folders of frames")
        if not stat.S_ISREG(mode):
            raise VideoError(f"{path}: is a pipe or a device, not a file; save it to a file first")
        with path.open("rb") as file:
            head = file.read(1024)
    except FileNotFoundError:
        raise VideoError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise VideoError(f"{path}: cannot be opened ({error.strerror}); check the path and its permissions") from error
    if not head:
        raise VideoError(f"{path}: the file is empty; copy or download it again")
    if not any(byte < 32 and byte not in b"\t\n\v\f\r\b\x1b" for byte in head):
        raise VideoError(f"{path}: is a text file, not a video; name a video file, for instance an mp4, webm or avi")


@contextmanager
def opened(path: VideoFile) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The open file and its first video stream that is not a cover."""
    try:
        # The absolute path, so that `a:b.mp4` is not taken for an address.
        source = str(path.absolute()) if isinstance(path, Path) else path.open()
        container = av.open(source, mode="r", **_LENIENT)
    except av.FFmpegError as error:
        raise VideoError(
            f"{path}: cannot be read as a video ({error.strerror}); it looks truncated or damaged, or its format is "
            "unknown: copy or download it again, or convert it with ffmpeg"
        ) from error
    with container:
        if _NO_VIDEO.intersection(container.format.name.split(",")):
            raise VideoError(f"{path}: is a {container.format.long_name} file, not a video; name a video file")
        streams = list(container.streams.video)
        streams = [stream for stream in streams if not int(getattr(stream, "disposition", 0) or 0) & _ATTACHED_PICTURE]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise VideoError(f"{path}: has no video stream (it holds {kinds}); name a file with pictures")
        if streams[0].codec_context is None:
            raise VideoError(f"{path}: there is no decoder for its video stream; convert it to h264 with ffmpeg")
        streams[0].codec_context.thread_count = torch.get_num_threads()  # 1 in worker processes
        yield container, streams[0]


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The stream's packets, up to where the file can't be read any more."""
    try:
        yield from (packet for packet in container.demux(stream) if packet.size)
    except av.FFmpegError as error:
        _logger.debug("reading packets ends: %s", error)


def packets_from(container: InputContainer, stream: VideoStream, time: int) -> Iterator[av.Packet] | None:
    """The packets from the keyframe shown at `time` (in ticks of the stream) on; None if the file can't be entered.

    Where formats seek loosely, they start at another keyframe.
    """
    try:
        container.seek(time, stream=stream)
    except av.FFmpegError:
        return None
    packets = packets_of(container, stream)
    first = next(packets, None)
    return chain([first], packets) if first is not None and first.is_keyframe else None


def decode(packets: Iterable[av.Packet], stream: VideoStream) -> Iterator[av.VideoFrame]:
    """The frames in these packets in display order, without those that cannot be decoded."""
    for packet in chain(packets, [None]):  # None: flush the decoder
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            _logger.debug("a packet cannot be decoded: %s", error)
        else:
            yield from frames


def is_hidden(packet: av.Packet, codec: str) -> bool:
    """Whether a packet holds no frame to show: cut away by an edit list, or only referred to (RFC 6386, 9.1)."""
    return packet.is_discard or (codec == "vp8" and not bytes(packet)[0] & 0x10)


def is_b_frame(packet: av.Packet, codec: str) -> bool | None:
    """Whether a packet's frame is shown before the reference frame stored before it; None if unknown.

    It is known for codecs without B-frames, and for MPEG-4 Part 2 (ISO 14496-2, 6.2.5) with one frame in each packet.
    """
    if codec in _IN_ORDER:
        return False
    if codec != "mpeg4":
        return None
    data = bytes(packet)
    start = data.find(_VOP)
    # Two frames may be packed together, followed by a packet that only says `nothing new`.
    if start < 0 or len(data) < start + 12 or data.find(_VOP, start + 4) >= 0:
        return None
    return data[start + 4] >> 6 == 2


def times_in_avi(stored: Sequence[tuple[int | None, int | None, bool | None]]) -> dict[int, int] | None:
    """Display times of an AVI's frames, by the position of their packets in the file; None if they are unknown.

    An AVI has decoding times only. A reference frame is shown when the next one is decoded.

    Args:
        stored: position, decoding time and `is_b_frame` of each packet.
    """
    known = [(place, time, is_b) for place, time, is_b in stored if place is not None and time is not None]
    places, times = {place for place, _, _ in known}, {time for _, time, _ in known}
    if len(places) < len(stored) or len(times) < len(stored) or any(is_b is None for _, _, is_b in known):
        return None
    order: list[int] = []
    reference: list[int] = []
    for place, _, is_b in known:
        if is_b:
            order.append(place)
        else:
            order += reference
            reference = [place]
    return dict(zip(order + reference, sorted(times), strict=True))


def timed(packets: Iterable[av.Packet], times: dict[int, int]) -> Iterator[av.Packet]:
    """The packets with these display times, given by position in the file, instead of their own."""
    for packet in packets:
        packet.pts, packet.dts = None if packet.pos is None else times.get(packet.pos), None
        yield packet


def to_rgb(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """A frame as uint8 [height, width, 3]."""
    # Not the frame's own method: its scaler is shared, and in a forked process waits for threads that aren't there.
    return VideoReformatter().reformat(frame, width, height, "rgb24", **_ONE_THREAD).to_ndarray()


def rotation_of(frame: av.VideoFrame) -> int:
    """Degrees by which a frame must be turned clockwise for display: 0, 90, 180 or 270."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    a, b = np.frombuffer(matrix, dtype=np.int32)[:2].tolist()  # (x, y) is shown at (a·x + c·y, b·x + d·y)
    return round(math.degrees(math.atan2(b, a)) / 90) * 90 % 360


def is_cut_off(path: VideoFile) -> bool:
    """Whether an mp4 ends before its last box does (ISO 14496-12, 4.2). False for other formats."""
    end = 0
    with path.open("rb") as file:
        size = file.seek(0, 2)
        while end < size:
            file.seek(end)
            head = file.read(16)
            length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
            if length < 8 or (end == 0 and head[4:8] not in _FIRST_BOXES):  # length 0: up to the end of the file
                return False
            end += length
    return end > size
