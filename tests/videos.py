"""Small videos whose frames carry their own number, written with PyAV for the tests.

`picture(i)` paints number `i` as big black and white blocks under a row of colours, `number(frame)` reads it back, also
after lossy coding; so a test can tell exactly which frame it was given, and whether it came upside down or in BGR.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

ROWS, COLUMNS = 4, 4  # of blocks: a row of colours, then 12 bits
COLOURS = np.array([(220, 30, 30), (30, 200, 30), (30, 30, 220), (128, 128, 128)], dtype=np.uint8)
TICKS = 1000  # a second, in the units of `pts`


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame `number` (below 4096) as uint8 [height, width, 3] RGB."""
    bits = (number >> np.arange((ROWS - 1) * COLUMNS)) & 1
    blocks = np.empty((ROWS, COLUMNS, 3), dtype=np.uint8)
    blocks[0] = COLOURS
    blocks[1:] = np.where(bits == 1, 235, 20).reshape(ROWS - 1, COLUMNS, 1)
    return blocks[np.arange(height) * ROWS // height][:, np.arange(width) * COLUMNS // width]


def number(frame) -> int:
    """The number painted on a frame (array or tensor, uint8 [H, W, 3] RGB)."""
    frame = np.asarray(frame)
    rows = (np.arange(1, ROWS) * 2 + 1) * frame.shape[0] // (2 * ROWS)
    columns = (np.arange(COLUMNS) * 2 + 1) * frame.shape[1] // (2 * COLUMNS)
    bits = frame[rows][:, columns].mean(axis=-1) > 127
    return int((bits.reshape(-1) << np.arange(bits.size)).sum())


def numbers(frames) -> list[int]:
    """The numbers painted on frames [T, H, W, 3]."""
    return [number(frame) for frame in frames]


def write_video(
    path: str | Path,
    num_frames: int = 24,
    height: int = 48,
    width: int = 64,
    fps: int = 25,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 0,
    pts: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    first_number: int = 0,
    streams: int = 1,
) -> Path:
    """Write frames `picture(first_number), ...` to `path`; its suffix picks the container.

    `pts` are irregular times in 1/1000 s; `options` go to the encoder, `container` to the muxer (`{"movflags":
    "faststart"}`). With `streams=2` a second video stream of the same pictures at half the size follows.
    """
    base = Fraction(1, TICKS) if pts is not None else Fraction(1, fps)
    times = pts if pts is not None else range(num_frames)
    with av.open(str(path), "w", options=container or {}) as output:
        outputs = []
        for s in range(streams):
            stream = output.add_stream(codec, rate=fps)
            stream.height, stream.width = height >> s, width >> s
            stream.pix_fmt = pix_fmt
            stream.codec_context.time_base = base
            steady = {"sc_threshold": "0"} if codec == "libx264" else {}  # keyframes at multiples of gop only
            stream.options = {"g": str(gop), "bf": str(b_frames), **steady, **(options or {})}
            outputs.append(stream)
        for i, time in zip(range(num_frames), times, strict=True):
            for stream in outputs:
                image = picture(first_number + i, stream.height, stream.width)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = time, base
                output.mux(stream.encode(frame))
        for stream in outputs:
            output.mux(stream.encode())
    return Path(path)


def write_frames(folder: str | Path, num_frames: int = 24, name: str = "img_{:05}.jpg", first_number: int = 0) -> Path:
    """Write frames `picture(first_number), ...` to pictures in a folder."""
    Path(folder).mkdir(parents=True)
    for i in range(num_frames):
        Image.fromarray(picture(first_number + i)).save(Path(folder) / name.format(i))
    return Path(folder)


def write_audio(path: str | Path, codec: str = "aac", seconds: float = 0.5) -> Path:
    """Write a file that holds sound and no picture."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=48000)
        stream.layout = "mono"
        for start in range(0, int(seconds * 48000), 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return Path(path)


# How a player is to turn the picture, clockwise; rows of the matrix in an mp4's track header (ISO 14496-12, 8.3.2),
# which maps (x, y) to (a·x + c·y, b·x + d·y).
_TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def turn_video(path: str | Path, degrees: int) -> Path:
    """Mark the mp4 at `path` as to be shown turned clockwise by `degrees`, as a telephone held upright does."""
    path = Path(path)
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    matrix = header + 40  # version 0: flags 4, times 8, id 4, reserved 4, duration 4, reserved 8, layer to volume 8
    a, b, c, d = (value << 16 for value in _TURNS[degrees])
    data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path
