"""accelerate's trackers, such as TensorBoard and Weights & Biases, which show a run's logs."""

import importlib.metadata
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from .run_folder import RunFolder

PROJECT = "etmamba"  # under which trackers file all runs


def check_trackers(names: Sequence[str]) -> None:
    """Checks that these trackers can be used.

    Raises:
        ValueError: a name that accelerate doesn't know, or a tracker that isn't installed.
    """
    missing = set(LoggerType.list()) - {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            version = importlib.metadata.version("accelerate")
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"unknown tracker {name!r}; accelerate {version} has {known}")
        if name in missing:
            raise ValueError(f"the tracker {name!r} isn't installed; pip install {name}")


def start_trackers(accelerator: Accelerator, run: RunFolder, update: int, config: dict) -> None:
    """Starts the trackers that `accelerator` was made with. Call it in the main process alone.

    A resumed run goes on in TensorBoard and in Weights & Biases; other trackers begin a new one.

    Args:
        accelerator: with TensorBoard's folder as its logging_dir.
        run: its name and id are the trackers'.
        update: the number of updates so far.
        config: the settings, shown beside the logs (TensorBoard doesn't show them).
    """
    own = {
        "tensorboard": {"purge_step": update + 1},
        "wandb": {"id": run.id, "name": run.path.resolve().name, "resume": "allow"},
    }
    accelerator.init_trackers(PROJECT, init_kwargs=own)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(config)
