"""Models of this package in transformers: its Auto classes, its video-classification pipeline, and its Trainer.

`import etmamba_timm` is enough: the module is imported with transformers, whichever of the two comes first.

pipe = transformers.pipeline("video-classification", model="FOLDER")   # written by etmamba train, convert or publish
print(pipe("clip.mp4"))
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import make_batched_videos

from .checkpoints.config import MODEL_TYPE, MULTILABEL
from .checkpoints.save import KEPT_IN_FLOAT32
from .clip import Clip
from .data import EvalTransform, fixed_clips, open_video
from .models import EtMamba
from .words import number_of

_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, by which transformers names them


class EtMambaConfig(PreTrainedConfig):
    """A config.json of this package, as transformers reads and writes it; timm reads what transformers writes.

    `num_labels`, `id2label` and `label2id` stand for its `num_classes` and `label_names`. Weights are loaded in float32
    unless `dtype` says otherwise, as by `timm.create_model`, however they are stored.

    Args:
        architecture: the registered name of the model.
        model_args: constructor arguments other than the variant's.
        pretrained_cfg: timm's cfg; None for the variant's own.
        clip: the clips it takes, as in config.json; None for an unknown stride.
    """

    model_type = MODEL_TYPE

    architecture: str = "etmamba_m"
    model_args: dict | None = None
    pretrained_cfg: dict | None = None
    clip: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        names, classes = kwargs.pop("label_names", None), kwargs.pop("num_classes", None)
        labels = kwargs.get("num_labels")
        if self.id2label is None and names and labels in (None, len(names)):
            self.id2label = dict(enumerate(names))
            self.label2id = {name: i for i, name in enumerate(names)}
        elif self.id2label is None and labels is None and classes is not None:
            kwargs["num_labels"] = classes
        if card := kwargs.pop("card", None):  # its figures aren't those of a model that is trained further
            kwargs["card"] = {"licence": card.get("licence")}
        self.model_args = dict(self.model_args or {})
        self.clip = self.clip or Clip(self.model_args.get("num_frames", 16)).to_config()
        if self.pretrained_cfg is None:
            cfg = get_pretrained_cfg(self.architecture)
            self.pretrained_cfg = cfg.to_dict(remove_source=True) if cfg else {}
        self.dtype = self.dtype or "float32"
        super().__post_init__(**kwargs)

    @property
    def num_frames(self) -> int:
        """Frames in a clip; the pipeline asks the processor for so many."""
        return Clip.from_config(self.clip or {}).num_frames

    @property
    def label_names(self) -> list[str] | None:
        """The classes' names, in order; None if they have none."""
        names = [name for _, name in sorted((self.id2label or {}).items(), key=lambda item: int(item[0]))]
        return names if names and names != [f"LABEL_{i}" for i in range(len(names))] else None

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json."""
        out = super().to_dict() | {"num_classes": self.num_labels}
        out["pretrained_cfg"] = (self.pretrained_cfg or {}) | {"num_classes": self.num_labels}
        if self.label_names:
            out["label_names"] = self.label_names
        return {key: value for key, value in out.items() if key not in ("id2label", "label2id")}

    def build(self) -> EtMamba:
        """A new model, without its weights."""
        cfg = (self.pretrained_cfg or {}) | {"label_names": self.label_names}
        model = timm.create_model(
            self.architecture, pretrained_cfg=cfg, num_classes=self.num_labels, **self.model_args or {}
        )
        assert isinstance(model, EtMamba)
        model.stride = Clip.from_config(self.clip or {}).stride
        model.is_multilabel = self.problem_type == MULTILABEL
        return model


class EtMambaForVideoClassification(PreTrainedModel):
    """A video classifier.

    Attributes:
        timm_model: the `EtMamba`; its weights have the same names in a folder as timm's.
    """

    config_class = EtMambaConfig
    base_model_prefix = "timm_model"
    main_input_name = "pixel_values"
    input_modalities = "video"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(self, config: EtMambaConfig) -> None:
        super().__init__(config)
        if not config.num_labels:
            raise ValueError(f"{config.architecture} has no classifier here; give num_labels=..., to train a new one")
        self._no_split_modules, self._keep_in_fp32_modules_strict = ["EtMamba"], list(KEPT_IN_FLOAT32)
        self.timm_model = config.build()
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits, and the loss where there are labels.

        Args:
            pixel_values: normalised clips [B, T, C, H, W], or views of videos [B, V, T, C, H, W].
            labels: [B], or what else the config's `problem_type` takes.

        Returns: logits [B, num_labels]. Those of several views are the logarithm of their mean probabilities.

        Raises:
            ValueError: pixel values of another shape.
        """
        shape, channels = tuple(pixel_values.shape), self.timm_model.in_chans
        if len(shape) not in (5, 6) or shape[-3] != channels:
            raise ValueError(
                f"pixel_values are {shape}; give clips [B, T, C, H, W] or views of videos [B, V, T, C, H, W] with "
                f"{number_of(channels, 'channel')}, as AutoVideoProcessor makes them (a pipeline needs it beside the "
                "model: processor.save_pretrained writes it)"
            )
        clips = pixel_values.to(self.device, self.dtype).flatten(0, -5)  # [B · V, T, C, H, W]
        logits = self.timm_model(clips.transpose(1, 2))
        if len(shape) == 6:
            views = logits.unflatten(0, shape[:2])
            if self.config.problem_type == MULTILABEL:  # p / (1 - p), with the mean sigmoid p
                logits = F.logsigmoid(views).logsumexp(1) - F.logsigmoid(-views).logsumexp(1)
            else:
                logits = views.log_softmax(-1).logsumexp(1) - math.log(shape[1])
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As of any model of transformers, but the classifier alone may be missing, or of another size.

        Raises:
            ValueError: other weights don't fit; transformers would make them up, or leave them out.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        wrong = {key for key in fresh if not key.startswith("timm_model.head.")} | info["unexpected_keys"]
        if wrong:
            raise ValueError(
                f"weights such as {min(wrong)} ({len(wrong)} in all) are missing, too many, or of another shape than "
                "config.json says. For other frames or another size, make another folder: timm.create_model("
                '"local-dir:FOLDER", pretrained=True, num_frames=..., img_size=...), and save_checkpoint'
            )
        return (model, info) if output_loading_info else model

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Also takes the names of a folder's weights: Trainer resumes from them."""
        prefix = self.base_model_prefix + "."
        named = {prefix + key.removeprefix(prefix): value for key, value in state_dict.items()}
        return super().load_state_dict(named, *args, **kwargs)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The model initialises itself. A classifier that isn't in the file is all that is left."""
        if module is self.timm_model.get_classifier():
            super()._init_weights(module)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        self.timm_model.set_grad_checkpointing(enable, every_n_layers)


class _Settings(TypedDict, total=False):
    """What a processor saves."""

    size: dict
    crop_pct: float
    resample: int
    image_mean: list
    image_std: list
    num_frames: int
    stride: int | str
    num_clips: int
    num_crops: int


class EtMambaVideoProcessor(BaseVideoProcessor):
    """Makes a model's input of videos: the frames, sizes and normalisation of `etmamba predict`.

    What its file doesn't say is the model's own, by config.json.

    Args:
        size: {"height", "width"} of a clip, in pixels.
        crop_pct: fraction of the resized frame's short side that a clip covers.
        resample: 0 (nearest), 2 (bilinear) or 3 (bicubic), as of Pillow.
        image_mean, image_std: one value per channel, for images in [0, 1].
        num_frames, stride: how a clip is sampled; see `etmamba_timm.clip.Clip`.
        num_clips: clips of a video, spread evenly over it; a single one is centred.
        num_crops: 1 (centre) or 3 (along the longer side).
    """

    valid_kwargs = _Settings  # type: ignore[assignment]  # of VideosKwargs, it takes few
    model_input_names = ["pixel_values"]  # noqa: RUF012
    size = {"height": 224, "width": 224}  # noqa: RUF012
    crop_pct = 1.0
    resample = 2
    image_mean = EvalTransform.mean
    image_std = EvalTransform.std
    num_frames = 16
    stride = 2
    num_clips = num_crops = 1

    def preprocess(
        self, videos: Any, num_frames: int | None = None, do_sample_frames: bool = True, return_tensors: str = "pt"
    ) -> BatchFeature:
        """Reads, samples, resizes, crops and normalises videos.

        Args:
            videos: one or a list of: a video file, a folder of frames, or decoded frames, uint8 [T, H, W, 3].
            num_frames: of a clip; None for the processor's own.
            do_sample_frames: whether clips are sampled; False if decoded frames are a clip already.
            return_tensors: 'pt' for PyTorch.

        Returns: `pixel_values`, float32 [B, T, C, H, W], or [B, num_clips · num_crops, T, C, H, W] for several views.

        Raises:
            VideoError: a file is missing, isn't a video, or can't be decoded.
            ValueError: frames of another kind, or an invalid setting.
        """
        if isinstance(videos, str | Path):
            videos = [videos]
        elif not (isinstance(videos, list | tuple) and all(isinstance(video, str | Path) for video in videos)):
            videos = make_batched_videos(videos)
        views = torch.stack([self._views(video, num_frames or self.num_frames, do_sample_frames) for video in videos])
        return BatchFeature({"pixel_values": views if views.shape[1] > 1 else views[:, 0]}, return_tensors)

    def _views(self, video: Any, num_frames: int, sample: bool) -> Tensor:
        """The views of a video: [V, T, C, H, W]."""
        read: Callable[[list[int]], Tensor]
        if str(video)[:8].startswith(("http://", "https://")):
            raise ValueError(f"{video} is an address; download the video, and give the file")
        if isinstance(video, str | Path):
            reader = open_video(Path(video))
            read, count = reader.read, reader.info.num_frames
        else:
            frames = torch.as_tensor(np.asarray(video))
            if frames.ndim == 4 and frames.shape[1] == 3 != frames.shape[-1]:
                frames = frames.permute(0, 2, 3, 1)  # [T, 3, H, W]
            read, count = (lambda numbers: frames[numbers]), len(frames)
        indices = fixed_clips(Clip(num_frames, self.stride), count, self.num_clips) if sample else [list(range(count))]
        transform = EvalTransform(
            (self.size["height"], self.size["width"]),
            tuple(self.image_mean),
            tuple(self.image_std),
            _RESAMPLE.get(self.resample, str(self.resample)),
            self.crop_pct,
        )
        return torch.cat([transform(read(clip), self.num_crops) for clip in indices]).transpose(1, 2)

    @classmethod
    def get_video_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings in the processor's file, and otherwise those of the model beside it."""
        stated, unused = super().get_video_processor_dict(pretrained_model_name_or_path, **kwargs)
        if not _Settings.__annotations__.keys() <= stated.keys():
            raw, _ = EtMambaConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            stated = _settings(EtMambaConfig(**raw)) | stated
        return stated, unused


def _settings(config: EtMambaConfig) -> dict[str, Any]:
    """A processor's settings for a model."""
    with torch.device("meta"):
        model = config.build()
    transform, clip = EvalTransform.from_model(model, size=model.img_size), model.clip.known()
    return {
        "size": dict(zip(("height", "width"), transform.size, strict=True)),
        "crop_pct": transform.crop_pct,
        "resample": next(number for number, name in _RESAMPLE.items() if name == transform.interpolation),
        "image_mean": transform.mean,
        "image_std": transform.std,
        "num_frames": clip.num_frames,
        "stride": clip.stride,
    }


AutoConfig.register(MODEL_TYPE, EtMambaConfig)
AutoModelForVideoClassification.register(EtMambaConfig, EtMambaForVideoClassification)
AutoVideoProcessor.register(EtMambaConfig, EtMambaVideoProcessor)
register_checkpoint_conversion_mapping(MODEL_TYPE, [PrefixChange(prefix_to_add="timm_model")])
