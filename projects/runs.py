"""The package's commands, and several training runs side by side, on one thread each."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from etmamba_timm.training.evaluate import Scores
from etmamba_timm.training.run_folder import MODEL, RUN_FILE


def etmamba(*arguments: object, log: Path | None = None, threads: int | None = None) -> None:
    """Runs a command of the package.

    Args:
        arguments: the command and its arguments.
        log: a file to which its output is appended; None for the terminal.
        threads: how many it may use; None for no limit.

    Raises:
        RuntimeError: it failed.
    """
    line = [sys.executable, "-m", "etmamba_timm", *map(str, arguments)]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with nullcontext() if log is None else log.open("a") as output:
        done = subprocess.run(line, stdout=output, stderr=output, env=environment)
    if done.returncode:
        raise RuntimeError(f"etmamba {arguments[0]} failed" + ("" if log is None else f"; see {log}"))


def tested(model: str, data: Path, file: Path, **options: object) -> Scores:
    """A model's scores on the test videos of `data`; those in `file` are not measured again.

    Args:
        model: a name that `etmamba eval` takes.
        data: the dataset.
        file: where they are kept.
        options: as of `etmamba`.
    """
    if not file.exists():
        etmamba("eval", "--model", model, "--data", data, "--subset", "test", "--scores", file, **options)
    return Scores.load(file)


def about(run: Path) -> dict:
    """What identifies a run: the recipe's settings, the number of `processes` (`batch_size` clips each), and more."""
    return json.loads((run / RUN_FILE).read_text())


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a run's train.csv or val.csv."""
    with path.open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@dataclass(frozen=True)
class Run:
    """A run in `folder`: `etmamba train` by a recipe with some settings changed, on `data`."""

    folder: Path
    recipe: Path
    data: Path
    settings: dict = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """The weights of the best epoch on the validation videos."""
        return self.folder / MODEL / "model.safetensors"

    @property
    def model(self) -> str:
        """The name that `etmamba eval` and others take."""
        return f"local-dir:{self.folder / MODEL}"

    @property
    def options(self) -> dict:
        """One thread, and what is printed goes to `<folder>.log`."""
        return {"threads": 1, "log": self.folder.with_name(self.folder.name + ".log")}

    def train(self) -> None:
        """From the start, or from where it was stopped."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        common = ["--recipe", self.recipe, "--data", self.data, "--workers", 0, "-o", self.folder]
        etmamba("train", *common, "--save-updates", 200, "--set", *settings, **self.options)

    def test(self) -> Scores:
        """Scores on the test videos."""
        return tested(self.model, self.data, self.folder / "test.safetensors", **self.options)

    def log(self, name: str) -> list[dict[str, float]]:
        """Rows of train.csv or val.csv."""
        return read_log(self.folder / name)


def train_all(runs: list[Run], jobs: int) -> None:
    """Trains several runs, `jobs` at a time; finished ones are skipped."""
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(Run.train, runs):
            pass
