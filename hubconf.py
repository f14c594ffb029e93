"""torch.hub entry points: the same builders that timm registers.

torch.hub.load("<owner>/<repo>", "etmamba_ti", num_classes=10)
torch.hub.load("<folder>", "etmamba_ti", source="local", num_classes=10)
"""

from etmamba_timm.models import (
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
