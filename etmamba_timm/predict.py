"""From a video file to class scores or features.

model = load_model("videomamba_m", checkpoint="videomamba_m16_k400_f16_res224.pth")
scores = predict(model, "clip.mp4", num_clips=4, num_crops=3)
print(top_classes(model, scores))
"""

import contextlib
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.models import is_model_pretrained, load_state_dict
from torch import Tensor

from .data import EvalTransform, VideoReader, sample_clips
from .models import VARIANTS, EtMamba, checkpoint_filter_fn
from .models.convert import from_videomamba

# What reading a file of any content may raise.
_UNREADABLE = (
    *(OSError, EOFError, LookupError, AttributeError, TypeError, ValueError, RuntimeError),
    *(pickle.UnpicklingError, SafetensorError),
)

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
            frames and channels and the picture size are read off it.
        allow_untrained: whether a model without trained weights is made up at random instead of refused.
        need_classifier: whether the classifier must be trained too; not so for features.

    Raises:
        UntrainedError: there are no trained weights, or no trained classifier.
        ValueError: an unknown name, or a checkpoint of another architecture.
        FileNotFoundError: no such checkpoint.
    """
    is_source = ":" in name  # hf-hub:, local-dir:
    if not is_source and name.partition(".")[0] not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; `etmamba info` lists those there are")
    if checkpoint is not None:
        model, has_classifier = _from_checkpoint(name, Path(checkpoint))
    else:
        trained = is_source or is_model_pretrained(name)
        if not trained and not allow_untrained:
            raise UntrainedError(
                f"{name!r} has no trained weights, so its results would be random. Give a checkpoint, or a model that "
                "has weights (hf-hub:ORG/NAME, local-dir:FOLDER); or allow an untrained one"
            )
        if not trained:
            _logger.warning("%s has no trained weights: its results are random", name)
        model = _from_source(name) if is_source else timm.create_model(name, pretrained=trained)
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
        model: in evaluation mode, with a classifier. Clips of `model.num_frames` frames are sampled at stride 2.
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

    Labels are `label_names` of the model's `pretrained_cfg`; without them a class is called by its number.
    """
    labels = model.pretrained_cfg.get("label_names") or ()
    best = scores.topk(min(k, len(scores)))
    return [
        {"label": labels[i] if i < len(labels) else f"class {i}", "index": i, "score": score}
        for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


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
        for indices in sample_clips(video.info.num_frames, model.num_frames, STRIDE, num_clips):
            views = transform(video.read(indices), num_crops)
            results.append(function(views.to(weight.device, weight.dtype)).cpu())
    mean = torch.cat(results).mean(0)
    if not mean.isfinite().all():
        raise ValueError(f"{path}: the result isn't finite; check the checkpoint, or use float32")
    return mean


def _from_source(name: str) -> torch.nn.Module:
    try:
        return timm.create_model(name, pretrained=True)
    except _UNREADABLE as error:
        raise ValueError(f"{name} can't be loaded: {_first_line(error)}") from error


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        state_dict = from_videomamba(load_state_dict(str(path), weights_only=True))
    except _UNREADABLE as error:
        reason = "it is damaged, or no file of weights"
        raise ValueError(f"{path} can't be read as a checkpoint: {reason} ({_first_line(error)})") from error
    if not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state_dict.items()):
        raise ValueError(f"{path} is no checkpoint: it holds other things than named tensors")
    return state_dict


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _from_checkpoint(name: str, path: Path) -> tuple[EtMamba, bool]:
    """The model that a checkpoint's shapes ask for, and whether the checkpoint has its classifier."""
    state_dict = _read_checkpoint(path)
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
    return model, head is not None
