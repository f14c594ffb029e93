"""What is in front of the figure, and what camera and recording do to the picture.

Videos are float32 [T, S, S, 3], 0 to 1.
"""

from __future__ import annotations

import numpy as np

# Of a thermal camera: from cold to warm.
FALSE_COLOURS = np.array(
    [
        [(0.0, 0.0, 0.1), (0.3, 0.0, 0.5), (0.8, 0.1, 0.4), (1.0, 0.6, 0.0), (1.0, 1.0, 0.7)],
        [(0.0, 0.0, 0.3), (0.0, 0.4, 0.9), (0.1, 0.8, 0.5), (0.9, 0.9, 0.1), (1.0, 0.2, 0.1)],
        [(0.0, 0.1, 0.0), (0.0, 0.3, 0.1), (0.1, 0.6, 0.2), (0.4, 0.9, 0.4), (0.9, 1.0, 0.8)],
        [(0.1, 0.0, 0.0), (0.5, 0.0, 0.0), (0.9, 0.3, 0.0), (1.0, 0.8, 0.2), (1.0, 1.0, 0.9)],
    ],
    dtype=np.float32,
)


def apply(video: np.ndarray, look: dict) -> np.ndarray:
    """The video as it was recorded, uint8 [T, S, S, 3], with the effects that the look has."""
    count, size = video.shape[:2]
    rng = np.random.default_rng(look["picture_seed"] + 1)
    for occluder in look["occluders"]:
        cover(video, occluder)
    if look["false_colours"] is not None:
        video = heat(video, FALSE_COLOURS[look["false_colours"]])
    video *= np.array(look["gains"], dtype=np.float32)
    if look["grey"]:
        video[:] = video.mean(axis=-1, keepdims=True)
    if look["gamma"] != 1:
        np.power(np.clip(video, 0, 1), np.float32(look["gamma"]), out=video)
    if look["flicker"]:
        video *= (1 + look["flicker"] * rng.standard_normal((count, 1, 1, 1))).astype(np.float32)
    if look["vignette"]:
        across = np.linspace(-1, 1, size, dtype=np.float32) ** 2
        video *= (1 - np.float32(look["vignette"] / 2) * (across[:, None] + across))[..., None]
    for i in range(1, count if look["blend"] else 0):
        video[i] += np.float32(look["blend"]) * (video[i - 1] - video[i])
    if look["blur"] or look["lines"] < 1:
        kernel = blur(size, look["blur"])
        if look["lines"] < 1:
            few = round(look["lines"] * size)
            kernel = resize(few, size) @ resize(size, few) @ kernel
        video = through(kernel, video)
    if look["noise"]:
        video += np.float32(look["noise"]) * rng.standard_normal(video.shape, dtype=np.float32)
    share, sides = look["letterbox"]
    if share:
        edge = round(share * size)
        across = video.swapaxes(1, 2) if sides else video
        across[:, :edge] = across[:, -edge:] = 0
    return (np.clip(video, 0, 1) * 255 + 0.5).astype(np.uint8)


def cover(video: np.ndarray, occluder: dict) -> None:
    """Draws an occluder over the video, in place."""
    count, size = video.shape[:2]
    places = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    turn = np.radians(occluder["turn"])
    one, two = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    colour, width = np.array(occluder["colour"], dtype=np.float32), occluder["width"]
    for i, moved in enumerate(np.linspace(-0.5, 0.5, count)):
        x, y = (np.float32(p + moved * m) for p, m in zip(occluder["place"], occluder["motion"], strict=True))
        u = one * (places - x) + two * (places - y)[:, None]
        if occluder["kind"] == "blob":
            v = one * (places - y)[:, None] - two * (places - x)
            hidden = (u / width[0]) ** 2 + (v / width[1]) ** 2 < 1
        elif occluder["kind"] == "fence":
            gap = np.float32(occluder["gap"])
            hidden = np.abs(u - gap * np.round(u / gap)) < width[0]
        else:
            hidden = np.abs(u) < width[0]
        video[i][hidden] += np.float32(occluder["opacity"]) * (colour - video[i][hidden])


def heat(video: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The brightness of a video in false colours [K, 3], from dark to light."""
    place = np.clip(video.mean(axis=-1), 0, 1) * (len(colours) - 1)
    below = np.minimum(place.astype(np.int8), len(colours) - 2)
    part = (place - below)[..., None]
    return colours[below] * (1 - part) + colours[below + 1] * part


def blur(size: int, sigma: float) -> np.ndarray:
    """A Gaussian blur of so many pixels, as a matrix [size, size] for rows and for columns."""
    away = np.arange(size) - np.arange(size)[:, None]
    weight = np.exp(-((away / max(sigma, 1e-3)) ** 2) / 2)
    weight[weight < 1e-6] = 0  # processors are slow with the tiniest numbers
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def resize(before: int, after: int) -> np.ndarray:
    """Makes `before` pixels `after`, as a matrix; each is an average of those that it covers, or lies between two."""
    centre = (np.arange(after) + 0.5) * before / after - 0.5
    weight = np.maximum(0, 1 - np.abs(np.arange(before) - centre[:, None]) / max(1, before / after))
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def through(matrix: np.ndarray, video: np.ndarray) -> np.ndarray:
    """Applies a matrix [R, S] to the rows and to the columns of pictures [T, S, S, C]: [T, R, R, C]."""
    planes = np.ascontiguousarray(video.transpose(0, 3, 1, 2))
    return np.ascontiguousarray((matrix @ planes @ matrix.T).transpose(0, 2, 3, 1))
