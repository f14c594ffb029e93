"""A contact sheet of the dataset: a row per class, with eight frames of one video.

python -m projects.mocap.sheet OUT sheet.png --split train
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from .render import folder_of
from .variation import SETS

COLUMNS = 8
LABEL = 12  # pixels of each row's title


def sheet(out: Path, part: str, number: int = 0) -> Image.Image:
    """Video `number` of each class of a part of the dataset, in the frames that a model of 8 frames sees.

    Raises:
        FileNotFoundError: there are no videos of that part.
    """
    root = out / folder_of(part)
    classes = sorted(p for p in root.glob("*") if p.is_dir())
    if not classes:
        raise FileNotFoundError(f"{root} holds no classes; render the dataset first")
    rows = []
    for folder in classes:
        video = sorted(folder.glob("*.mp4"))[number]
        frames = read(video)
        picks = ((np.arange(COLUMNS) + 0.5) * len(frames) / COLUMNS).astype(int)
        title = Image.new("RGB", (frames.shape[2] * COLUMNS, LABEL), "white")
        ImageDraw.Draw(title).text((2, 0), f"{folder.name}/{video.name}, {len(frames)} frames", fill="black")
        rows += [np.asarray(title), np.concatenate(list(frames[picks]), axis=1)]
    return Image.fromarray(np.concatenate(rows))


def read(path: Path) -> np.ndarray:
    """All frames of a video, uint8 [T, H, W, 3] RGB."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the dataset's folder")
    parser.add_argument("picture", type=Path, help="the picture to write")
    parser.add_argument("--split", default="train", choices=SETS)
    parser.add_argument("--number", type=int, default=0, help="which video of each class")
    args = parser.parse_args()
    sheet(args.out, args.split, args.number).save(args.picture)


if __name__ == "__main__":
    main()
