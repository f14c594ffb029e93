"""What a run says about its model: the block of config.json for the model card."""

from dataclasses import asdict
from pathlib import Path

from ..data import SOURCES
from ..words import number_of
from .evaluate import METRICS, MULTILABEL_METRICS
from .recipe import Recipe


def run_card(recipe: Recipe, processes: int, best_epoch: int, videos: int, metrics: dict[str, float]) -> dict:
    """The block for `save_checkpoint`.

    Args:
        recipe, processes: of the run.
        best_epoch: the epoch of the weights, from 0.
        videos: number of training videos.
        metrics: of these weights, with the recipe's views; see `Scores.metrics`.
    """
    names = METRICS | MULTILABEL_METRICS | {"mean_class": "mean class accuracy"}
    cut = ", taken from the training part by source" if recipe.dataset in SOURCES else ""
    common = {
        "dataset": f"{number_of(int(metrics['videos']), 'validation video')} ({recipe.dataset}{cut})",
        "views": {"frames": recipe.num_frames, "crops": recipe.num_crops, "clips": recipe.num_clips},
        "whose": "measured here",
    }
    teacher = {"teacher": Path(recipe.teacher).name}
    taught = f", with the teacher {teacher['teacher']}," if recipe.teacher else ""
    return {
        "source": f"trained from {_start(recipe)}{taught} on {number_of(videos, 'video')} ({recipe.dataset})",
        "recipe": asdict(recipe) | {"checkpoint": Path(recipe.checkpoint).name, "processes": processes} | teacher,
        "figures": [
            common | {"metric": name, "value": round(100 * metrics[key], 2)}
            for key, name in names.items()
            if key in metrics
        ],
        "notes": f"The weights are those after epoch {best_epoch + 1} of {recipe.epochs}, the best on these "
        "videos with one view each, so the figures are slightly optimistic; a separate test set would be fairer.",
    }


def _start(recipe: Recipe) -> str:
    if recipe.checkpoint:
        return Path(recipe.checkpoint).name
    return f"the weights of {recipe.model}" if recipe.pretrained else "scratch"
