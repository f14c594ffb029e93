"""Renders the dataset: OUT/{train,val,test,looks/test}/<class>/<number>.mp4; OUT/dataset.json says how each was drawn.

python -m projects.mocap.render OUT --seed 0 --train 600 --val 20 --test 40 --looks 40 --workers 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from etmamba_timm.data.layouts import read_dataset
from etmamba_timm.files import whole_file

from .variation import CLASSES, FPS, SETS, describe, draw

PACKAGES = ("pybullet", "numpy", "av", "pillow")
KEYFRAMES = 12  # from one to the next
OPTIONS = {"preset": "medium", "g": str(KEYFRAMES), "bf": "0", "threads": "1"}
OPTIONS["x264-params"] = "asm=avx2"  # with AVX-512, x264 now and then writes other bytes for the same frames


def render(out: Path, seed: int, counts: dict[str, int], workers: int, pictures: Path | None = None) -> None:
    """Writes the dataset to `out`, `counts` videos per class of each part; existing videos are kept.

    Args:
        out: the folder.
        seed: of all that is drawn.
        counts: of each part.
        workers: processes.
        pictures: a dataset in HMDB-51's layout, whose training videos' frames ground and walls may show.

    Raises:
        ValueError: `out` holds a dataset that was drawn in another way.
    """
    out.mkdir(parents=True, exist_ok=True)
    videos = {relative: draw(seed, *job) for relative, job in jobs(counts)}
    names = [] if pictures is None else [path.name for path in picture_videos(pictures)]
    about = {"seed": seed, **describe(), "pictures": names, "made_with": made_with()}
    write_index(out / "dataset.json", about | {"videos": videos})
    missing = [(out / name, parameters, part_of(name)) for name, parameters in videos.items()]
    missing = [job for job in missing if not job[0].exists()]
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a worker is to take one core
    with get_context("spawn").Pool(workers, _start, (pictures,), maxtasksperchild=400) as pool:
        done = pool.imap_unordered(_render_one, missing, chunksize=4)
        for _ in tqdm(done, total=len(videos), initial=len(videos) - len(missing), unit="video"):
            pass


def jobs(counts: dict[str, int]) -> Iterator[tuple[str, tuple[str, str, int]]]:
    """Each video's path in the dataset, and its part, class and number; all classes of a number before the next.

    The smaller parts come first, so that an unfinished dataset can be used.
    """
    for part in sorted(SETS, key=counts.__getitem__):
        for number in range(counts[part]):
            for name in CLASSES:
                yield f"{folder_of(part)}/{name}/{number:04d}.mp4", (part, name, number)


def folder_of(part: str) -> str:
    """Where a part lies in the dataset. 'looks' is a dataset of its own, with a test part alone."""
    return "looks/test" if part == "looks" else part


def part_of(name: str) -> str:
    """The part of the dataset that a video's path in it names."""
    return name.partition("/")[0]


def picture_videos(folder: Path) -> list[Path]:
    """The training videos of a dataset in HMDB-51's layout, in order of their names."""
    paths = [Path(str(path)) for path, _ in read_dataset("hmdb51", folder, "train").samples]
    return sorted(paths, key=lambda path: path.name)


def made_with() -> dict[str, str]:
    """Versions that the pixels may depend on."""
    return {"python": platform.python_version(), "machine": platform.machine()} | {p: version(p) for p in PACKAGES}


def write_index(path: Path, index: dict) -> None:
    """Writes `index` as JSON. Raises ValueError if an index is there that was drawn in another way."""
    index = json.loads(json.dumps(index))
    if path.exists():
        before = json.loads(path.read_text())
        changed = [key for key in index if key != "videos" and before.get(key) != index[key]]
        if changed:
            raise ValueError(f"{path} was drawn with another {', '.join(changed)}; name an empty folder")
        index["videos"] = before["videos"] | index["videos"]
    with whole_file(path) as draft:
        draft.write_text(json.dumps(index) + "\n")


_videos: dict[str, list[Path]] = {}  # of each part: where a worker takes pictures from


def _start(pictures: Path | None) -> None:
    """Prepares a worker. Every fifth video is kept for the parts other than training."""
    found = [] if pictures is None else picture_videos(pictures)
    for part in SETS:
        _videos[part] = [path for i, path in enumerate(found) if (i % 5 == 4) != (part == "train")]


def _render_one(job: tuple[Path, dict, str]) -> None:
    from .scene import frames

    path, parameters, part = job
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # no whole_file: a killed run may leave it, under a name that is no video's
    encode(partial, frames(parameters, _videos[part]), parameters["look"]["crf"])
    os.replace(partial, path)


def encode(path: Path, frames: np.ndarray, crf: int = 23) -> None:
    """Writes frames [T, H, W, 3] as H.264 in an mp4, whatever the path's suffix; `crf` 0 is best, 51 worst."""
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=FPS, options=OPTIONS | {"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    for part, count in zip(SETS, (600, 20, 40, 40), strict=True):
        parser.add_argument(f"--{part}", type=int, default=count, help="videos a class")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument(
        "--pictures", type=Path, help="videos in HMDB-51's layout, to show frames of on ground and walls"
    )
    args = parser.parse_args()
    render(args.out, args.seed, {part: getattr(args, part) for part in SETS}, args.workers, args.pictures)


if __name__ == "__main__":
    main()
