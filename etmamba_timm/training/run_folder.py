"""The folder of a training run: settings, states, logs and results. A run can be resumed however it was stopped."""

import csv
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ..words import number_of

_logger = logging.getLogger(__name__)

RUN_FILE, RECIPE_FILE = "run.json", "recipe.yaml"
TRAIN_LOG, VAL_LOG = "train.csv", "val.csv"
LAST_WEIGHTS, BEST_WEIGHTS = "last.safetensors", "best.safetensors"
SPLIT = "split"
LONGER = {"epochs", "warmup_epochs"}  # settings that may differ where a run goes on for more epochs
VIDEOS = {"classes", "videos", "val_videos"}  # what run.json says of them
MODEL, SCORES, TENSORBOARD = "model", "scores.safetensors", "tensorboard"


class RunError(ValueError):
    """The folder contains something other than this run."""


class RunFolder:
    """The files of a run in the folder `path`. All but the logs are written under a temporary name and then renamed.

    recipe.yaml, run.json   the recipe, and everything that must be the same to resume the run (but for more epochs)
    split/                  train.csv and val.csv, if one folder of videos was split: lists of the videos
    state-<update>/         accelerate's state after that many updates; only the latest is kept
    train.csv, val.csv      the logs, also in tensorboard/
    last.safetensors        the weights at the last evaluation; best.safetensors: at the best one
    scores.safetensors      the scores of the final evaluation
    model/                  the trained model in the Hub's layout, written last; with the scores it marks the run as
                            finished. Of a run that goes on, it is the earlier one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def open(self, run: Mapping, recipe: str) -> None:
        """Creates the folder, or checks that it contains this run. A run that failed before it started is replaced.

        A run with more epochs than before, and otherwise the same, goes on; if it was finished, it no longer is.

        Args:
            run: everything that must be the same to resume the run; JSON.
            recipe: the text of the recipe.

        Raises:
            RunError: the folder contains another run, or other files.
        """
        run = json.loads(json.dumps(run))  # tuples become lists
        file, identifier = self / RUN_FILE, uuid.uuid4().hex
        started = self._is_started()
        if file.exists():
            known = json.loads(file.read_text(encoding="utf-8"))
            identifier = known.pop("id", identifier)
            keys = known.keys() | run.keys()  # a setting that one version lacks is off there
            differing = sorted(
                key for key in keys if known.get(key) != run.get(key) and (known.get(key) or run.get(key))
            )
            if not differing:
                return
            if started and set(differing) <= LONGER and run["epochs"] > known["epochs"]:
                epochs = number_of(run["epochs"], "epoch")
                _logger.info("%s goes on, for %s instead of %d", self.path, epochs, known["epochs"])
                (self / SCORES).unlink(missing_ok=True)
            elif started:
                changes = "; ".join(
                    f"{key}: {known.get(key)!r:.80} there, {run.get(key)!r:.80} now" for key in differing
                )
                what = "with other settings" if set(differing) - VIDEOS else "on other videos"
                raise RunError(f"{self.path} contains a run {what} ({changes}); choose another folder for the new run")
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self / RECIPE_FILE, recipe)
        _write(file, json.dumps({"id": identifier, **run}, indent=1))

    @property
    def id(self) -> str | None:
        """A name for trackers, which no other run has; None for a run of an earlier version."""
        return json.loads((self / RUN_FILE).read_text(encoding="utf-8")).get("id")

    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return (self / MODEL).exists() and (self / SCORES).exists()

    def check(self) -> None:
        """Raises RunError if the folder contains other files and no run."""
        is_file = self.path.exists() and not self.path.is_dir()
        if is_file or (self._is_started() and not (self / RUN_FILE).exists()):
            raise RunError(f"{self.path} exists and contains no run; choose a new or empty folder")

    def _is_started(self) -> bool:
        names = set(os.listdir(self.path)) if self.path.is_dir() else set()
        return bool(names - {name for own in (RUN_FILE, RECIPE_FILE, SPLIT) for name in (own, "." + own)})

    def states(self) -> list[Path]:
        """Saved states, latest first."""
        found = [p for p in self.path.glob("state-*") if p.name[6:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[6:]), reverse=True)

    def draft(self, update: int) -> Path:
        """The temporary folder for the state after `update` updates."""
        return self / f".state-{update}"

    def keep(self, update: int) -> None:
        """Makes the draft the latest state, and deletes earlier ones."""
        target = self / f"state-{update}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self.draft(update), target)
        for old in self.states()[1:]:
            shutil.rmtree(old, ignore_errors=True)

    def drop_model(self) -> None:
        """Deletes the model of a run with fewer epochs, if there is one."""
        if (self / MODEL).exists():
            os.replace(self / MODEL, self / f".{MODEL}-old")
            self.tidy()

    def tidy(self) -> None:
        """Deletes unfinished files of a killed process."""
        for path in [*self.path.glob(".state-*"), *self.path.glob(f".{MODEL}-*")]:
            shutil.rmtree(path, ignore_errors=True)

    def save_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Writes weights to a safetensors file."""
        draft = self / f".{name}"
        tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        draft.write_bytes(save(tensors, {"format": "pt"}))  # save_file makes it unreadable for other users
        os.replace(draft, self / name)

    def copy_weights(self, name: str, to: str) -> None:
        """Copies a file of weights."""
        draft = self / f".{to}"
        shutil.copyfile(self / name, draft)
        os.replace(draft, self / to)


def training_videos(run: str | Path, root: Path) -> set[Path]:
    """The videos below `root` that a run was trained on, if it had split one folder; none if it hadn't."""
    file = Path(run, SPLIT, "train.csv")
    if not file.is_file():
        return set()
    with file.open(newline="", encoding="utf-8") as text:
        return {root / row["video"] for row in csv.DictReader(text)}


class Log:
    """A log in a CSV file and in trackers.

    Args:
        path: the CSV file. Rows after `update`, left by a killed process, are removed.
        columns: its columns, including 'update'.
        track: receives each row's other values by name, and the update as `step`; `Accelerator.log`.
        update: the number of updates so far.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], track: Callable[..., None], update: int) -> None:
        self.columns, self.track, self.prefix = columns, track, path.stem
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                complete = [row for row in csv.DictReader(file) if None not in row.values()]  # the last may be cut off
                rows = [row for row in complete if int(row["update"]) <= update]
        draft = path.with_name("." + path.name)
        with draft.open("w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)
        os.replace(draft, path)
        self.file = path.open("a", newline="", buffering=1)

    def add(self, **row: float) -> None:
        """Adds a row; `row` has a value for each column."""
        csv.DictWriter(self.file, self.columns).writerow({k: _short(row[k]) for k in self.columns})
        values = {f"{self.prefix}/{name}": value for name, value in row.items() if name != "update"}
        self.track(values, step=row["update"])


def _short(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    draft = path.with_name("." + path.name)
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
