"""A finished run -> weights/etmamba_ti.mocap, its manifest entry, the sample clip, and the videos that the tests take.

python -m benchmarks.mocap.ship DATA RUN

It evaluates the shipped weights on the test videos, by `etmamba eval`, once: the scores stay in RUN/test.safetensors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import yaml

from etmamba_timm.card import model_card
from etmamba_timm.evaluate import Scores
from etmamba_timm.models.save import save_checkpoint
from etmamba_timm.publish import check_folder
from etmamba_timm.run_folder import RECIPE_FILE, RUN_FILE

from .pairs import accuracies
from .variation import CLASSES

ROOT = Path(__file__).parents[2]
NAME = "etmamba_ti.mocap"
WEIGHTS = ROOT / "weights"
VIDEOS = ROOT / "tests" / "mocap" / "test"  # of the test part, so many of each class
EACH = 5
SEED = 0  # which ones, and which is the sample
LICENCE = "Apache-2.0"
DATASET = "rendered motion capture"
NOTES = Path(__file__).with_name("notes.md")


def processes(run: Path) -> int:
    """That the run was trained by; each took `batch_size` clips of an update."""
    return json.loads((run / RUN_FILE).read_text())["processes"]


def card(run: Path, scores: Scores | None) -> dict:
    """The block of config.json that the model card is made of."""
    views = {"frames": 8, "crops": 1, "clips": 1}
    figures = []
    if scores is not None:
        values = {"top-1": scores.topk(1), "top-5": scores.topk(5)}
        for pair, both in accuracies(scores).items():
            values |= {f"top-1 of {name}": value for name, value in zip(pair, both, strict=False)}
            values[f"{pair[0]} or backwards, of the two"] = both[2]
        dataset = f"{DATASET}, {len(scores.labels)} videos of held-out views"
        common = {"dataset": dataset, "views": views, "whose": "measured here"}
        figures = [common | {"metric": name, "value": round(100 * value, 2)} for name, value in values.items()]
    return {
        "licence": LICENCE,
        "source": "trained from scratch on 6,000 videos rendered from motion capture (benchmarks/mocap)",
        "recipe": yaml.safe_load((run / RECIPE_FILE).read_text()) | {"processes": processes(run)},
        "figures": figures,
        "notes": NOTES.read_text(encoding="utf-8").strip(),
    }


def save(run: Path, folder: Path, scores: Scores | None) -> None:
    """The run's model in half precision, instead of what is in the folder."""
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    params = sum(p.numel() for p in model.parameters())
    shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(
        model,
        folder,
        dtype=torch.float16,
        card=card(run, scores),
        readme=lambda config: model_card(NAME, config, params, "float16", NAME),
    )


def test(data: Path, folder: Path, file: Path) -> Scores:
    """The shipped weights' scores on the test videos; they are kept, and not measured again."""
    if file.exists():
        return Scores.load(file)
    command = ["eval", "--model", f"local-dir:{folder}", "--data", str(data), "--subset", "test", "--scores", str(file)]
    subprocess.run([sys.executable, "-m", "etmamba_timm", *command], check=True)
    return Scores.load(file)


def enter(folder: Path) -> None:
    """The checkpoint's entry in the manifest, instead of the one that is there."""
    found = check_folder(folder)
    entry = found.manifest_entry("none") | {"status": "local", "source": {"folder": folder.name}}
    entry |= {"trained_on": DATASET, "figures": entry["figures"][:1]}
    file = WEIGHTS / "manifest.json"
    text = file.read_text(encoding="utf-8")
    if next(reversed(json.loads(text))) != NAME and NAME in json.loads(text):
        raise ValueError(f"{file}: move {NAME}'s entry to the end")
    before, _, _ = text.rstrip().removesuffix("}").rstrip().partition(f',\n  "{NAME}"')
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items())
    file.write_text(f'{before},\n  "{NAME}": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")


def copy_videos(data: Path) -> None:
    """Some test videos of each class, and one of the others as the sample; drawn by the seed."""
    rng = np.random.default_rng(SEED)
    shutil.rmtree(VIDEOS.parent, ignore_errors=True)
    for old in WEIGHTS.glob("sample_*.mp4"):
        old.unlink()
    shown = CLASSES[rng.integers(len(CLASSES))]
    for name in CLASSES:
        videos = sorted((data / "test" / name).glob("*.mp4"))
        drawn = rng.permutation(len(videos))
        (VIDEOS / name).mkdir(parents=True)
        for i in sorted(drawn[:EACH]):
            shutil.copy(videos[i], VIDEOS / name)
        if name == shown:
            shutil.copy(videos[drawn[EACH]], WEIGHTS / f"sample_{name}.mp4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the rendered dataset")
    parser.add_argument("run", type=Path, help="the folder of the finished run")
    args = parser.parse_args()
    folder, file = WEIGHTS / NAME, args.run / "test.safetensors"
    save(args.run, folder, None)
    save(args.run, folder, test(args.data, folder, file))
    enter(folder)
    copy_videos(args.data)


if __name__ == "__main__":
    main()
