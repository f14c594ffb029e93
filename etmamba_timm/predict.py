"""From a video file to class scores or features.

model = load_model("videomamba_m", checkpoint="videomamba_m16_k400_f16_res224.pth")
scores = predict(model, "clip.mp4", num_clips=4, num_crops=3)
print(top_classes(model, scores))
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.models import is_model_pretrained
from torch import Tensor

from .checkpoints import find_checkpoint
from .checkpoints.config import CONFIG_FILE, read_config
from .checkpoints.fetch import fetch
from .data import EvalTransform, VideoReader, fixed_clips
from .models import VARIANTS, EtMamba

_logger = logging.getLogger(__name__)


class UntrainedError(RuntimeError):
    """There are no trained weights for what was asked: the result would be noise."""


def load_model(
    name: str, checkpoint: str | Path | None = None, *, allow_untrained: bool = False, need_classifier: bool = True
) -> EtMamba:
    """A model with trained weights, in evaluation mode.

    Args:
        name: what `timm.create_model` takes: 'etmamba_m', a name with a tag, 'hf-hub:org/name', 'local-dir:folder'.
        checkpoint: weights for that architecture: safetensors, .pth or a folder, ours or VideoMamba's. The numbers of
            classes, frames and channels and the picture size are read off it; class names are those of its config.json,
            else of the name's tag.
        allow_untrained: whether a model without trained weights is made up at random instead of refused.
        need_classifier: whether the classifier must be trained too; not so for features.

    Raises:
        UntrainedError: there are no trained weights, or no trained classifier, or they are a mere starting point.
        ValueError: an unknown name; CheckpointError: a checkpoint that is damaged or of another architecture.
        FileNotFoundError: no such checkpoint.
        DownloadError: it can't be fetched.
    """
    is_source = ":" in name  # hf-hub:, local-dir:
    if not is_source and name.partition(".")[0] not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; `etmamba info` lists those there are")
    if checkpoint is not None:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(checkpoint)})
        has_classifier = model.num_classes > 0
        if "." not in name and VARIANTS[name]["block"] == "bimamba" and model.num_frames > 1 and model.stride is None:
            _logger.warning(
                "%s doesn't state how its clips are sampled: frames are taken %d apart. VideoMamba's own weights want "
                "them spread over the video: for those, name the tag (`etmamba info %s` lists them)",
                *(checkpoint, model.clip.known().stride, name),
            )
    else:
        entry = None if is_source else find_checkpoint(name)
        warm = entry is not None and entry.status == "warm start"
        trained = is_source or (is_model_pretrained(name) and not warm)
        if warm and not allow_untrained:
            raise UntrainedError(
                f"{name!r} is a starting point for training (weights of {entry.started_from}), not a classifier: its "
                "results would be meaningless. Train it and give that checkpoint, or take a trained model"
            )
        if not is_source and "." in name and entry is None:
            raise ValueError(
                f"{name!r} has an unknown tag; `etmamba info {name.partition('.')[0]}` lists those there are"
            )
        if not trained and not allow_untrained:
            raise UntrainedError(
                f"{name!r} has no trained weights, so its results would be random. Give a checkpoint, or a model that "
                "has weights (hf-hub:ORG/NAME, local-dir:FOLDER); or allow an untrained one"
            )
        if not trained:
            _logger.warning("%s has no trained weights: its results are random", name)
        started = warm and "." in name  # a tag is asked for by name; else there is nothing worth a download
        model = _from_source(name) if is_source else timm.create_model(name, pretrained=trained or started)
        has_classifier = trained and getattr(model, "num_classes", 0) > 0
    if need_classifier and not has_classifier and not allow_untrained:
        raise UntrainedError(f"{checkpoint or name}: no trained classifier, so classes would be random; take features")
    return model.eval()


def predict(
    model: EtMamba, path: str | Path, *, num_clips: int = 1, num_crops: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """Class scores of a video file: softmax, averaged over views (clips × crops).

    Args:
        model: in evaluation mode, with a classifier. Its `clip` says how frames are sampled; an unknown stride is 2.
        path: a video file that FFmpeg reads.
        num_clips: clips, spread evenly over the video; a single one stands in its middle.
        num_crops: 1 (centre) or 3 (along the longer side).
        dtype: of autocast, e.g. torch.bfloat16; None for none.

    Returns: float32 [num_classes], on the CPU.

    Raises:
        VideoError: the file is missing, no video, or can't be decoded.
        ValueError: a model without classes, a number of clips or crops that doesn't exist.
    """
    if model.num_classes < 1:
        raise ValueError("the model has no classes to predict; use extract_features, or a checkpoint with a classifier")
    return _over_views(model, lambda x: model(x).float().softmax(-1), path, num_clips, num_crops, dtype)


def extract_features(
    model: EtMamba, path: str | Path, *, num_clips: int = 1, num_crops: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """Pooled features of a video file before the classifier, averaged over views. As `predict`; float32 [D]."""

    def features(x: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(x), pre_logits=True).float()

    return _over_views(model, features, path, num_clips, num_crops, dtype)


def top_classes(model: EtMamba, scores: Tensor, k: int = 5) -> list[dict]:
    """The k best of `scores` [num_classes], best first, as {"label", "index", "score"}.

    Labels are those of `class_names`.
    """
    labels = class_names(model, len(scores))
    best = scores.topk(min(k, len(scores)))
    return [
        {"label": labels[i], "index": i, "score": score}
        for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def class_names(model: EtMamba, num_classes: int) -> list[str]:
    """`label_names` of the model's `pretrained_cfg`; unless there are so many, a class is called by its number."""
    names = model.pretrained_cfg.get("label_names") or ()
    return list(names) if len(names) == num_classes else [f"class {i}" for i in range(num_classes)]


def _over_views(
    model: EtMamba,
    function: Callable[[Tensor], Tensor],
    path: str | Path,
    num_clips: int,
    num_crops: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """The mean over views of `function`, which takes the crops of one clip [num_crops, C, T, H, W]."""
    if model.training or not model.global_pool:
        raise ValueError("the model must be in evaluation mode and pool its tokens: model.eval(), global_pool='token'")
    transform = EvalTransform.from_model(model, size=model.img_size)
    weight = model.cls_token
    autocast = torch.autocast(weight.device.type, dtype) if dtype else contextlib.nullcontext()
    video = VideoReader(path)
    results = []
    with torch.inference_mode(), autocast:
        for indices in fixed_clips(model.clip, video.info.num_frames, num_clips):
            views = transform(video.read(indices), num_crops)
            results.append(function(views.to(weight.device, weight.dtype)).cpu())
    mean = torch.cat(results).mean(0)
    if not mean.isfinite().all():
        raise ValueError(f"{path}: the result isn't finite; check the checkpoint, or use float32")
    return mean


def _from_source(name: str) -> torch.nn.Module:
    """The model of a Hub repository or a folder. Its config.json is checked first: timm trips over a damaged one."""
    kind, _, where = name.partition(":")
    if kind == "hf-hub":  # fetched here, as timm would wait half a minute for a Hub that can't be reached
        read_config(fetch(where, CONFIG_FILE).parent)
    elif kind == "local-dir" and read_config(where) is None:
        raise FileNotFoundError(f"{where} holds no {CONFIG_FILE}; name a folder that `etmamba convert` made")
    return timm.create_model(name, pretrained=True)
