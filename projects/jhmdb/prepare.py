"""Writes J-HMDB's clips smaller, beside the lists of HMDB-51's split 1, in the layout 'hmdb51'.

python -m projects.jhmdb.prepare CLIPS OUT

CLIPS has the clips at any depth, as published: 320×240, .avi. Those of OUT/<class>/<clip>.mp4 have a short side of 132
pixels and the same frames: enough for crops of 112, quick to decode and 34 MB in all. Clips that are there are kept.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import av
from tqdm import tqdm

from etmamba_timm.data import open_video
from etmamba_timm.data.annotations import SUFFIXES
from etmamba_timm.files import whole_file

from .clips import SPLITS, read_clips

SIDE = 132  # pixels
OPTIONS = {"crf": "20", "g": "12", "threads": "1"}


def shrink(source: Path, out: Path, side: int) -> None:
    """Writes a video as H.264 in mp4 with this short side, or its own if that is less; both sides become even."""
    reader = open_video(source)
    info = reader.info
    scale = min(1, side / min(info.height, info.width))
    height, width = (2 * round(length * scale / 2) for length in (info.height, info.width))
    with whole_file(out) as draft, av.open(str(draft), "w") as output:
        stream = output.add_stream("libx264", rate=round(info.fps) or 30, options=OPTIONS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in reader.read(range(info.num_frames)).numpy():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            output.mux(stream.encode(frame.reformat(width, height, "yuv420p", interpolation="AREA")))
        output.mux(stream.encode())


def prepare(clips: Path, out: Path, splits: Path = SPLITS, side: int = SIDE) -> None:
    """Shrinks all clips that the lists in `splits` name, to this short side in pixels.

    Raises:
        ValueError: some aren't below `clips`.
    """
    there = {path.stem: path for path in clips.rglob("*") if path.suffix.lower() in SUFFIXES}
    wanted = read_clips(splits)
    if missing := [clip.name for clip in wanted if clip.name not in there]:
        raise ValueError(f"{len(missing)} of {len(wanted)} clips aren't below {clips}, such as {missing[0]}")
    shutil.copytree(splits, out / SPLITS.name, dirs_exist_ok=True)
    for clip in tqdm(wanted, unit="clip"):
        target = out / clip.label / f"{clip.name}.mp4"
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            shrink(there[clip.name], target, side)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path, help="a folder that holds J-HMDB's clips")
    parser.add_argument("out", type=Path, help="the folder to write")
    args = parser.parse_args()
    prepare(args.clips, args.out)


if __name__ == "__main__":
    main()
