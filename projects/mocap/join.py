"""Joins test videos into a long one, and measures how much of it a timeline labels correctly."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from .render import encode
from .sheet import read
from .variation import FPS


def join(data: Path, out: Path, count: int, seed: int) -> list[tuple[float, str]]:
    """Writes `count` of the dataset's test videos as one; returns when each begins, in seconds, and its class."""
    videos = sorted((data / "test").glob("*/*.mp4"))
    drawn = [videos[i] for i in np.random.default_rng(seed).permutation(len(videos))[:count]]
    parts = [read(video) for video in drawn]
    encode(out, np.concatenate(parts))
    starts = np.cumsum([0, *map(len, parts[:-1])]) / FPS
    return [(start.item(), video.parent.name) for start, video in zip(starts, drawn, strict=True)]


def share_right(truth: list[tuple[float, str]], segments: Path) -> float:
    """The share of the time for which segments (CSV of `etmamba timeline --segments`) have the true label."""
    with segments.open(newline="") as file:
        rows = [(float(row["start"]), float(row["end"]), row["label"]) for row in csv.DictReader(file)]
    ends = [start for start, _ in truth[1:]] + [rows[-1][1]]
    right = 0.0
    for (start, name), end in zip(truth, ends, strict=True):
        right += sum(max(0.0, min(end, b) - max(start, a)) for a, b, label in rows if label == name)
    return right / rows[-1][1]
