"""What the dataset consists of: its classes, and the ranges that each video's look is drawn from.

A range is cut into equal cells, and each cell belongs to one part of the dataset: val and test are drawn from gaps
between the values of training, and never from each other's. The README says what of that a model can see.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from .looks import STYLES, draw_look

PARTS = ("train", "val", "test")  # of the dataset itself
SETS = (*PARTS, "looks")  # and a second test set, of other looks from the views of training
SIZE = 112  # pixels
FPS = 15


@dataclass(frozen=True)
class Range:
    """`low` to `high`, in as many equal cells as `owners` has letters: t of training, v of val, e of test."""

    low: float
    high: float
    owners: str

    def cells(self, part: str) -> list[tuple[float, float]]:
        """The cells of a part of the dataset, as (low, high)."""
        edges = np.linspace(self.low, self.high, len(self.owners) + 1)
        letter = {"train": "t", "val": "v", "test": "e", "looks": "t"}[part]
        return [(edges[i].item(), edges[i + 1].item()) for i, owner in enumerate(self.owners) if owner == letter]

    def draw(self, rng: np.random.Generator, part: str, count: int = 1) -> list[float]:
        """`count` values, all of one cell."""
        cells = self.cells(part)
        low, high = cells[rng.integers(len(cells))]
        return [round(value, 5) for value in rng.uniform(low, high, count).tolist()]


RANGES = {
    "azimuth": Range(30, 150, "ttvtettvtett"),  # degrees off the recording's forward axis, to either side
    "elevation": Range(4, 28, "ttvttett"),  # degrees
    "distance": Range(3, 7.2, "ttvtett"),  # metres; with `fill` it settles the field of view
    "fill": Range(0.7, 0.98, "tvttett"),  # the longer side of the figure's bounding box over the video, in frames
    "speed": Range(0.85, 1.2, "tvttett"),
    "phase": Range(0, 1, "ttvttettvt"),  # where a cycle starts, or how early an action that happens once
    "shirt_hue": Range(0, 1, "ttvtettvtett"),
    "trousers_hue": Range(0, 1, "tettvtettvtt"),
    "ground_hue": Range(0, 1, "ttvtettvtett"),
    "sky_hue": Range(0, 1, "tettvtettvtt"),
    "skin_tone": Range(0, 1, "ttvttett"),  # fair to dark
    "tile": Range(0.7, 1.5, "tvttettt"),  # metres
}
DRIFTING = ("azimuth", "elevation")  # from one value to another of the same cell, over the video
GROUNDS = {"train": ("checker", "stripes", "bricks", "blotches"), "val": ("dots",), "test": ("triangles",)}
GROUNDS["looks"] = GROUNDS["train"]
SECONDS = (1.8, 2.4)  # a video's length


@dataclass(frozen=True)
class Action:
    """A class: which recording it is of, and what of it is shown.

    `part` is what a video must contain, in seconds of the recording; None for one that goes round, which may start
    anywhere. `pace` is how many seconds of the recording a second of video shows, at speed 1. Where the camera doesn't
    follow, the figure crosses the picture.
    """

    recording: str
    pace: float
    part: tuple[float, float] | None = None
    backwards: bool = False
    camera_follows: bool = True


def _once(recording: str, start: float, end: float, backwards: bool = False) -> Action:
    """An action whose part `start` to `end` just fits into the shortest and slowest video."""
    return Action(recording, (end - start) / (SECONDS[0] * RANGES["speed"].low), (start, end), backwards)


ACTIONS = {
    "backflip": _once("backflip", 0.3, 1.35),
    "cartwheel": _once("cartwheel", 0.55, 2.1),
    "crawl": Action("crawl", 1.4, camera_follows=False),
    "crawl_backwards": Action("crawl", 1.4, camera_follows=False, backwards=True),
    "dance_a": Action("dance_a", 1.0),
    "dance_b": Action("dance_b", 1.0),
    "getup_facedown": _once("getup_facedown", 0.9, 2.7),
    "getup_faceup": _once("getup_faceup", 0.5, 3.4),
    "jump": _once("jump", 0.35, 1.35),
    "kick": _once("kick", 0.35, 1.15),
    "lie_down_facedown": _once("getup_facedown", 0.9, 2.7, backwards=True),
    "lie_down_faceup": _once("getup_faceup", 0.5, 3.4, backwards=True),
    "punch": _once("punch", 0.55, 1.8),
    "roll": _once("roll", 0.25, 1.75),
    "run": Action("run", 0.2, camera_follows=False),
    "run_backwards": Action("run", 0.2, camera_follows=False, backwards=True),
    "spin": _once("spin", 0.9, 2.7),
    "spinkick": _once("spinkick", 0.2, 1.1),
    "walk": Action("walk", 0.5, camera_follows=False),
    "walk_backwards": Action("walk", 0.5, camera_follows=False, backwards=True),
}
CLASSES = tuple(ACTIONS)


def describe() -> dict:
    """All that settles the drawing beside the seed, as JSON takes it."""
    return {
        "size": SIZE,
        "fps": FPS,
        "seconds": list(SECONDS),
        "classes": list(CLASSES),
        "actions": {name: asdict(action) for name, action in ACTIONS.items()},
        "ranges": {name: {part: r.cells(part) for part in SETS} for name, r in RANGES.items()},
        "grounds": {part: list(grounds) for part, grounds in GROUNDS.items()},
        "styles": {part: list(styles) for part, styles in STYLES.items()},
    }


def draw(seed: int, part: str, action: str, number: int) -> dict:
    """The parameters of one video: a function of its four arguments alone, as plain numbers, strings and lists."""
    rng = np.random.default_rng([seed, SETS.index(part), CLASSES.index(action), number])

    def uniform(low: float, high: float) -> float:
        return round(rng.uniform(low, high), 4)

    held = {name: values.draw(rng, part)[0] for name, values in RANGES.items() if name not in DRIFTING}
    side = int(rng.choice([-1, 1]))
    return {
        "action": action,
        **held,
        "aim": [uniform(-0.03, 0.03), uniform(-0.03, 0.03)],  # the figure's offset from the middle, in frames
        "azimuth": [side * a for a in RANGES["azimuth"].draw(rng, part, 2)],  # at the start and at the end
        "elevation": RANGES["elevation"].draw(rng, part, 2),
        "seconds": uniform(*SECONDS),
        "mirror": bool(rng.integers(2)),
        "body": {name: uniform(0.92, 1.08) for name in ("torso", "arms", "legs", "shoulders", "hips")}
        | {"girth": uniform(0.85, 1.25), "head": uniform(0.95, 1.15)},
        "noise": uniform(1, 4),  # degrees, of each joint
        "noise_seed": int(rng.integers(2**31)),
        "look": draw_look(rng, part, held, str(rng.choice(GROUNDS[part]))),
    }
