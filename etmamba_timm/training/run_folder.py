"""The folder of a training run: what it is, its state, its logs; fit to be gone on with, whatever stops the run."""

import csv
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

RUN_FILE, RECIPE_FILE = "run.json", "recipe.yaml"
TRAIN_LOG, VAL_LOG = "train.csv", "val.csv"
LAST_WEIGHTS, BEST_WEIGHTS = "last.safetensors", "best.safetensors"
MODEL, SCORES, TENSORBOARD = "model", "scores.safetensors", "tensorboard"


class RunError(ValueError):
    """A folder that holds something else than this run."""


class RunFolder:
    """Files of a run below `path`. But for the logs, each is written whole under another name, and then renamed.

    recipe.yaml, run.json   the recipe, and all that a run must agree with to be gone on with
    state-<update>/         accelerate's state after so many updates; the latest alone
    train.csv, val.csv      the logs; tensorboard/ has the same
    last.safetensors        weights at the last evaluation, best.safetensors those that were best
    scores.safetensors      the last evaluation's scores
    model/                  the result, in the Hub's layout; when it is there, the run is done
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def open(self, run: Mapping, recipe: str) -> None:
        """Makes the folder, or checks that it holds this very run; one that failed before it began is replaced.

        Args:
            run: what a run must agree with to be gone on with; JSON.
            recipe: text of the recipe.

        Raises:
            RunError: the folder holds another run, or other things.
        """
        run = json.loads(json.dumps(run))  # tuples become lists
        file = self / RUN_FILE
        names = set(os.listdir(self.path)) if self.path.is_dir() else set()
        begun = bool(names - {name for own in (RUN_FILE, RECIPE_FILE) for name in (own, "." + own)})
        if file.exists():
            known = json.loads(file.read_text(encoding="utf-8"))
            differing = sorted(key for key in known.keys() | run.keys() if known.get(key) != run.get(key))
            if not differing:
                return
            if begun:
                said = "; ".join(f"{key}: {known.get(key)!r:.80} there, {run.get(key)!r:.80} now" for key in differing)
                raise RunError(f"{self.path} holds a run with other settings ({said}); name another folder")
        elif begun or (self.path.exists() and not self.path.is_dir()):
            raise RunError(f"{self.path} is there already and holds no run; name a new or empty folder")
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self / RECIPE_FILE, recipe)
        _write(file, json.dumps(run, indent=1))

    def states(self) -> list[Path]:
        """The saved states, the latest first."""
        found = [p for p in self.path.glob("state-*") if p.name[6:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[6:]), reverse=True)

    def draft(self, update: int) -> Path:
        """Where the processes write the state after `update` updates."""
        return self / f".state-{update}"

    def keep(self, update: int) -> None:
        """Makes the draft the latest state, and drops those before it."""
        target = self / f"state-{update}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self.draft(update), target)
        for old in self.states()[1:]:
            shutil.rmtree(old, ignore_errors=True)

    def tidy(self) -> None:
        """Drops what a killed process left half-written."""
        for path in [*self.path.glob(".state-*"), *self.path.glob(f".{MODEL}-*")]:
            shutil.rmtree(path, ignore_errors=True)

    def save_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """A safetensors file of weights, on the CPU."""
        draft = self / f".{name}"
        tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        draft.write_bytes(save(tensors, {"format": "pt"}))  # save_file lets nobody else read it
        os.replace(draft, self / name)

    def copy_weights(self, name: str, to: str) -> None:
        """A copy of such a file."""
        draft = self / f".{to}"
        shutil.copyfile(self / name, draft)
        os.replace(draft, self / to)


class Log:
    """A CSV file with one row for each entry, and the same on TensorBoard.

    Args:
        path: the CSV file. Rows after `update`, which a killed run has left, are dropped from it.
        columns: of the file; the first is 'update'.
        writer: TensorBoard's.
        update: updates that the run has made so far.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], writer: object, update: int) -> None:
        self.columns, self.writer, self.prefix = columns, writer, path.stem
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                whole = [row for row in csv.DictReader(file) if None not in row.values()]  # the last may be cut short
                rows = [row for row in whole if int(row["update"]) <= update]
        draft = path.with_name("." + path.name)
        with draft.open("w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)
        os.replace(draft, path)
        self.file = path.open("a", newline="", buffering=1)

    def add(self, **row: float) -> None:
        """Adds a row."""
        csv.DictWriter(self.file, self.columns).writerow({k: _short(row[k]) for k in self.columns})
        for name, value in row.items():
            if name != "update":
                self.writer.add_scalar(f"{self.prefix}/{name}", value, row["update"])


def _short(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    draft = path.with_name("." + path.name)
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
