"""Several runs of `etmamba train` and `etmamba eval` side by side, on one thread each."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from etmamba_timm.evaluate import Scores


@dataclass(frozen=True)
class Run:
    """A run in `folder`: `etmamba train` by a recipe with some settings changed, on `data`."""

    folder: Path
    recipe: Path
    data: Path
    settings: dict = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """Those of the epoch that was best on the validation videos."""
        return self.folder / "model" / "model.safetensors"

    def train(self) -> None:
        """From the start, or from where it was stopped; its output goes to `<folder>.log`."""
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        self._call("train", "--recipe", self.recipe, "-o", self.folder, "--save-updates", 200, "--set", *settings)

    def test(self) -> Scores:
        """Scores on the test videos; they are kept, and not measured again."""
        file = self.folder / "test.safetensors"
        if not file.exists():
            model = f"local-dir:{self.folder / 'model'}"
            self._call("eval", "--model", model, "--subset", "test", "--batch-size", 16, "--scores", file)
        return Scores.load(file)

    def log(self, name: str) -> list[dict[str, float]]:
        """Rows of train.csv or val.csv."""
        with (self.folder / name).open() as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]

    def seconds_a_clip(self) -> float:
        """Of training, decoding included, on one thread; the median over the run's log."""
        return statistics.median(1 / row["clips_per_second"] for row in self.log("train.csv"))

    def _call(self, command: str, *arguments: object) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, "-m", "etmamba_timm", command, "--data", self.data, "--workers", 0, *arguments]
        with self.folder.with_name(self.folder.name + ".log").open("a") as log:
            subprocess.run(
                list(map(str, line)), check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )


def train_all(runs: list[Run], jobs: int) -> None:
    """Train several, so many at a time; those that are done already are left."""
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(Run.train, runs):
            pass
