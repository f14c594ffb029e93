"""The zoo: which variants there are, their timm configurations, and an entry point for each."""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .checkpoints.fetch import find_pretrained, registered_cfgs
from .models.etmamba import EtMamba
from .models.variants import VARIANTS


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


default_cfgs = generate_default_cfgs(registered_cfgs(_cfg(), tuple(VARIANTS)))


def _create(
    variant: str, pretrained: bool, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs
) -> EtMamba:
    weights = find_pretrained(variant, pretrained, _cfg(), pretrained_cfg, pretrained_cfg_overlay, cache_dir)
    kwargs.setdefault("pretrained_model_args", weights.model_args)
    model = build_model_with_cfg(
        EtMamba,
        variant,
        pretrained,
        pretrained_cfg=weights.cfg,
        pretrained_cfg_overlay=weights.overlay,
        pretrained_filter_fn=weights.filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        cache_dir=cache_dir,
        **{**VARIANTS[variant], **weights.model_args, **kwargs},
    )
    weights.describe(model, pretrained, kwargs)
    return model


_ARGUMENTS = """

    Args:
        pretrained: whether to load trained weights.
        num_classes (int): classes; 0 for none. Default 400.
        img_size (int or (int, int)): height and width that positions are made for, in pixels. Default 224.
        num_frames (int): frames that positions are made for. Default 16.
        in_chans (int): channels of a clip. Default 3.
        global_pool (str): 'token', 'avg' or ''. Default 'token'.
        drop_path_rate (float): stochastic depth. Default 0.1.
        Any other argument of `etmamba_timm.models.EtMamba`, or of timm's `build_model_with_cfg`.

    Returns:
        A model that takes normalised clips [B, C, T, H, W] or images [B, C, H, W] and returns logits [B, num_classes].
    """


def _entrypoint(fn):
    fn.__doc__ += _ARGUMENTS
    return register_model(fn)


@_entrypoint
def etmamba_ti(pretrained: bool = False, **kwargs) -> EtMamba:
    """ETMamba-Ti: STFP stem, STCM blocks; width 192, depth 24, 8.1 M parameters."""
    return _create("etmamba_ti", pretrained, **kwargs)


@_entrypoint
def etmamba_s(pretrained: bool = False, **kwargs) -> EtMamba:
    """ETMamba-S: STFP stem, STCM blocks; width 384, depth 24, 31 M parameters."""
    return _create("etmamba_s", pretrained, **kwargs)


@_entrypoint
def etmamba_m(pretrained: bool = False, **kwargs) -> EtMamba:
    """ETMamba-M, the paper's model: STFP stem, STCM blocks; width 576, depth 32, 91 M parameters."""
    return _create("etmamba_m", pretrained, **kwargs)


@_entrypoint
def etmamba_ti_ebs(pretrained: bool = False, **kwargs) -> EtMamba:
    """ETMamba-Ti without the local branch (ablation row c): STFP stem, EBS blocks; 6.0 M parameters."""
    return _create("etmamba_ti_ebs", pretrained, **kwargs)


@_entrypoint
def etmamba_s_ebs(pretrained: bool = False, **kwargs) -> EtMamba:
    """ETMamba-S without the local branch (ablation row c): STFP stem, EBS blocks; 23 M parameters."""
    return _create("etmamba_s_ebs", pretrained, **kwargs)


@_entrypoint
def etmamba_m_ebs(pretrained: bool = False, **kwargs) -> EtMamba:
    """ETMamba-M without the local branch (ablation row c): STFP stem, EBS blocks; 67 M parameters."""
    return _create("etmamba_m_ebs", pretrained, **kwargs)


@_entrypoint
def videomamba_ti(pretrained: bool = False, **kwargs) -> EtMamba:
    """VideoMamba-Ti (ablation row a): no stem, BiMamba blocks; width 192, depth 24, 7.0 M parameters."""
    return _create("videomamba_ti", pretrained, **kwargs)


@_entrypoint
def videomamba_s(pretrained: bool = False, **kwargs) -> EtMamba:
    """VideoMamba-S (ablation row a): no stem, BiMamba blocks; width 384, depth 24, 26 M parameters."""
    return _create("videomamba_s", pretrained, **kwargs)


@_entrypoint
def videomamba_m(pretrained: bool = False, **kwargs) -> EtMamba:
    """VideoMamba-M (ablation row a): no stem, BiMamba blocks; width 576, depth 32, 74 M parameters."""
    return _create("videomamba_m", pretrained, **kwargs)


@_entrypoint
def videomamba_ti_stfp(pretrained: bool = False, **kwargs) -> EtMamba:
    """VideoMamba-Ti behind the STFP stem (ablation row b): BiMamba blocks; 7.0 M parameters."""
    return _create("videomamba_ti_stfp", pretrained, **kwargs)


@_entrypoint
def videomamba_s_stfp(pretrained: bool = False, **kwargs) -> EtMamba:
    """VideoMamba-S behind the STFP stem (ablation row b): BiMamba blocks; 26 M parameters."""
    return _create("videomamba_s_stfp", pretrained, **kwargs)


@_entrypoint
def videomamba_m_stfp(pretrained: bool = False, **kwargs) -> EtMamba:
    """VideoMamba-M behind the STFP stem (ablation row b): BiMamba blocks; 74 M parameters."""
    return _create("videomamba_m_stfp", pretrained, **kwargs)
