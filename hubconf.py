"""torch.hub entry points: the same builders that timm registers, and the transform that a model takes.

torch.hub.load("OWNER/etmamba_timm", "etmamba_ti", num_classes=10)
torch.hub.load("OWNER/etmamba_timm", "videomamba_m", pretrained=True)
torch.hub.load("OWNER/etmamba_timm", "eval_transform", "videomamba_m.k400_f8")
torch.hub.load("<folder>", "etmamba_ti", source="local", num_classes=10)
"""

from etmamba_timm import zoo as _zoo

dependencies = ["torch", "torchvision", "timm", "einops", "safetensors", "huggingface_hub"]
globals().update(_zoo.ENTRY_POINTS)  # torch.hub lists this module's functions


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
