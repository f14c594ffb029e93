"""A finished run -> weights/etmamba_ti.mocap, its manifest entry, the sample clip, and the videos that the tests take.

python -m projects.mocap.ship DATA RUN

It evaluates the shipped weights on both kinds of test videos, by `etmamba eval`, once: the scores stay in RUN, and go
to benchmarks/results, as does the validation's log.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from etmamba_timm.training.evaluate import Scores
from etmamba_timm.training.recipe import load_recipe
from etmamba_timm.training.run_folder import RECIPE_FILE, VAL_LOG

from ..runs import about, tested
from ..shipping import RESULTS, ROOT, WEIGHTS, enter, save
from .pairs import accuracies
from .variation import CLASSES

NAME = "etmamba_ti.mocap"
IMAGES = ROOT / "docs" / "images"
VIDEOS = ROOT / "tests" / "mocap" / "test"  # of the test part, so many of each class
EACH = 5
SEED = 0  # which ones, and which is the sample
LICENCE = "Apache-2.0"
DATASET = "rendered motion capture"
TESTS = {"test": ("held-out views", "."), "looks": ("held-out looks", "looks")}  # by file name; folder in the dataset
NOTES = Path(__file__).with_name("notes.md")


def card(run: Path, tests: dict[str, Scores]) -> dict:
    """The block of config.json from which the model card is made."""
    known, recipe, figures = about(run), load_recipe(run / RECIPE_FILE), []
    start = "its earlier version, of the easy look alone," if recipe.pretrained else "scratch"
    for name, scores in tests.items():
        values = {"top-1": scores.topk(1), "top-5": scores.topk(5)}
        for pair, both in accuracies(scores).items():
            values |= {f"top-1 of {motion}": value for motion, value in zip(pair, both, strict=False)}
            values[f"{pair[0]} or backwards, of the two"] = both[2]
        dataset = f"{DATASET}, {len(scores.labels)} videos of {TESTS[name][0]}"
        views = {"frames": recipe.num_frames, "crops": 1, "clips": 1}
        common = {"dataset": dataset, "views": views, "whose": "measured here"}
        figures += [common | {"metric": metric, "value": round(100 * value, 2)} for metric, value in values.items()]
    return {
        "licence": LICENCE,
        "source": f"trained from {start} on {known['videos']:,} videos rendered from motion capture (projects/mocap)",
        "recipe": asdict(recipe) | {"processes": known["processes"]},
        "figures": figures,
        "notes": NOTES.read_text(encoding="utf-8").strip(),
    }


def test_videos(data: Path) -> dict[str, list[Path]]:
    """Each class's test videos.

    Raises:
        ValueError: there are too few.
    """
    videos = {name: sorted((data / "test" / name).glob("*.mp4")) for name in CLASSES}
    for name, found in videos.items():
        if len(found) <= EACH:
            raise ValueError(f"{data}/test/{name} holds {len(found)} videos, {EACH + 1} are needed; render the dataset")
    return videos


def copy_videos(videos: dict[str, list[Path]]) -> None:
    """Copies some test videos of each class, and another one as the sample; the seed chooses them."""
    rng = np.random.default_rng(SEED)
    shutil.rmtree(VIDEOS.parent, ignore_errors=True)
    for old in WEIGHTS.glob("sample_*.mp4"):
        old.unlink()
    shown = CLASSES[rng.integers(len(CLASSES))]
    for name, found in videos.items():
        drawn = rng.permutation(len(found))
        (VIDEOS / name).mkdir(parents=True)
        for i in sorted(drawn[:EACH]):
            shutil.copy(found[i], VIDEOS / name)
        if name == shown:
            shutil.copy(found[drawn[EACH]], WEIGHTS / f"sample_{name}.mp4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the rendered dataset")
    parser.add_argument("run", type=Path, help="the folder of the finished run")
    args = parser.parse_args()
    folder, videos = WEIGHTS / NAME, test_videos(args.data)
    with tempfile.TemporaryDirectory() as draft:
        save(args.run, Path(draft, NAME), card(args.run, {}))
        model = f"local-dir:{Path(draft, NAME)}"
        tests = {
            name: tested(model, args.data / where, args.run / f"{name}.safetensors")
            for name, (_, where) in TESTS.items()
        }
    save(args.run, folder, card(args.run, tests))
    for name, scores in tests.items():
        scores.save(RESULTS / f"mocap_{name}.safetensors")
    shutil.copy(args.run / VAL_LOG, RESULTS / "mocap_val.csv")
    enter(folder, DATASET)
    copy_videos(videos)


if __name__ == "__main__":
    main()
