"""The model zoo: timm's default_cfgs, and an entry point for each row of `VARIANTS`."""

from collections.abc import Callable

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._input import update_model_args

from .checkpoints.config import RUNTIME_ARGS
from .checkpoints.fetch import find_pretrained, registered_cfgs
from .models import VARIANTS, EtMamba


def _cfg() -> dict:
    return {
        "num_classes": 400,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({**registered_cfgs(_cfg(), tuple(VARIANTS))})  # a copy, as dict is invariant


def _create(
    variant: str, pretrained: bool, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs
) -> EtMamba:
    saved = kwargs.pop("pretrained_model_args", None) or {}  # from config.json; timm merges them into kwargs
    requested = {k: v for k, v in kwargs.items() if k not in saved or v != saved[k]}
    weights = find_pretrained(
        variant, pretrained, _cfg(), requested, saved, pretrained_cfg, pretrained_cfg_overlay, cache_dir
    )

    def build(**arguments) -> EtMamba:
        model = EtMamba(**arguments)
        weights.load_into(model)
        model.stride, model.is_multilabel = weights.stride, weights.is_multilabel
        known = weights.model_args | {k: v for k, v in requested.items() if k in arguments}
        update_model_args(model, **{k: v for k, v in known.items() if k not in RUNTIME_ARGS})
        return model

    # pretrained=False, since `build` loads the weights: timm's loader would read the file again and adapt them twice.
    return build_model_with_cfg(
        build,
        variant,
        pretrained=False,
        pretrained_cfg=weights.cfg,
        pretrained_cfg_overlay=weights.overlay,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        cache_dir=cache_dir,
        pretrained_model_args=weights.model_args,
        **{**VARIANTS[variant], **weights.model_args, **requested},
    )


_FAMILIES = {"etmamba": "ETMamba", "videomamba": "VideoMamba"}
_STEMS = {"stfp": "the STFP stem", "none": "no stem"}
_BLOCKS = {"stcm": "STCM blocks", "ebs": "EBS blocks", "bimamba": "VideoMamba's blocks"}
_DOCSTRING = """{title} with {stem} and {block}; width {embed_dim}, depth {depth}.

    Args:
        pretrained (bool): whether to load trained weights. Default False.
        num_classes (int): number of classes; 0 for no classifier. Default 400, or the checkpoint's.
        img_size (int or (int, int)): height and width of the position embeddings' grid, in pixels. Default 224.
        num_frames (int): length of the temporal position embedding, in frames. Default 16.
        in_chans (int): channels of a clip. Default 3.
        global_pool (str): 'token', 'avg', 'map' or ''. Default 'token'.
        drop_path_rate (float): stochastic depth. Default 0.1.
        Other arguments: see `etmamba_timm.models.EtMamba` and timm's `build_model_with_cfg`.

    Returns:
        A model that takes normalised clips [B, C, T, H, W] or images [B, C, H, W] and returns logits [B, num_classes].
    """


def _entry_point(name: str, row: dict) -> Callable[..., EtMamba]:
    def create(pretrained: bool = False, **kwargs) -> EtMamba:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    family, _, rest = name.partition("_")
    title = f"{_FAMILIES.get(family, family)}-{rest.partition('_')[0].title()}"
    create.__doc__ = _DOCSTRING.format(
        **{**row, "title": title, "stem": _STEMS[row["stem"]], "block": _BLOCKS[row["block"]]}
    )
    return register_model(create)


ENTRY_POINTS = {name: _entry_point(name, row) for name, row in VARIANTS.items()}
globals().update(ENTRY_POINTS)
__all__ = [*ENTRY_POINTS]
