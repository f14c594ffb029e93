"""torch.hub entry points: the same builders that timm registers, and the transform that a model takes.

torch.hub.load("<owner>/<repo>", "etmamba_ti", num_classes=10)
torch.hub.load("<owner>/<repo>", "videomamba_m", pretrained=True)
torch.hub.load("<owner>/<repo>", "eval_transform", "videomamba_m.k400_f8")
torch.hub.load("<folder>", "etmamba_ti", source="local", num_classes=10)
"""

from etmamba_timm.zoo import (
    etmamba_m,
    etmamba_m_ebs,
    etmamba_s,
    etmamba_s_ebs,
    etmamba_ti,
    etmamba_ti_ebs,
    videomamba_m,
    videomamba_m_stfp,
    videomamba_s,
    videomamba_s_stfp,
    videomamba_ti,
    videomamba_ti_stfp,
)

dependencies = ["torch", "torchvision", "timm", "einops", "safetensors", "huggingface_hub"]


def eval_transform(model, **overrides):
    """The transform for evaluation that goes with a model; `etmamba_timm.data.EvalTransform`. It needs PyAV.

    Args:
        model: one of these models, or a name that `timm.create_model` takes, with its tag: 'videomamba_m.k400_f8'.
        overrides: fields of the transform, such as size=(height, width) in pixels.

    Returns:
        A callable: uint8 frames [T, H, W, 3] -> normalised clips [num_crops, C, T, h, w].
    """
    import timm

    from etmamba_timm.data import EvalTransform

    if isinstance(model, str):
        model = timm.create_model(model, device="meta")
    return EvalTransform.from_model(model, **{"size": model.img_size, **overrides})
