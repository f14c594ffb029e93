"""The whole models of gpu.py: inference, training steps, torch.compile, and what the device spends its time on."""

import re
from collections import Counter

import torch
from gpu_bench import Bench, Task
from models import MODELS, Multiplications, ours
from torch import nn
from torch.profiler import ProfilerActivity, profile
from training_step import step

ETMAMBA, VIDEOMAE = "etmamba_m, folded", "VideoMAE-B (transformers)"
INFERENCE = (
    *(ETMAMBA, VIDEOMAE, "videomamba_m", "etmamba_ti, folded", "etmamba_m", "VideoMAE-S (transformers)"),
    *("TimeSformer-B (transformers)", "MViTv2-S (torchvision)", "Swin3D-T (torchvision)"),
)
TRAINING = ("etmamba_m", VIDEOMAE, "videomamba_m", "etmamba_ti", "VideoMAE-S (transformers)")
BATCHES = (8, 1, 32)
# The kinds of kernels by their names, in any case: the first that fits counts.
KINDS = {
    "scan": r"^(etmamba_timm::)?(cpu_)?scan|selective_scan",
    "short convolution": r"^(etmamba_timm::)?short_conv",
    "local branch": r"^(etmamba_timm::)?local_conv",
    "STFP": r"^(etmamba_timm::)?(conv_norm_relu|depthwise)",
    "other convolutions": r"conv|cudnn|fprop|dgrad|wgrad",
    "products": r"gemm|gemv|nvjet|cutlass|splitk|cublas|addmm|\bb?mm\b",
    "norms": r"norm|gammabeta",
    "copies and joins": r"cop(y|ies)|\bcat\b|catarray|memcpy|memset|transpose|nchw|nhwc|flip|fill",
    "elementwise": r"elementwise|aten::(add|mul|silu|relu|gelu|exp|sum)",
}


def make(name: str, bench: Bench, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with random weights on the device; small if the bench is tiny.

    Raises: ModuleNotFoundError for a package that isn't installed.
    """
    changes: dict = {}
    if bench.tiny and "transformers" in name:
        changes = {"frames": 2, "num_hidden_layers": 1, "image_size": 32}
    elif bench.tiny and "mamba" in name:
        changes = {"frames": 2, "depth": 2, "img_size": 32, "embed_dim": 64}
    models = MODELS | {"etmamba_ti": ours("etmamba_ti", False)}
    with torch.device(bench.device):
        return models[name](**changes).to(bench.device, dtype)


def clips(name: str, batch: int, bench: Bench, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    frames, side = (2, 64 if "torchvision" in name else 32) if bench.tiny else (16, 224)
    return torch.randn(batch, 3, frames, side, side, device=bench.device).to(dtype)


def _missing(name: str, bench: Bench) -> str:
    """Why a model can't be made, or ''."""
    if bench.tiny and "MViT" in name:
        return "it takes no small clips"
    package = name.partition("(")[2].rstrip(")")
    return f"pip install {package}: it isn't installed" if bench.versions.get(package) == "" else ""


def _tasks(bench: Bench, names: tuple[str, ...], part: str, run, rank: int) -> list[Task]:
    """A task for each model that can be made, one rank earlier for ETMamba-M and VideoMAE-B."""
    tasks = []
    for name in names:
        if reason := _missing(name, bench):
            bench.leave_out(f"{part} {name}", reason)
            continue
        early = name in (names[0], VIDEOMAE)
        tasks.append(Task(rank - early, f"{part} {name}", lambda name=name: run(name)))
    return tasks


def model_tasks(bench: Bench) -> list[Task]:
    @torch.inference_mode()
    def run(name: str) -> None:
        model = make(name, bench, torch.bfloat16).eval()
        for batch in (2, 1) if bench.tiny else BATCHES:
            x = clips(name, batch, bench, torch.bfloat16)
            timed = bench.time(lambda x=x: model(x))
            note = f"{batch / timed['ms'] * 1e3:.3g} clips/s"
            if name == ETMAMBA:
                products = bench.time(_products(model, x), queued=True)
                timed |= {"floor_ms": products["ms"], "floor_of": "its products alone"}
            key = None if name == VIDEOMAE else (VIDEOMAE, f"batch {batch}", "bfloat16")
            bench.record(name, f"batch {batch}", "bfloat16", key, **timed, note=note)

    return _tasks(bench, INFERENCE, "inference of", run, 3)


def _products(model: nn.Module, x: torch.Tensor):
    """The model's matrix multiplications alone, that of the patch embedding included, as a call without arguments."""
    proj = model.patch_embed.proj
    with torch.inference_mode(False), torch.no_grad(), Multiplications() as seen:  # inference mode wouldn't show them
        model(x.clone())
    positions = x[:, 0].numel() // proj.weight[0, 0].numel()
    inside = proj.weight[0].numel()
    shapes = ((positions, inside), (inside, proj.out_channels))
    layouts = [(torch.Size(s), (s[1], 1), x.dtype, x.device) for s in shapes]
    seen.calls.append((torch.ops.aten.mm.default, layouts))
    return seen.replay()


def training_tasks(bench: Bench) -> list[Task]:
    def run(name: str) -> None:
        function = _step(name, bench)
        key = None if name == VIDEOMAE else (VIDEOMAE, _CASE.format(_batch(bench)), "bfloat16")
        timed = bench.time(function)
        bench.record(name, _CASE.format(_batch(bench)), "bfloat16", key, **timed, note="autocast, float32 weights")

    return _tasks(bench, TRAINING, "a training step of", run, 3)


def replayed_tasks(bench: Bench) -> list[Task]:
    def run(name: str) -> None:
        case = _CASE.format(_batch(bench))
        timed = bench.time(_step(name, bench, is_replayed=True))
        note = "both passes replayed as CUDA graphs"
        bench.record(f"{name}, replayed", case, "bfloat16", (name, case, "bfloat16"), **timed, note=note)

    return _tasks(bench, ("etmamba_m", "etmamba_ti"), "a replayed training step of", run, 4)


_CASE = "forward + backward, batch {}"


def _batch(bench: Bench) -> int:
    return 2 if bench.tiny else 8


def _step(name: str, bench: Bench, is_replayed: bool = False):
    model, x = make(name, bench).train(), clips(name, _batch(bench), bench)
    if is_replayed and bench.on_gpu:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            model = torch.cuda.make_graphed_callables(model, (x,), allow_unused_input=True)
    labels = torch.zeros(len(x), dtype=torch.long, device=bench.device)
    return lambda: step(model, x, labels, torch.bfloat16)


def profile_tasks(bench: Bench) -> list[Task]:
    @torch.inference_mode()
    def inference(batch: int) -> None:
        model, x = make(ETMAMBA, bench, torch.bfloat16).eval(), clips(ETMAMBA, batch, bench, torch.bfloat16)
        _profile(bench, ETMAMBA, f"inference, batch {batch}", lambda: model(x))

    def training() -> None:
        _profile(bench, "etmamba_m", f"training step, batch {_batch(bench)}", _step("etmamba_m", bench))

    eight = _batch(bench)
    return [  # last of all: what PyTorch's profiler leaves behind makes later launches slower
        Task(7, f"profile of {ETMAMBA}, batch {eight}", lambda: inference(eight)),
        Task(7, f"profile of {ETMAMBA}, batch 1", lambda: inference(1)),
        Task(7, "profile of a training step of etmamba_m", training),
    ]


def kind_of(name: str) -> str:
    """The kind of a kernel (of an operator, in a rehearsal) by its name."""
    return next((kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE)), "other")


def _profile(bench: Bench, what: str, case: str, function) -> None:
    """Rows of the time and the number of kernels of each kind in one call; of operators, in a rehearsal."""
    function()
    bench.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    with profile(activities=activities) as profiled:
        function()
        bench.synchronize()
    ms: Counter[str] = Counter()
    count: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for event in profiled.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device != bench.on_gpu or getattr(event, "is_user_annotation", False):
            continue
        kind, spent = (
            kind_of(event.key),
            (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e3,
        )
        ms[kind] += spent
        count[kind] += event.count
        if kind == "other":
            others[event.key[:60]] += spent
    unit = "kernels" if bench.on_gpu else "operators"
    bench.record(what, f"{case}, all", "bfloat16", ms=sum(ms.values()), note=f"{sum(count.values())} {unit}")
    for kind, spent in ms.most_common():
        names = ", ".join(f"{name} {t:.3g} ms" for name, t in others.most_common(4)) if kind == "other" else ""
        note = "; ".join(filter(None, (f"{count[kind]} {unit}", names)))
        bench.record(what, f"{case}, {kind}", "bfloat16", (what, f"{case}, all", "bfloat16"), ms=spent, note=note)


def compiled_tasks(bench: Bench) -> list[Task]:
    @torch.inference_mode()
    def run(name: str) -> None:
        model = make(name, bench, torch.bfloat16).eval()
        for batch, mode in ((_batch(bench), "default"), (1, "reduce-overhead")):
            x = clips(name, batch, bench, torch.bfloat16)
            how = {"mode": mode} if bench.on_gpu else {"backend": "eager"}
            compiled = torch.compile(model, dynamic=False, **how)
            case, what = f"batch {batch}", f"{{}}, compiled, {mode}"
            key = None if name == VIDEOMAE else (what.format(VIDEOMAE), case, "bfloat16")
            timed = bench.time(lambda x=x, compiled=compiled: compiled(x))
            bench.record(what.format(name), case, "bfloat16", key, **timed)

    return _tasks(bench, (ETMAMBA, VIDEOMAE), "compiled", run, 6)
