"""How well `etmamba train` learns few clips: from `etmamba_ti.mocap`, and from scratch beside it.

    python benchmarks/finetune.py shapes                    # 6 classes of 12 generated clips, a quarter held out
    python benchmarks/finetune.py persons --data weizmann   # videos <class>/<person>_*.avi, one person out at a time

Each run is the plain command, but evaluated only at its end, so that no epoch is chosen on the held-out videos. `--set`
adds settings. A row of `results/finetune.csv` has its held-out accuracy.
"""

import argparse
import contextlib
import csv
import io
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch

from etmamba_timm.cli import main
from etmamba_timm.data import Annotations, write_split
from etmamba_timm.data.annotations import read_folders
from etmamba_timm.training.evaluate import Scores

KINDS = ("blink", "grow", "move left", "move right", "move up", "turn")
RESULTS = Path(__file__).with_name("results") / "finetune.csv"


def write_clips(root: Path, of_each: int = 12, seed: int = 0, frames: int = 24, side: int = 96) -> Path:
    """Videos of a rectangle in front of a noisy ground, whose motion is the class: `root/<class>/<number>.mp4`."""
    for label, kind in enumerate(KINDS):
        (root / kind).mkdir(parents=True)
        for i in range(of_each):
            draw = np.random.default_rng([seed, label, i])
            with av.open(str(root / kind / f"{i:02}.mp4"), "w") as output:
                stream = output.add_stream("libx264", rate=12)
                stream.width = stream.height = side
                stream.pix_fmt = "yuv420p"
                for picture in _pictures(kind, draw, frames, side):
                    output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                output.mux(stream.encode())
    return root


def _pictures(kind: str, draw: np.random.Generator, frames: int, side: int) -> list[np.ndarray]:
    """The frames uint8 [side, side, 3] of one video; place, colours, form, speed and phase are drawn."""
    ground = draw.integers(0, 140, 3) + draw.normal(0, 10, (side, side, 1))
    colour, form = draw.integers(150, 256, 3), draw.uniform(0.09, 0.13) * side * np.array([2.2, 1])
    x, y = draw.uniform(0.4, 0.6, 2) * side
    speed, phase = draw.uniform(0.4, 0.6) * side, draw.uniform(0, np.pi)
    turns, blinks = draw.uniform(0.3, 0.8), draw.integers(3, 6)
    rows, columns = np.mgrid[:side, :side] + 0.5
    pictures = []
    for t in np.linspace(-0.5, 0.5, frames):
        dx = {"move left": -speed, "move right": speed}.get(kind, 0) * t
        dy = -speed * t if kind == "move up" else 0
        angle = phase + (2 * np.pi * turns * t if kind == "turn" else 0)
        size = form * (1 + 1.2 * t if kind == "grow" else 1)
        along = (columns - x - dx) * np.cos(angle) + (rows - y - dy) * np.sin(angle)
        across = (rows - y - dy) * np.cos(angle) - (columns - x - dx) * np.sin(angle)
        inside = (abs(along) < size[0]) & (abs(across) < size[1])
        if kind == "blink" and int((t + 0.5) * 2 * blinks) % 2:
            inside[:] = False
        pictures.append(np.where(inside[..., None], colour, ground).clip(0, 255).astype(np.uint8))
    return pictures


def run(name: str, data: Path, output: Path, settings: list[str], split: Path | None = None) -> Scores:
    """Trains, if `split` is given on the videos that its lists name; writes a row."""
    command = ["train", "--data", str(data), "-o", str(output), "--workers", "0"]
    command += ["--dataset", "list", "--annotations", str(split)] if split else []
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        status = main([*command, "--set", "eval_epochs=1000", *settings])
    if status:
        raise SystemExit(status)
    seconds, scores = time.perf_counter() - start, Scores.load(output / "scores.safetensors")
    row = (
        name,
        " ".join(settings),
        len(scores.labels),
        f"{scores.topk(1):.4f}",
        f"{seconds:.0f}",
        torch.get_num_threads(),
    )
    with RESULTS.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(row)
    print(*row, flush=True)
    return scores


def leave_one_out(data: Path, output: Path, settings: list[str], persons: list[str]) -> None:
    """A run for each person (all of them by default), whose videos are held out; prints the mean accuracy."""
    videos = read_folders(data)
    names = [path.stem.partition("_")[0] for path, _ in videos.samples]
    results = []
    for person in persons or sorted(set(names)):
        parts = [
            Annotations([s for s, name in zip(videos.samples, names, strict=True) if test(name)], videos.classes, [])
            for test in (lambda name: name != person, lambda name: name == person)  # noqa: B023
        ]
        write_split(output / f"{person}_lists", data, *parts)
        results.append(
            run(f"{data.name} {person}", data, output / person, settings, output / f"{person}_lists").topk(1)
        )
    print(f"mean of {len(results)}: {sum(results) / len(results):.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("shapes", "persons"))
    parser.add_argument("--data", type=Path, help="of persons: the folder of the classes")
    parser.add_argument("--persons", nargs="+", default=[], help="to leave out, one at a time (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the recipe")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.which == "shapes":
            run("shapes", write_clips(Path(folder, "clips")), Path(folder, "run"), args.set)
        else:
            leave_one_out(args.data, Path(folder), args.set, args.persons)
