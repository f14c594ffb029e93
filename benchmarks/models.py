"""Whole models on one clip, compared with their own matrix multiplications and other video models. See README.md.

python benchmarks/models.py [--dtype float32 bfloat16] [--threads 2] [--runs 5] [--only NAME ...]
"""

import argparse
import statistics
from functools import partial

import timm
import torch
from common import in_turn, spread, write
from torch.utils._python_dispatch import TorchDispatchMode

import etmamba_timm  # noqa: F401 (registers the models)

SHAPE = (1, 3, 16, 224, 224)


def ours(name: str, folded: bool):
    fold = {"folded": True} if folded else {}
    return lambda frames=16, **changes: timm.create_model(name, num_frames=frames, **fold, **changes)


def videomae(hidden: int, heads: int):
    def make(frames: int = 16, **changes):
        from transformers import VideoMAEConfig, VideoMAEForVideoClassification

        config = VideoMAEConfig(
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            num_labels=400,
            num_frames=frames,
            **changes,
        )
        return FramesFirst(VideoMAEForVideoClassification(config))

    return make


def timesformer(frames: int = 16, **changes):
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    return FramesFirst(
        TimesformerForVideoClassification(TimesformerConfig(num_labels=400, num_frames=frames, **changes))
    )


def torchvision_model(name: str):
    def make(frames: int = 16, **changes):
        from torchvision.models import get_model

        return get_model(name, weights=None, **changes)

    return make


class FramesFirst(torch.nn.Module):
    """transformers' video models take [B, T, C, H, W]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.transpose(1, 2)).logits


MODELS = {
    "etmamba_m, folded": ours("etmamba_m", True),
    "etmamba_m": ours("etmamba_m", False),
    "videomamba_m": ours("videomamba_m", False),
    "etmamba_s, folded": ours("etmamba_s", True),
    "etmamba_ti, folded": ours("etmamba_ti", True),
    "VideoMAE-S (transformers)": videomae(384, 6),
    "VideoMAE-B (transformers)": videomae(768, 12),
    "TimeSformer-B (transformers)": timesformer,
    "MViTv2-S (torchvision)": torchvision_model("mvit_v2_s"),
    "Swin3D-T (torchvision)": torchvision_model("swin3d_t"),
}


class Multiplications(TorchDispatchMode):
    """Records the operands' layouts of every matrix multiplication."""

    CALLS = tuple(getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"))

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.CALLS:
            self.calls.append((func, [(a.shape, a.stride(), a.dtype, a.device) for a in args]))
        return func(*args, **(kwargs or {}))

    def replay(self):
        """A function that repeats only these multiplications, on random numbers."""
        made = {}  # by place among the operands too: addmm_ must not write to what it reads
        for _, layouts in self.calls:
            for key in enumerate(layouts):
                if key not in made:
                    _, (shape, stride, dtype, device) = key
                    made[key] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
                    made[key].copy_(torch.randn(shape, device=device) * 0.02)
        ready = [(func, [made[key] for key in enumerate(layouts)]) for func, layouts in self.calls]

        def run():
            for func, operands in ready:
                func(*operands)

        return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for dtype in args.dtype:
        clip = torch.randn(SHAPE).to(getattr(torch, dtype))
        timed, products = {}, {}
        for name in args.only:
            model = MODELS[name]().eval().to(clip.dtype)
            timed[name] = partial(model, clip)
            if model.__class__.__module__.startswith("etmamba_timm"):
                with torch.no_grad(), Multiplications() as seen:  # inference mode wouldn't show them
                    model(clip)
                products[name] = f"{name}: its matrix multiplications alone"
                timed[products[name]] = seen.replay()
        with torch.inference_mode():
            seconds = in_turn(args.runs, **timed)
        baseline = seconds[args.only[0]]
        for name, values in seconds.items():
            row = {"model": name, "dtype": dtype, "clip": "×".join(map(str, SHAPE)), **spread(values)}
            row["times_first"] = ratio(values, baseline)
            if name in products:
                row["times_its_products"] = ratio(values, seconds[products[name]])
            rows.append(row)
            print(row)
    write("models", rows)


def ratio(values: list[float], others: list[float]) -> float:
    """The median of the ratios of neighbouring runs."""
    return round(statistics.median(v / o for v, o in zip(values, others, strict=True)), 2)


if __name__ == "__main__":
    main()
