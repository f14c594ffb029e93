"""Class scores and features of video files.

model = load_model("videomamba_m", checkpoint="videomamba_m16_k400_f16_res224.pth")
scores = predict(model, "clip.mp4", num_clips=4, num_crops=3)
print(top_classes(model, scores))
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import is_model_pretrained
from torch import Tensor, nn

from .checkpoints import find_checkpoint, read_checkpoint
from .checkpoints.config import CONFIG_FILE, read_config
from .checkpoints.fetch import fetch
from .checkpoints.manifest import unknown_tag
from .checkpoints.read import architecture_of
from .data import EvalTransform, Views
from .models import VARIANTS, EtMamba
from .views import check_is_model, mean_over_views
from .words import did_you_mean

_logger = logging.getLogger(__name__)


class UntrainedError(RuntimeError):
    """The model has no trained weights, so its results would be random."""


def load_model(
    name: str, checkpoint: str | Path | None = None, *, allow_untrained: bool = False, need_classifier: bool = True
) -> EtMamba:
    """Loads a model with trained weights, in evaluation mode.

    Args:
        name: a name for `timm.create_model`: 'etmamba_m', a name with a tag, 'hf-hub:org/name' or 'local-dir:folder'.
        checkpoint: weights for that architecture: safetensors, .pth or a folder, ours or VideoMamba's. They determine
            the number of classes, frames and channels and the image size; class names come from its config.json, or
            else from the name's tag.
        allow_untrained: whether to return a randomly initialised model if there are no trained weights.
        need_classifier: whether the classifier must be trained; features don't need it.

    Returns: the model.

    Raises:
        UntrainedError: no trained weights, no trained classifier, or weights that are only a starting point.
        ValueError: an unknown name.
        CheckpointError: the checkpoint is damaged or of another architecture.
        FileNotFoundError: no such checkpoint.
        DownloadError: the weights can't be downloaded.
    """
    _check_name(name)
    is_source = ":" in name
    _, dot, _ = name.partition(".")
    entry = None if is_source else find_checkpoint(name)
    if checkpoint is not None:
        loaded = read_checkpoint(checkpoint)
        model = _create(name, pretrained=True, pretrained_cfg_overlay={"state_dict": loaded})
        block = architecture_of(model.state_dict())["block"]
        starts = loaded.architecture["block"] != block
        has_classifier = model.num_classes > 0 and not starts
        if block == "bimamba" and model.num_frames > 1 and model.stride is None:
            _logger.warning(
                "%s doesn't say how its clips are sampled, so frames are taken %d apart. VideoMamba's own weights need "
                "frames spread over the video: for those, add the tag to the name (`etmamba info %s` lists them)",
                *(checkpoint, model.clip.known().stride, name),
            )
    else:
        starts = entry is not None and entry.status == "warm start"
        trained = is_source or (is_model_pretrained(name) and not starts)
        if not trained and not starts and not allow_untrained:
            raise UntrainedError(
                f"{name!r} has no trained weights, so its results would be random. Give a checkpoint or a model "
                "with weights (hf-hub:ORG/NAME, local-dir:FOLDER), or pass allow_untrained"
            )
        if starts and not allow_untrained:  # before a download
            raise _starting_point(name)
        if not trained:
            _logger.warning("%s has no trained weights: its results are random", name)
        model = _create(name, pretrained=trained or bool(starts and dot))  # without a tag, not worth the download
        has_classifier = trained and model.num_classes > 0
    if starts and not allow_untrained:
        raise _starting_point(name)
    if need_classifier and not has_classifier and not allow_untrained:
        raise UntrainedError(f"{checkpoint or name}: no trained classifier, so classes would be random; use features")
    return model.eval()


def model_without_weights(name: str, checkpoint: str | Path | None = None) -> EtMamba:
    """The model that `load_model` would load, on the device 'meta'; nothing is downloaded but a config.json.

    Arguments and errors are as in `load_model`, but the model needs no trained weights.
    """
    _check_name(name)
    if checkpoint is None:
        return _create(name, device="meta")
    overlay = {"state_dict": read_checkpoint(checkpoint)}
    return _create(name, pretrained=True, pretrained_cfg_overlay=overlay, device="meta")


def predict(
    model: EtMamba, path: str | Path, *, num_clips: int = 1, num_crops: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """Class scores of a video file: softmax, averaged over views (clips × crops).

    If the model's classes don't exclude each other (`model.is_multilabel`), sigmoids.

    Args:
        model: a model in evaluation mode, with a classifier. Frames are sampled by its `clip`; an unknown stride is 2.
        path: a video file in any format of FFmpeg, or a folder of frames.
        num_clips: number of clips, spread evenly over the video; a single one is centred.
        num_crops: 1 (centre) or 3 (along the longer side).
        dtype: autocast's dtype, such as torch.bfloat16; None for no autocast.

    Returns: float32 [num_classes], on the CPU.

    Raises:
        VideoError: the file is missing, isn't a video, or can't be decoded.
        TypeError: something else in place of the model or the path.
        ValueError: a model without classes or in training mode, an invalid number of clips or crops, or scores that
            aren't finite.
    """
    return _only(
        predict_files(model, [path], num_clips=num_clips, num_crops=num_crops, dtype=dtype, batch_size=num_crops)
    )


def extract_features(
    model: EtMamba, path: str | Path, *, num_clips: int = 1, num_crops: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """Pooled features of a video file before the classifier, averaged over views.

    Arguments and errors are as in `predict`, but the model needs no classifier.

    Returns: float32 [D], on the CPU.
    """
    return _only(
        features_of_files(model, [path], num_clips=num_clips, num_crops=num_crops, dtype=dtype, batch_size=num_crops)
    )


def predict_files(
    model: EtMamba,
    paths: Sequence[str | Path],
    *,
    num_clips: int = 1,
    num_crops: int = 1,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    workers: int = 0,
) -> Iterator[Tensor | Exception]:
    """Class scores of many video files, as by `predict` apart from rounding.

    Args:
        model, num_clips, num_crops, dtype: as in `predict`.
        paths: the video files, or folders of frames.
        batch_size: views per forward pass, of several files.
        workers: processes that decode ahead of the model; 0 to decode in this one.

    Yields: for each file in order, float32 [num_classes] on the CPU, or the error that `predict` would raise.

    Raises:
        ValueError: as `predict` for the model or the arguments.
    """
    check_model(model, need_classes=True)
    views = _views(model, paths, num_clips, num_crops)
    results = mean_over_views(model, model, views, scores=True, batch_size=batch_size, workers=workers, dtype=dtype)
    return finite(results, paths)


def features_of_files(
    model: EtMamba,
    paths: Sequence[str | Path],
    *,
    num_clips: int = 1,
    num_crops: int = 1,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    workers: int = 0,
) -> Iterator[Tensor | Exception]:
    """Pooled features of many video files, float32 [D] each; otherwise as `predict_files`."""

    def features(clips: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(clips), pre_logits=True)

    views = _views(model, paths, num_clips, num_crops)
    return finite(mean_over_views(model, features, views, batch_size=batch_size, workers=workers, dtype=dtype), paths)


def top_classes(model: EtMamba, scores: Tensor, k: int = 5) -> list[dict]:
    """The k classes with the highest `scores` [num_classes], best first.

    Returns: dictionaries {"label", "index", "score"}; labels are by `class_names`.
    """
    check_is_model(model)
    labels = class_names(model, len(scores))
    best = scores.topk(min(k, len(scores)))
    return [
        {"label": labels[i], "index": i, "score": score}
        for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def class_names(model: EtMamba, num_classes: int) -> list[str]:
    """Class names from the model's `pretrained_cfg`, or 'class 0' etc. unless it has `num_classes` names."""
    names = model.pretrained_cfg.get("label_names") or ()
    return list(names) if len(names) == num_classes else [f"class {i}" for i in range(num_classes)]


def check_model(model: nn.Module, need_classes: bool) -> None:
    """Raises ValueError if a model is in training mode, doesn't pool or has no classes; TypeError if it is none."""
    check_is_model(model)
    if model.training:
        raise ValueError("the model is in training mode; call model.eval()")
    if not model.global_pool:
        raise ValueError("the model returns all tokens (global_pool=''); create it with global_pool='token' or 'avg'")
    if need_classes and cast(int, model.num_classes) < 1:
        raise ValueError("the model has no classes to predict; use extract_features, or a checkpoint with a classifier")


def _views(model: EtMamba, paths: Sequence[str | Path], num_clips: int, num_crops: int) -> Views:
    check_model(model, need_classes=False)
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths is {str(paths)!r}; give a list of videos, or call predict or extract_features for one")
    if wrong := [path for path in paths if not isinstance(path, str | os.PathLike)]:
        raise TypeError(
            f"a video is {wrong[0]!r:.80}; give its path (predict_files and features_of_files take several)"
        )
    transform = EvalTransform.from_model(model, size=model.img_size)
    return Views([Path(path) for path in paths], transform, model.clip, num_clips, num_crops)


def finite(results: Iterator[Tensor | Exception], paths: Sequence) -> Iterator[Tensor | Exception]:
    """The results in float32; those that aren't finite become errors."""
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, Tensor) and not result.isfinite().all():
            yield ValueError(f"{path}: the result isn't finite; check the checkpoint, or use float32")
        else:
            yield result.float() if isinstance(result, Tensor) else result


def _only(results: Iterator[Tensor | Exception]) -> Tensor:
    result = next(results)
    if isinstance(result, Exception):
        raise result
    return result


def _check_name(name: str) -> None:
    """Raises ValueError for a name of no model, and for an unknown tag; those of hf-hub: and local-dir: come later."""
    variant, dot, tag = name.partition(".")
    if ":" in name:
        return
    if variant not in VARIANTS and Path(name).is_dir():
        raise ValueError(f"{name!r} is a folder; as a model it is local-dir:{name}")
    if variant not in VARIANTS:
        raise ValueError(
            f"unknown model {name!r}{did_you_mean([variant], VARIANTS)}; choose one of "
            f"{', '.join(VARIANTS)}, hf-hub:ORG/NAME, local-dir:FOLDER"
        )
    if dot and find_checkpoint(name) is None:
        raise ValueError(unknown_tag(variant, tag))


def _create(name: str, **kwargs: Any) -> EtMamba:
    """`timm.create_model`. A config.json is checked first: timm fails on a damaged one without naming the key."""
    kind, _, where = name.partition(":")
    if kind == "hf-hub":  # download it here: timm waits half a minute for a Hub that can't be reached
        read_config(fetch(where, CONFIG_FILE).parent)
    elif kind == "local-dir" and read_config(where) is None:
        inner = Path(where, "model")  # of a run
        if not Path(where).is_dir():
            raise FileNotFoundError(f"there is no folder {where}; name one that `etmamba train` or `convert` made")
        made = "name a folder that `etmamba train` (RUN/model) or `etmamba convert` made"
        remedy = f"name {inner}" if (inner / CONFIG_FILE).exists() else made
        raise FileNotFoundError(f"{where} contains no config.json; {remedy}")
    model = timm.create_model(name, **kwargs)
    assert isinstance(model, EtMamba)  # config.json and the name were checked
    return model


def _starting_point(name: str) -> UntrainedError:
    return UntrainedError(
        f"{name!r} is a starting point for training (VideoMamba's weights), not a classifier: its results would be "
        "meaningless. Train it and give that checkpoint, or choose a trained model, such as etmamba_ti.mocap"
    )
