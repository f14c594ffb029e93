"""A linear probe: the classifier alone is trained, on features that are computed once."""

import logging
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.card import model_card
from ..checkpoints.save import save_checkpoint
from ..data import Annotations, EvalClips, EvalTransform
from .card import run_card
from .evaluate import evaluate, over_videos
from .recipe import Recipe
from .run_folder import MODEL, RECIPE_FILE, SCORES, RunError
from .train import DTYPES, TrainingError, build_model

_logger = logging.getLogger(__name__)

PENALTIES = [10.0**i for i in range(-5, 2)]  # of the squared weights, for standardised features


def linear_probe(
    recipe: Recipe,
    train_set: Annotations,
    val_set: Annotations,
    folder: str | Path,
    *,
    device: str = "cpu",
    workers: int = 2,
    progress: bool = False,
) -> dict[str, float]:
    """Trains the recipe's model's classifier by logistic regression; everything else stays as it is.

    The features are means over the recipe's views (num_clips × num_crops). The penalty of the weights is the one with
    the lowest loss on `val_set`. Of the recipe, only the model, the clip, the views, balance and the batch size count.

    Args:
        recipe, train_set, val_set: as in `train`; one process.
        folder: a new or empty folder, which gets recipe.yaml, scores.safetensors and model/, as from `train`.
        device, workers, progress: as in `evaluate`.

    Returns: metrics (see `Scores.metrics`) on `val_set`.

    Raises:
        RunError: the folder isn't empty.
        TrainingError: other classes in `val_set`, several processes, or a model without trained weights.
        ValueError: no video can be decoded, or the features aren't finite.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists already; choose a new or empty folder")
    if val_set.classes != train_set.classes:
        raise TrainingError("training and validation videos have different classes; use the same for both")
    if train_set.is_multilabel or val_set.is_multilabel:
        raise TrainingError("videos have several labels, and a probe learns one of each; train without --probe")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise TrainingError("a probe runs in one process; start it without a launcher")
    if not (recipe.pretrained or recipe.checkpoint):
        raise TrainingError("a probe needs a trained model; set pretrained=true, or a checkpoint")
    model = build_model(recipe, train_set.classes).eval().to(device)
    transform = EvalTransform.from_model(model, size=model.img_size)
    train, val = (
        EvalClips(videos, transform, recipe.clip, recipe.num_clips, recipe.num_crops) for videos in (train_set, val_set)
    )
    size, dtype = recipe.batch_size, DTYPES[recipe.precision]

    def features(clips: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(clips), pre_logits=True)

    (x, labels, _), (val_x, val_labels, _) = (
        over_videos(model, features, videos, batch_size=size, workers=workers, dtype=dtype, progress=progress)
        for videos in (train, val)
    )
    std, mean = torch.std_mean(x, 0, correction=0)
    std = std.clamp(min=1e-6)
    weights = labels.bincount(minlength=len(train_set.classes))[labels].double() ** -recipe.balance
    fits = [_fit((x - mean) / std, labels, weights / weights.sum(), len(train_set.classes), p) for p in PENALTIES]
    losses = [F.cross_entropy((val_x - mean) / std @ w.T + b, val_labels).item() for w, b in fits]
    best = losses.index(min(losses))
    _logger.info("penalty %g, loss %.3f on the validation videos", PENALTIES[best], losses[best])
    weight, bias = fits[best][0] / std, fits[best][1] - (fits[best][0] / std) @ mean
    head = model.get_classifier()
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    scores = evaluate(model, val, batch_size=size, workers=workers, dtype=dtype, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    scores.save(folder / SCORES)
    card = run_card(recipe, 1, 0, len(labels), scores.metrics())
    card["source"] = card["source"].replace("trained from", "a linear probe on the features of", 1)
    card["notes"] = (
        "Only the classifier is trained, by logistic regression. Its penalty is the best one on these videos, so the "
        "accuracy is slightly optimistic; a separate test set would be fairer."
    )
    save_checkpoint(
        model,
        folder / MODEL,
        label_names=train_set.classes,
        stride=recipe.clip.stride,
        card=card,
        readme=lambda config: model_card(
            folder.resolve().name, config, sum(p.numel() for p in model.parameters()), "float32"
        ),
    )
    return scores.metrics()


def _fit(x: Tensor, labels: Tensor, weights: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Logistic regression on features [N, D], whose `weights` [N] add up to 1; returns [classes, D] and [classes]."""
    weight, bias = x.new_zeros(classes, x.shape[1], requires_grad=True), x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        nll = F.cross_entropy(x @ weight.T + bias, labels, reduction="none")
        value = weights @ nll + penalty * weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()
