"""What the examples share: their arguments, and a few videos to run them on."""

import argparse
import tempfile
from pathlib import Path

import av
import numpy as np
from timm.utils import ParseKwargs

from etmamba_timm.data import Clip, EvalTransform, TrainClips, read_folders

DIRECTIONS = {"down": (0, 1), "left": (-1, 0), "right": (1, 0), "up": (0, -1)}


def arguments(lr: float = 0.001, can_freeze: bool = True) -> argparse.Namespace:
    """The command line's; `lr` is the default learning rate, and `can_freeze` says whether there is `--freeze`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="FOLDER/<class>/*.mp4; by default a few generated videos")
    parser.add_argument("--model", default="etmamba_ti", help="what timm.create_model takes")
    parser.add_argument("--pretrained", action="store_true", help="start from that model's weights")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="e.g. depth=4 embed_dim=96")
    if can_freeze:
        parser.add_argument("--freeze", action="store_true", help="train the classifier alone")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--lr", type=float, help=f"by default {lr}" + ", and 0.03 for the classifier alone" * can_freeze
    )
    parser.add_argument("--output", type=Path, help="a new folder for the trained model")
    args = parser.parse_args()
    args.lr = args.lr or (0.03 if can_freeze and args.freeze else lr)
    if not args.pretrained:
        args.model_kwargs.setdefault("global_pool", "avg")  # from scratch, a model learns more from few videos this way
    return args


def training_clips(args: argparse.Namespace) -> TrainClips:
    """{'clip': float32 [C, T, H, W], 'label': int, 'index': int} for each video; real training uses TrainTransform."""
    annotations = read_folders(args.data or generated_videos(Path(tempfile.mkdtemp())))
    transform = EvalTransform((args.size, args.size))
    return TrainClips(annotations, lambda frames: transform(frames)[0], Clip(args.frames, stride=1))


def generated_videos(root: Path, of_each: int = 4, frames: int = 8, side: int = 64) -> Path:
    """Writes videos of squares that move from the middle down, left, right or up: `root/<direction>/<number>.mp4`."""
    random = np.random.default_rng(0)  # each has its own place and shade
    rows, columns = np.mgrid[:side, :side]
    for name, (dx, dy) in DIRECTIONS.items():
        (root / name).mkdir(parents=True)
        for i in range(of_each):
            with av.open(str(root / name / f"{i}.mp4"), "w") as output:
                stream = output.add_stream("libx264", rate=8)
                stream.width = stream.height = side
                stream.pix_fmt = "yuv420p"
                x, y, shade = *random.uniform(0.4, 0.6, 2) * side, random.integers(180, 255)
                for t in range(frames):
                    way = t / (frames - 1) * side / 2
                    inside = (abs(columns - x - dx * way) < side / 6) & (abs(rows - y - dy * way) < side / 6)
                    picture = np.where(inside, shade, 20).astype(np.uint8)
                    output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
                output.mux(stream.encode())
    return root
