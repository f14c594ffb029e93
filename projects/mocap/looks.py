"""How a video looks: the figure's style and shape, what is behind and before it, and what the camera makes of it."""

from __future__ import annotations

import colorsys

import numpy as np

# How the figure is painted. Val and looks have styles of their own; test has those of training.
STYLES = {
    "train": ("clothes", "one_colour", "patchwork", "silhouette"),
    "val": ("rings", "thermal"),
    "test": ("clothes", "one_colour", "patchwork", "silhouette"),
    "looks": ("points", "outline", "checks"),
}
SHAPES = ("filled", "loose", "capsules", "boxes", "sticks")  # what it is made of; 'points' has a shape of its own
SETTINGS = ("sky", "wall", "backdrop")  # behind the ground, or instead of it
SURFACES = ("plain", "grain", "pattern", "picture")
EASY = 0.2  # share of training and test: a light figure in clothes on a dark ground, and nothing done to the picture

# Values and saturations of the figure's colours, then those of ground, wall and sky.
CONTRASTS = {
    "light": (((0.65, 1.0), (0.0, 0.8)), ((0.04, 0.3), (0.0, 0.6))),
    "dark": (((0.03, 0.28), (0.0, 0.9)), ((0.6, 1.0), (0.0, 0.4))),
    "hue": (((0.5, 0.9), (0.6, 1.0)), ((0.4, 0.75), (0.5, 0.9))),  # where the hues are far apart
    "both": (((0.75, 1.0), (0.0, 0.5)), ((0.3, 0.6), (0.1, 0.7))),  # a figure of light and dark
}
PALETTE = 8  # colours of a patchwork


def draw_look(rng: np.random.Generator, part: str, drawn: dict, pattern: str) -> dict:
    """The look of one video, as plain numbers, strings and lists.

    Args:
        rng: what it is drawn with.
        part: 'train', 'val', 'test' or 'looks'.
        drawn: the video's values of `RANGES`.
        pattern: of a surface that has one.
    """

    def uniform(low: float, high: float) -> float:
        return round(rng.uniform(low, high), 4)

    def sometimes(share: float, low: float, high: float) -> float:
        """A value in a share of the videos, 0 in the others."""
        value = uniform(low, high)
        return value if rng.random() < share else 0.0

    def colour(hue: float, ranges: tuple) -> list[float]:
        value, saturation = (rng.uniform(*limits) for limits in ranges)
        return [round(c, 4) for c in colorsys.hsv_to_rgb(hue, saturation, value)]

    easy = part in ("train", "test") and rng.random() < EASY
    style = "clothes" if easy else str(rng.choice(STYLES[part]))
    spare = style in ("points", "outline")  # little of it can be seen, so little is put behind it and nothing before
    shapes = ("filled", "loose", "capsules", "boxes") if style == "outline" else SHAPES
    shape = "filled" if easy else str(rng.choice(shapes))
    contrast = "light" if easy else _contrast(rng, style, drawn)
    figure, behind = CONTRASTS.get(contrast) or _apart(rng)
    fair, deep = np.array([0.96, 0.78, 0.66]), np.array([0.36, 0.22, 0.15])
    flat = style in ("silhouette", "points", "outline") or (style != "clothes" and rng.random() < 0.2)
    wide = ((0.0, 1.0), (0.0, 1.0))
    palette = {
        "shirt": colour(drawn["shirt_hue"], figure),
        "trousers": colour(drawn["trousers_hue"], figure),
        "skin": (fair + drawn["skin_tone"] * (deep - fair)).round(4).tolist(),
        "shoes": colour(uniform(0, 1), ((0.5, 1.0), (0.0, 0.6)) if easy else wide),
        "hair": colour(uniform(0.03, 0.13), ((0.05, 0.6), (0.2, 0.7))),
    }
    setting = "sky" if easy else str(rng.choice(SETTINGS, p=(0.4, 0.35, 0.25)))
    share = (0.7, 0.15, 0.15, 0.0) if spare else (0.2, 0.15, 0.3, 0.35)
    surfaces = ["pattern", "plain"] if easy else rng.choice(SURFACES, 2, p=share).tolist()
    strength = 0.6 if easy else uniform(0.05, 0.2) if spare else uniform(0.1, 1)  # of a surface's second colour
    second = [[drawn["ground_hue"], drawn["sky_hue"]], [drawn["sky_hue"], drawn["ground_hue"]]]
    ground, wall = ([colour(hue, behind) for hue in hues] for hues in second)
    for colours in (ground, wall):
        colours[1] = [round(a + strength * (b - a), 4) for a, b in zip(*colours, strict=True)]
    hard = 0.0 if easy else 1.0
    in_front = int(rng.integers(1, 3)) if rng.random() < 0.2 and not (easy or spare) else 0
    return {
        "style": style,
        "shape": shape,
        "contrast": contrast,
        "thickness": uniform(0.75, 1.35) if not easy else 1.0,
        "skirt": bool(rng.random() < 0.35),
        "knobs": sometimes(0.5, 0.03, 0.05),  # metres: balls at a stick figure's joints
        "sleeves": ["long", "short"][rng.integers(2)],
        "legs": ["long", "short"][rng.integers(2)],
        "palette": palette,
        "patches": [colour(uniform(0, 1), figure) for _ in range(PALETTE)],
        "other": colour(uniform(0, 1), ((0.03, 0.25), (0.0, 0.9))),  # the second colour of rings and checks
        "pattern_size": uniform(0.1, 0.17),  # metres, on the figure
        "point_size": uniform(0.055, 0.09),  # metres: radius
        "line_width": uniform(0.018, 0.03),  # frames
        "flat": bool(flat),
        "light": [uniform(-180, 180), uniform(35, 75)],  # azimuth off the camera's, elevation, in degrees
        "light_strength": [uniform(0.4, 0.6), uniform(0.4, 0.7)],  # ambient, diffuse
        "shadow": 0.8 if easy else sometimes(0.0 if spare else 0.6, 0.3, 0.9),
        "setting": setting,
        "ground": surfaces[0],
        "wall": surfaces[1],
        "pattern": pattern,
        "ground_colours": ground,
        "wall_colours": wall,
        "sky": [colour(drawn["sky_hue"], behind) for _ in range(2)],  # overhead and at the horizon
        "fog": 1.0 if easy else sometimes(0.7, 0.3, 1),
        "wall_gap": round(float(np.exp(rng.uniform(np.log(0.4), np.log(12)))), 4),  # metres behind the figure
        "wall_turn": uniform(-25, 25),  # degrees
        "ground_turn": uniform(0, 90),  # degrees
        "offset": [uniform(0, 10), uniform(0, 10)],  # metres, of patterns
        "tones": [behind[0][0], behind[0][1]],  # darkest and lightest of pictures and grain
        "picture_seed": int(rng.integers(2**31)),
        "picture_size": uniform(1.5, 5),  # metres
        "picture_mix": uniform(0.4, 1),
        "occluders": [_occluder(rng) for _ in range(in_front)],
        "others": [_occluder(rng) for _ in range(in_front if rng.random() < 0.5 else 0)],  # the same, behind
        "shake": [hard * sometimes(0.3, 0.005, 0.03), hard * sometimes(0.2, 0.002, 0.008)],  # frames: slow, quick
        "back_blur": hard * sometimes(0.3, 0.5, 2),  # pixels
        "blur": hard * sometimes(0.25, 0.3, 0.9),  # pixels
        "lines": hard * sometimes(0.2, 0.45, 0.9) or 1.0,  # resolution, of the whole
        "noise": hard * sometimes(0.3, 0.01, 0.06),
        "gains": [uniform(0.8, 1.1) if not easy and i else 1.0 for i in rng.permutation(3)],  # a colour cast
        "gamma": uniform(0.75, 1.2) if not easy else 1.0,
        "grey": bool(not easy and contrast != "hue" and rng.random() < 0.15),
        "flicker": hard * sometimes(0.15, 0.02, 0.08),
        "vignette": hard * sometimes(0.2, 0.2, 0.6),
        "blend": hard * sometimes(0.1, 0.2, 0.5),  # how much of a frame stays in the next
        "letterbox": [hard * sometimes(0.08, 0.04, 0.1), bool(rng.integers(2))],  # frames, at the sides
        "false_colours": int(rng.integers(4)) if style == "thermal" else None,
        "crf": 23 if easy else int(rng.integers(20, 34)),
    }  # fmt: skip


def _contrast(rng: np.random.Generator, style: str, drawn: dict) -> str:
    if style in ("rings", "checks"):
        return "both"
    if style in ("points", "outline", "thermal"):
        return str(rng.choice(["light", "dark"]))
    hues = [(drawn[a] - drawn[b]) % 1 for a in ("shirt_hue", "trousers_hue") for b in ("ground_hue", "sky_hue")]
    far = all(0.17 < hue < 0.83 for hue in hues)
    return str(rng.choice(["light", "dark", "free", "hue"], p=(0.2, 0.2, 0.2, 0.4) if far else (0.3, 0.4, 0.3, 0)))


def _apart(rng: np.random.Generator) -> tuple:
    """Any values of the figure, and others behind it, a third of the scale apart; as a row of `CONTRASTS`."""
    low = rng.uniform(0.02, 0.75)
    behind = (low + rng.uniform(0.33, 0.67)) % 1 * 0.75
    return tuple(((round(v, 4), round(v + 0.25, 4)), (0.0, 0.8)) for v in (low, behind))


def _occluder(rng: np.random.Generator) -> dict:
    """Something in front, in frames from the middle: a bar across the picture, a fence of thin ones, or a blob."""
    kind = str(rng.choice(["bar", "fence", "blob"]))
    width = {"bar": (0.015, 0.04), "fence": (0.006, 0.012), "blob": (0.04, 0.11)}[kind]
    return {
        "kind": kind,
        "place": rng.uniform(-0.4, 0.4, 2).round(4).tolist(),
        "motion": (rng.uniform(-0.3, 0.3, 2) * (rng.random() < 0.5)).round(4).tolist(),  # over the video
        "turn": round(rng.normal(0, 15) + 90 * (rng.random() < 0.25), 2),  # degrees; 0 is upright
        "width": [round(rng.uniform(*width), 4) for _ in range(2)],  # half of it; a blob's two
        "gap": round(rng.uniform(0.12, 0.25), 4),  # from one bar of a fence to the next
        "colour": rng.uniform(0, 1, 3).round(4).tolist(),
        "opacity": round(rng.uniform(0.6, 1), 4),
    }
