"""Recordings of motion, and the pose of every body part at any time of one.

The axes are the recordings': x forward at the start, y up, z to the right; metres, seconds, quaternions w first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

# Name, parent, place in the parent's frame. The files hold the joints in this order, after the root.
JOINTS = (
    ("root", None, (0, 0, 0)),
    ("chest", "root", (0, 0.236, 0)),
    ("neck", "chest", (0, 0.224, 0)),
    ("right_hip", "root", (0, 0, 0.085)),
    ("right_knee", "right_hip", (0, -0.422, 0)),
    ("right_ankle", "right_knee", (0, -0.410, 0)),
    ("right_shoulder", "chest", (-0.024, 0.2435, 0.183)),
    ("right_elbow", "right_shoulder", (0, -0.275, 0)),
    ("left_hip", "root", (0, 0, -0.085)),
    ("left_knee", "left_hip", (0, -0.422, 0)),
    ("left_ankle", "left_knee", (0, -0.410, 0)),
    ("left_shoulder", "chest", (-0.024, 0.2435, -0.183)),
    ("left_elbow", "left_shoulder", (0, -0.275, 0)),
)
NAMES = [name for name, _, _ in JOINTS]
_OTHER = {"right": "left", "left": "right"}
_MIRRORED = [NAMES.index(f"{_OTHER.get(side, side)}{_}{part}") for side, _, part in (n.partition("_") for n in NAMES)]
_HINGES = ("knee", "elbow")  # one angle about z in the files


@dataclass(frozen=True)
class Recording:
    """`times` [K], `root` [K, 3], `rotations` [K, 13, 4] (the root's, then each joint's in its parent's frame)."""

    times: np.ndarray
    root: np.ndarray
    rotations: np.ndarray

    @property
    def seconds(self) -> float:
        return float(self.times[-1])

    def at(self, times: np.ndarray, cyclic: bool) -> tuple[np.ndarray, np.ndarray]:
        """Root [F, 3] and rotations [F, 13, 4] at `times` [F].

        Beyond its ends a cyclic recording goes on, carrying the root along; another holds still.
        """
        rounds = np.floor(times / self.seconds) if cyclic else np.zeros(len(times))
        within = np.clip(times - rounds * self.seconds, 0, self.seconds)
        right = np.clip(np.searchsorted(self.times, within, side="right"), 1, len(self.times) - 1)
        step = self.times[right] - self.times[right - 1]
        part = (within - self.times[right - 1]) / step  # [F]
        root = self.root[right - 1] + part[:, None] * (self.root[right] - self.root[right - 1])
        travel = (self.root[-1] - self.root[0]) * (1, 0, 1)
        return root + rounds[:, None] * travel, slerp(self.rotations[right - 1], self.rotations[right], part[:, None])

    def mirrored(self) -> Recording:
        """Left and right exchanged."""
        return Recording(self.times, self.root * (1, 1, -1), self.rotations[:, _MIRRORED] * (1, -1, -1, 1))

    def closed(self, seam: float = 0.3) -> Recording:
        """The end bent to the beginning over the last `seam` of it, so that it goes round without a jolt."""
        weight = np.clip((self.times / self.seconds - 1 + seam) / seam, 0, 1)
        weight = weight * weight * (3 - 2 * weight)  # [K]
        gap = multiply(conjugate(self.rotations[-1]), self.rotations[0])  # [13, 4]
        bend = slerp(np.broadcast_to([1.0, 0, 0, 0], gap.shape), gap, weight[:, None])
        root = self.root.copy()
        root[:, 1] += weight * (root[0, 1] - root[-1, 1])
        return Recording(self.times, root, multiply(self.rotations, bend))


@cache
def read_recording(name: str) -> Recording:
    """One of pybullet_data's recordings, e.g. 'walk'.

    Raises:
        FileNotFoundError: there is no such recording.
    """
    import pybullet_data

    folder = Path(pybullet_data.getDataPath()) / "data" / "motions"
    frames = np.array(json.loads((folder / f"humanoid3d_{name}.txt").read_text())["Frames"])
    rotations = [frames[:, 4:8]]
    column = 8
    for joint in NAMES[1:]:
        if joint.endswith(_HINGES):
            half = frames[:, column] / 2
            rotations.append(np.stack([np.cos(half), 0 * half, 0 * half, np.sin(half)], axis=-1))
            column += 1
        else:
            rotations.append(frames[:, column : column + 4])
            column += 4
    quaternions = np.stack(rotations, axis=1)
    quaternions /= np.linalg.norm(quaternions, axis=-1, keepdims=True)
    times = np.concatenate([[0], np.cumsum(frames[:-1, 0])])
    return Recording(times, frames[:, 1:4], quaternions)


def place(root: np.ndarray, rotations: np.ndarray, body: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Positions [F, 13, 3] and rotations [F, 13, 4] of the joints in the world, for a body of these proportions."""
    positions, world = [root * body["legs"]], [rotations[:, 0]]
    for i, (name, parent, offset) in enumerate(JOINTS[1:], 1):
        p = NAMES.index(parent)
        positions.append(positions[p] + rotate(world[p], np.asarray(offset) * stretch(name, body)))
        world.append(multiply(world[p], rotations[:, i]))
    return np.stack(positions, axis=1), np.stack(world, axis=1)


def stretch(joint: str, body: dict[str, float]) -> np.ndarray:
    """How many times as far from its parent a joint lies, by axis, for a body of these proportions."""
    part = joint.split("_")[-1]
    along = {"knee": "legs", "ankle": "legs", "elbow": "arms", "hip": "legs"}.get(part, "torso")
    across = {"hip": "hips", "shoulder": "shoulders"}.get(part)
    return np.array([1, body[along], body[across] if across else 1])


def wobble(rng: np.random.Generator, times: np.ndarray, degrees: float) -> np.ndarray:
    """Small rotations [F, 13, 4] of each joint, which change smoothly with `times` [F]; about `degrees` large."""
    frequency = rng.uniform(0.2, 0.9, (3, len(NAMES), 3))
    shift = rng.uniform(0, 2 * np.pi, frequency.shape)
    waves = np.sin(2 * np.pi * times[:, None, None, None] * frequency + shift).sum(axis=1)  # [F, 13, 3]
    half = waves * np.radians(degrees) / 2 / np.sqrt(4.5)
    return normalise(np.concatenate([np.ones((*half.shape[:-1], 1)), half], axis=-1))


def normalise(q: np.ndarray) -> np.ndarray:
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def conjugate(q: np.ndarray) -> np.ndarray:
    return q * (1, -1, -1, -1)


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rotation b, then a: quaternions [..., 4]."""
    w, v = a[..., :1], a[..., 1:]
    x, u = b[..., :1], b[..., 1:]
    return np.concatenate([w * x - (v * u).sum(-1, keepdims=True), w * u + x * v + np.cross(v, u)], axis=-1)


def rotate(q: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Vectors [..., 3] turned by quaternions [..., 4]."""
    w, v = q[..., :1], q[..., 1:]
    twice = 2 * cross(v, vector)
    return vector + w * twice + cross(v, twice)


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As numpy's, which takes five times as long for a few vectors."""
    (ax, ay, az), (bx, by, bz) = (np.moveaxis(np.asarray(v), -1, 0) for v in (a, b))
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], axis=-1)


def matrices(q: np.ndarray) -> np.ndarray:
    """The matrices [..., 3, 3] of quaternions [..., 4]."""
    return np.stack([rotate(q, axis) for axis in np.eye(3)], axis=-1)


def slerp(a: np.ndarray, b: np.ndarray, part: np.ndarray) -> np.ndarray:
    """From a (at 0) to b (at 1) the short way; quaternions [..., 4], part [...]."""
    cosine = (a * b).sum(-1)
    b = np.where(cosine[..., None] < 0, -b, b)
    angle = np.arccos(np.clip(np.abs(cosine), 0, 1))
    small = angle < 1e-4
    sine = np.where(small, 1, np.sin(angle))
    left = np.where(small, 1 - part, np.sin((1 - part) * angle) / sine)
    right = np.where(small, part, np.sin(part * angle) / sine)
    return normalise(left[..., None] * a + right[..., None] * b)
