"""The clips of J-HMDB in HMDB-51's split 1, as the lists in `splits/` name them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from etmamba_timm.data.layouts import SOURCES

SPLITS = Path(__file__).with_name("splits")
ENDING = "_test_split1.txt"
PARTS = {"1": "train", "2": "test"}


@dataclass(frozen=True)
class Clip:
    """A clip's name without suffix, its class, the video it was cut from, and its part: 'train' or 'test'."""

    name: str
    label: str
    source: str
    part: str


def read_clips(splits: Path = SPLITS) -> list[Clip]:
    """All clips of the lists, in the order of `read_dataset("hmdb51", ...)` in each part."""
    clips = []
    for file in sorted(splits.glob(f"*{ENDING}")):
        label = file.name.removesuffix(ENDING)
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, part = line.strip().rpartition(" ")
            name = Path(name).stem
            clips.append(Clip(name, label, SOURCES["hmdb51"](Path(name), label), PARTS[part]))
    return clips


def kinds_of_test(splits: Path = SPLITS) -> dict[str, list[bool]]:
    """Which test clips, in order, belong to each kind of test.

    'test' is all of them; 'strict' those whose source is in no training clip; 'seen source' the others, whose
    source is in training under another class.
    """
    clips = read_clips(splits)
    known = {clip.source for clip in clips if clip.part == "train"}
    seen = [clip.source in known for clip in clips if clip.part == "test"]
    return {"test": [True] * len(seen), "strict": [not value for value in seen], "seen source": seen}
