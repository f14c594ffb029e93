"""Features of many videos: decoding alone, the model alone, and `etmamba features` from end to end, on a CPU or a GPU.

python benchmarks/feed.py --data FOLDER           # its videos, at any depth
python benchmarks/feed.py --data FOLDER --device cuda --batch-size 32 --dtype bfloat16

All three take the same clips with random weights. The rate aimed at is 85% of the slower of decoding and model. The
features are compared with `extract_features`, one video after the other.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from common import write

from etmamba_timm.checkpoints.save import save_checkpoint
from etmamba_timm.data import EvalTransform, Views, read_ahead
from etmamba_timm.features import read_features
from etmamba_timm.predict import extract_features, load_model

SUFFIXES = (".mp4", ".avi", ".webm", ".mkv")


def decoding(views: Views, workers: int, batch_size: int) -> float:
    """Clips a second without a model."""
    start = time.perf_counter()
    for _, clip in read_ahead(views, range(len(views.files)), workers, batch_size):
        assert not isinstance(clip, Exception), clip
    return len(views.files) / (time.perf_counter() - start)


def model_alone(model: torch.nn.Module, views: Views, clips: int, batch_size: int, dtype: torch.dtype | None) -> float:
    """Clips a second of uint8 views that are on the device already."""
    device = next(model.parameters()).device
    pixels = torch.randint(256, (batch_size, *views.shape), dtype=torch.uint8, device=device)

    def run() -> None:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            model.forward_head(model.forward_features(views.transform.normalize(pixels)), pre_logits=True).cpu()

    run()
    batches = max(1, clips // batch_size)
    start = time.perf_counter()
    for _ in range(batches):
        run()
    return batches * batch_size / (time.perf_counter() - start)


def command(model: Path, files: list[Path], arguments: list[str], output: Path) -> tuple[float, float]:
    """Clips a second of `etmamba features`: without its start, from the first result on, and with it."""
    line = [sys.executable, "-m", "etmamba_timm", "features", *map(str, files), "--model", f"local-dir:{model}"]
    start = time.perf_counter()
    process = subprocess.Popen([*line, "-o", str(output), *arguments], stderr=subprocess.DEVNULL)
    partial, first, rows = output.with_name(output.name + ".partial"), 0.0, 0
    while process.poll() is None:
        if not first and partial.exists() and (rows := partial.read_bytes().count(b"\n") - 1) > 0:
            first = time.perf_counter()
        time.sleep(0.01)
    end = time.perf_counter()
    if process.returncode:
        raise RuntimeError(f"etmamba features failed with {process.returncode}")
    return (len(files) - rows) / (end - first), len(files) / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of videos")
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--model", default="etmamba_ti")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    found = sorted(path for path in args.data.rglob("*") if path.suffix in SUFFIXES)
    files = found[:: max(1, len(found) // args.videos)][: args.videos]
    dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        torch.manual_seed(0)
        save_checkpoint(timm.create_model(args.model, img_size=args.img_size), path, stride=2)
        model = load_model(f"local-dir:{path}", need_classifier=False).to(args.device)
        views = Views(files, EvalTransform.from_model(model, size=model.img_size), model.clip)
        arguments = ["--device", args.device, "--dtype", args.dtype, "--batch-size", str(args.batch_size)]
        arguments += ["--workers", str(args.workers)]
        rows = []
        for run in range(args.runs):  # in turn, so that drift affects all alike
            output = Path(folder) / f"{run}.safetensors"
            row = {
                "model": args.model,
                "img_size": args.img_size,
                "device": args.device,
                "dtype": args.dtype,
                "videos": len(files),
            }
            row |= {"batch_size": args.batch_size, "workers": args.workers, "load": round(os.getloadavg()[0], 2)}
            row["decoding"] = decoding(views, args.workers, args.batch_size)
            alone = [model_alone(model, views, len(files) // 4, args.batch_size, dtype)]
            row["features"], row["with_start"] = command(path, files, arguments, output)
            alone.append(model_alone(model, views, len(files) // 4, args.batch_size, dtype))
            row["model_alone"] = statistics.mean(alone)
            row["of_the_slower"] = row["features"] / min(row["decoding"], row["model_alone"])
            rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
            print(rows[-1], flush=True)
        features, names = read_features(output)
        assert names == list(map(str, files))
        some = range(0, len(files), max(1, len(files) // 20))
        one_by_one = torch.stack([extract_features(model, files[i], dtype=dtype) for i in some])
        apart = (features[list(some)] - one_by_one).abs().max() / one_by_one.abs().max()
        print(f"largest difference from one by one: {apart:.1e} of the largest feature")
    for row in rows:
        row["difference"] = f"{apart:.1e}"
    write("feed", rows)


if __name__ == "__main__":
    main()
