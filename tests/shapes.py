"""Small videos of a moving square whose direction is the class, or several: no frame alone tells it."""

from pathlib import Path

import av
import numpy as np

DIRECTIONS = {"down": (0, 1), "left": (-1, 0), "right": (1, 0), "up": (0, -1)}
KINDS = (("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"))


def write_shapes(root: Path, videos: int, seed: int, num_frames: int = 6, side: int = 32) -> Path:
    """`root/<direction>/<number>.<mp4, webm or avi>`, so many of each direction; anew drawn from the seed."""
    for label, name in enumerate(DIRECTIONS):
        (root / name).mkdir(parents=True)
        for i in range(videos):
            suffix, codec = KINDS[i % len(KINDS)]
            write_shape(
                root / name / f"{i}.{suffix}", name, np.random.default_rng([seed, label, i]), codec, num_frames, side
            )
    return root


def write_several(root: Path, videos: int, seed: int, name: str) -> None:
    """So many videos of one or two squares in `root/<name>/`, and a list of their directions, `root/<name>.csv`."""
    (root / name).mkdir(parents=True)
    lines = ["path,labels"]
    for i in range(videos):
        draw = np.random.default_rng([seed, i])
        directions = sorted(draw.choice(list(DIRECTIONS), draw.integers(1, 3), replace=False))
        write_shape(root / name / f"{i}.mp4", "+".join(directions), draw, "libx264")
        lines.append(f"{name}/{i}.mp4,{';'.join(directions)}")
    (root / f"{name}.csv").write_text("\n".join(lines))


def write_shape(
    path: Path, direction: str, draw: np.random.Generator, codec: str, num_frames: int = 6, side: int = 32
) -> None:
    """One such video: a bright square that crosses the middle, by and large; on the way it is anywhere.

    'left+up' is a video of two squares.
    """
    squares = []
    for name in direction.split("+"):
        size, speed = draw.uniform(0.25, 0.4) * side, draw.uniform(0.1, 0.18) * side
        x, y = draw.uniform(0.38, 0.62, 2) * side
        ground, colour = draw.integers(0, 30, 3), draw.integers(170, 256, 3)
        squares.append((DIRECTIONS[name], size, speed, x, y, colour))
    rows, columns = np.mgrid[:side, :side] + 0.5
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=12)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        stream.options = {"deadline": "realtime", "cpu-used": "8"} if "vp9" in codec else {"preset": "ultrafast"}
        for t in range(num_frames):
            picture = np.broadcast_to(ground, (side, side, 3))
            for (dx, dy), size, speed, x, y, colour in squares:
                way = speed * (t - (num_frames - 1) / 2)
                inside = (abs(columns - x - dx * way) < size / 2) & (abs(rows - y - dy * way) < size / 2)
                picture = np.where(inside[..., None], colour, picture)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        output.mux(stream.encode())
