"""From a finished run to a folder in weights/ and its entry in the manifest: what the projects share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import timm
import torch

from etmamba_timm.checkpoints.card import model_card
from etmamba_timm.checkpoints.publish import check_folder
from etmamba_timm.checkpoints.save import save_checkpoint
from etmamba_timm.training.run_folder import MODEL

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "weights"
RESULTS = ROOT / "benchmarks" / "results"


def save(run: Path, folder: Path, card: dict) -> None:
    """Replaces the folder, named after the checkpoint, by the run's model in half precision."""
    model = timm.create_model(f"local-dir:{run / MODEL}", pretrained=True)
    params = sum(p.numel() for p in model.parameters())
    shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(
        model,
        folder,
        dtype=torch.float16,
        card=card,
        readme=lambda config: model_card(folder.name, config, params, "float16", folder.name),
    )


def enter(folder: Path, trained_on: str, started_from: str | None = None, file: Path | None = None) -> None:
    """Writes the checkpoint's entry at the end of the manifest, in the place of an earlier one."""
    file = file or WEIGHTS / "manifest.json"
    entry = check_folder(folder).manifest_entry("none") | {"status": "local", "source": {"folder": folder.name}}
    figures = [figure for figure in entry["figures"] if figure["metric"] == "top-1"]
    entry |= {"trained_on": trained_on, "started_from": started_from, "figures": figures}
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items())
    before, found, old = file.read_text(encoding="utf-8").rstrip().partition(f',\n  "{folder.name}": {{')
    after = old.partition("\n  }")[2] if found else ""
    text = (before + after).removesuffix("}").rstrip()
    text = f'{text},\n  "{folder.name}": {{\n{lines}\n  }}\n}}\n'
    wanted = json.loads(file.read_text(encoding="utf-8")) | {folder.name: entry}
    if json.loads(text) != wanted:
        raise ValueError(f"{file}: write {folder.name}'s entry by hand; its place isn't found")
    file.write_text(text, encoding="utf-8")
