"""From a video file to class scores or features.

model = load_model("videomamba_m", checkpoint="videomamba_m16_k400_f16_res224.pth")
scores = predict(model, "clip.mp4", num_clips=4, num_crops=3)
print(top_classes(model, scores))
"""

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.models import is_model_pretrained
from torch import Tensor

from .checkpoints import DownloadError, checkpoint_filter_fn, find_checkpoint, read_checkpoint
from .checkpoints.fetch import fetch
from .checkpoints.manifest import CONFIG_FILE
from .checkpoints.read import UNREADABLE, first_line
from .data import EvalTransform, Sampling, VideoReader
from .models import VARIANTS, EtMamba

_logger = logging.getLogger(__name__)

STRIDE = 2  # frames from one that is sampled to the next (paper 4.2)


class UntrainedError(RuntimeError):
    """There are no trained weights for what was asked: the result would be noise."""


def load_model(
    name: str, checkpoint: str | Path | None = None, *, allow_untrained: bool = False, need_classifier: bool = True
) -> EtMamba:
    """A model with trained weights, in evaluation mode.

    Args:
        name: what `timm.create_model` takes: 'etmamba_m', a name with a tag, 'hf-hub:org/name', 'local-dir:folder'.
        checkpoint: weights for that architecture, safetensors or .pth, ours or VideoMamba's. The numbers of classes,
            frames and channels and the picture size are read off it; class names are those of the name's tag.
        allow_untrained: whether a model without trained weights is made up at random instead of refused.
        need_classifier: whether the classifier must be trained too; not so for features.

    Raises:
        UntrainedError: there are no trained weights, or no trained classifier, or they are a mere starting point.
        ValueError: an unknown name, or a checkpoint of another architecture.
        FileNotFoundError: no such checkpoint.
    """
    is_source = ":" in name  # hf-hub:, local-dir:
    if not is_source and name.partition(".")[0] not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; `etmamba info` lists those there are")
    if checkpoint is not None:
        model, has_classifier = _from_checkpoint(name, Path(checkpoint))
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
    if not isinstance(model, EtMamba):
        raise ValueError(f"{name!r} holds a {type(model).__name__}, no video model of this package")
    if need_classifier and not has_classifier and not allow_untrained:
        raise UntrainedError(f"{checkpoint or name}: no trained classifier, so classes would be random; take features")
    return model.eval()


def predict(
    model: EtMamba, path: str | Path, *, num_clips: int = 1, num_crops: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """Class scores of a video file: softmax, averaged over views (clips × crops).

    Args:
        model: in evaluation mode, with a classifier. Clips of `model.num_frames` frames are sampled at the stride of
            its `clip_cfg`, else at 2.
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


def sampling_of(model: EtMamba) -> Sampling:
    """How the model's clips are sampled: its number of frames, at the stride of its `clip_cfg`, else at 2."""
    stride = getattr(model, "clip_cfg", {}).get("stride", STRIDE)
    return Sampling(model.num_frames, 0 if stride is None else stride)


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
        for indices in sampling_of(model).several(video.info.num_frames, num_clips):
            views = transform(video.read(indices), num_crops)
            results.append(function(views.to(weight.device, weight.dtype)).cpu())
    mean = torch.cat(results).mean(0)
    if not mean.isfinite().all():
        raise ValueError(f"{path}: the result isn't finite; check the checkpoint, or use float32")
    return mean


def _from_source(name: str) -> torch.nn.Module:
    kind, _, repo = name.partition(":")
    try:
        if kind == "hf-hub":
            fetch(repo, CONFIG_FILE)  # timm would wait half a minute for a Hub that can't be reached
        return timm.create_model(name, pretrained=True)
    except DownloadError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{name} can't be loaded: {first_line(error)}") from error


def _from_checkpoint(name: str, path: Path) -> tuple[EtMamba, bool]:
    """The model that a checkpoint's shapes ask for, and whether the checkpoint has its classifier."""
    state_dict = read_checkpoint(path)
    patch, head = state_dict.get("patch_embed.proj.weight"), state_dict.get("head.weight")
    positions, times = state_dict.get("pos_embed"), state_dict.get("temporal_pos_embedding")
    for t, ndim, needed in ((patch, 5, True), (positions, 3, True), (times, 3, False), (head, 2, False)):
        if (t is None and needed) or (t is not None and t.ndim != ndim):
            raise ValueError(f"{path} is no checkpoint of {name!r}: its patches, positions or classifier are missing")
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1:
        raise ValueError(
            f"{path} is made for a picture that isn't square, and its size isn't known: build the model by "
            "timm.create_model with its img_size, and load the weights into it"
        )
    model = timm.create_model(
        name,
        num_classes=0 if head is None else len(head),
        num_frames=1 if times is None else times.shape[1],  # without times: an image model
        in_chans=patch.shape[1],
        patch_size=patch.shape[-1],
        img_size=side * patch.shape[-1],
    )
    state_dict = checkpoint_filter_fn(state_dict, model)
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state_dict.keys()) or [k for k in own if own[k].shape != state_dict[k].shape]
    if wrong:
        raise ValueError(f"{path} is no checkpoint of {name!r}: {len(wrong)} weights differ, the first is {wrong[0]}")
    model.load_state_dict(state_dict)
    entry = find_checkpoint(name) if "." in name else None
    if "." not in name and VARIANTS[name]["block"] == "bimamba" and model.num_frames > 1:
        _logger.warning(
            "%s doesn't tell how its clips are sampled: they take frames %d apart. Of VideoMamba's own weights, which "
            "want them spread over the video, name the tag (`etmamba info %s` lists them)",
            path,
            STRIDE,
            name,
        )
    if entry and entry.is_classifier and entry.num_classes == model.num_classes:
        model.pretrained_cfg["label_names"] = entry.label_names(entry.config())
    return model, head is not None
