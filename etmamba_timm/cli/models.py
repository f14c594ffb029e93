"""`etmamba info`, `convert`, `publish` and `export`."""

import argparse
import json
import sys
from pathlib import Path

from .options import DTYPES, positive, stride

CHECKED = {"random": "random clips", "video": "the sample video"}  # by the names of `export_model`'s result


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the parsers of this module's commands."""
    info = commands.add_parser("info", help="list the models, or show one's parameters and multiply-adds")
    text = "a model's name, hf-hub:ORG/NAME, local-dir:FOLDER or an exported file (default: all models of the package)"
    info.add_argument("model", nargs="?", metavar="MODEL", help=text)
    info.add_argument("--checkpoint", type=Path, help="weights of the model: .safetensors or .pth")
    info.add_argument("--num-frames", type=positive, metavar="T", help="frames of the clip (default: the model's)")
    info.add_argument(
        "--img-size", type=positive, metavar="S", help="height and width of the clip, in pixels (default: the model's)"
    )
    info.add_argument(
        "--backends", action="store_true", help="show which scan backends run on this machine, and why others don't"
    )
    text = "show what a bug report needs: versions, devices, backends and settings"
    info.add_argument("--environment", action="store_true", help=text)
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    convert = commands.add_parser("convert", help="convert a checkpoint to a folder in the Hub's layout")
    convert.add_argument(
        "source", type=Path, metavar="SOURCE", help="a .pth or .safetensors file, ours or VideoMamba's"
    )
    convert.add_argument("folder", type=Path, metavar="OUT_DIR", help="the folder to create")
    convert.add_argument(
        "--tag", help="its name in the manifest (videomamba_m.k400_f8), for labels, licence and metrics"
    )
    convert.add_argument(
        "--num-frames", type=positive, metavar="T", help="resample temporal position embeddings to T frames"
    )
    convert.add_argument(
        "--img-size", type=positive, nargs="+", metavar="S", help="resample spatial position embeddings to this size"
    )
    convert.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: unchanged)")
    convert.add_argument(
        "--labels", type=Path, metavar="FILE", help="text file with the class names in order, one per line"
    )
    convert.add_argument(
        "--stride", type=stride, metavar="N", help="frames from one of a clip to the next, or 'spread' over the video"
    )
    convert.add_argument("--licence", help="such as Apache-2.0")
    convert.set_defaults(run=_convert)

    publish = commands.add_parser("publish", help="check a folder in the Hub's layout and upload it")
    publish.add_argument(
        "folder", type=Path, metavar="DIR", help="a folder written by `etmamba convert` or `etmamba train`"
    )
    publish.add_argument("repo", metavar="REPO", help="ORG/NAME on the Hub; created if it doesn't exist")
    publish.add_argument("--licence", help="such as Apache-2.0 (default: from config.json)")
    publish.add_argument(
        "--dry-run", action="store_true", help="check and show what would be uploaded, but don't upload"
    )
    publish.add_argument("--private", action="store_true", help="make a new repository private")
    publish.add_argument("--revision", metavar="BRANCH", help="an existing branch (default main)")
    publish.set_defaults(run=_publish)

    export = commands.add_parser("export", help="write a model as a file for ONNX, OpenVINO or PyTorch alone")
    export.add_argument("model", metavar="MODEL", help="a model's name, hf-hub:ORG/NAME or local-dir:FOLDER")
    export.add_argument("--checkpoint", type=Path, help="weights of the model: .safetensors or .pth")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".onnx, .xml or .pt2")
    export.add_argument(
        "--dtype",
        choices=("float32", "float16", "int8"),
        default="float32",
        help="of the weights; int8 quantises the linear layers (default float32)",
    )
    export.add_argument(
        "--from-frames", action="store_true", help="take uint8 frames [B, T, H, W, C], and normalise them in the file"
    )
    text = "a folder of videos that tell the range of int8's inputs (default: scale each as the model runs)"
    export.add_argument("--calibrate", type=Path, metavar="DIR", help=text)
    export.add_argument("--allow-untrained", action="store_true", help="allow a model without trained weights")
    export.set_defaults(run=_export)


def _info(args: argparse.Namespace) -> int:
    if args.environment:
        from ..environment import environment

        found = environment()
        print(json.dumps(found) if args.json else "\n".join(f"{name}: {value}" for name, value in found.items()))
        return 0
    if args.backends:
        from ..ops import scan_backends
        from ..ops.scan.selective_scan import preferred_backend

        backends = scan_backends()
        if args.json:
            print(json.dumps(backends))
        else:
            print("\n".join(f"{name:12}{reason or 'ready'}" for name, reason in backends.items()))
            print(
                "\nFastest first. The kernels of 'gpu' and 'cpu' also run the convolutions of STFP and of the blocks."
            )
            preferred = preferred_backend()
            now = f"ETMAMBA_SCAN={preferred} is" if preferred else "Set ETMAMBA_SCAN to a name to have it"
            print(f"{now} tried first in every scan that doesn't ask for a backend.")
            if preferred and backends[preferred]:
                print(f"It can't run here: {backends[preferred]}")
        return 0
    from ..models import VARIANTS
    from ..runtime import RUNTIMES

    if args.checkpoint and not args.model:
        raise ValueError("--checkpoint needs a MODEL, the architecture of its weights")
    if args.model and Path(args.model).suffix in RUNTIMES:
        return _info_of_file(args)
    rows = [_describe(name, args) for name in ([args.model] if args.model else VARIANTS)]
    if args.json:
        print(json.dumps(rows[0] if args.model else rows))
    elif args.model:
        print("\n".join(f"{key:18}{value}" for key, value in _readable(rows[0]).items()))
    else:
        print(f"{'model':20}{'params':>9}{'multiply-adds':>15}  weights")
        for row in rows:
            tags = [weights.partition(".")[2] for weights in row["weights"]]
            weights = ", ".join(tags[:3]) + (f" and {len(tags) - 3} more" if len(tags) > 3 else "") or "none"
            print(f"{row['model']:20}{row['params'] / 1e6:7.2f} M{row['total_macs'] / 1e9:13.1f} G  {weights}")
    return 0


def _info_of_file(args: argparse.Namespace) -> int:
    """Of a file of `etmamba export`, what it says of itself."""
    from ..checkpoints.read import variant_of
    from ..runtime import load_exported

    model = load_exported(args.model)
    about = model.about
    if args.json:
        print(json.dumps(about))
        return 0
    height, width = about["size"]
    takes = "RGB frames, uint8 [B, T, H, W, 3]" if about["input"] == "frames" else "normalised clips [B, C, T, H, W]"
    for name, value in {
        "model": f"{variant_of(about['architecture'])}, {about['dtype']}",
        "takes": takes,
        "clip C×T×H×W": f"{model.in_chans}×{model.num_frames}×{height}×{width}, frames {model.clip.spacing}",
        "mean, std": f"{about['mean']}, {about['std']}",
        "gives": f"logits [B, {model.num_classes}]",
        "classes": ", ".join(about["labels"]),
    }.items():
        print(f"{name:18}{value}")
    return 0


def _describe(name: str, args: argparse.Namespace) -> dict:
    import timm

    from ..models import count_cost
    from ..predict import model_without_weights

    model = model_without_weights(name, args.checkpoint)
    size = (args.img_size, args.img_size) if args.img_size else model.img_size
    if size[0] % model.patch_size or size[1] % model.patch_size:
        raise ValueError(f"--img-size is {args.img_size}; it must be a multiple of {model.patch_size}")
    frames = args.num_frames or model.num_frames
    cost = count_cost(model, frames, size)
    return {
        "model": name,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "clip": [model.in_chans, frames, *size],
        "sampling": model.clip.spacing,
        "classes": model.num_classes,
        "tokens": cost.tokens,
        "params": cost.params,
        "macs": cost.macs,
        "scan_macs": cost.scan_macs,
        "total_macs": cost.total_macs,
        "videomamba_macs": cost.videomamba_macs,
        "weights": [name] if ":" in name else timm.list_pretrained(name.partition(".")[0] + ".*"),
    }


def _readable(row: dict) -> dict:
    return {
        "model": row["model"],
        "width, depth": f"{row['embed_dim']}, {row['depth']}",
        "clip C×T×H×W": "×".join(map(str, row["clip"])) + f", frames {row['sampling']}",
        "classes": row["classes"],
        "tokens": row["tokens"],
        "parameters": f"{row['params'] / 1e6:.2f} M",
        "multiply-adds": f"{row['total_macs'] / 1e9:.1f} G, {row['scan_macs'] / 1e9:.1f} G of them in the scan",
        "  as VideoMamba": f"{row['videomamba_macs'] / 1e9:.1f} G, without the inner SSM: not the true cost",
        "weights": ("\n" + " " * 18).join(map(_summary, row["weights"])) or "none",
    }


def _summary(name: str) -> str:
    """A line about a checkpoint of the manifest."""
    from ..checkpoints import manifest
    from ..checkpoints.card import views

    if name not in manifest():
        return name
    entry = manifest()[name]
    if entry.status == "warm start":
        return f"{name}: a starting point, from {entry.started_from}"
    metrics = [f"{m['dataset']} {m['metric']} {m['value']} ({views(m)}, {m['whose']})" for m in entry.figures]
    return f"{name}: {', '.join(metrics) or 'no metrics'}"


def _convert(args: argparse.Namespace) -> int:
    import torch

    from ..checkpoints.convert import convert_checkpoint

    if args.img_size and len(args.img_size) > 2:
        raise ValueError(f"--img-size is {args.img_size}; give one number, or height and width")
    size = args.img_size and (args.img_size * 2)[:2]
    report = convert_checkpoint(
        args.source,
        args.folder,
        tag=args.tag,
        num_frames=args.num_frames,
        img_size=tuple(size) if size else None,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        label_names=_labels(args.labels) if args.labels else None,
        stride=args.stride,
        licence=args.licence,
    )
    print(report.text())
    print(f"written       {args.folder}")
    return 0


def _labels(file: Path) -> list[str]:
    """Reads class names, one per line; blank lines at the end are ignored."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} isn't UTF-8 ({error}); save it as UTF-8") from error
    if not names or not all(names):
        raise ValueError(f"{file} is empty or has a blank line between names; write one name per line")
    return names


def _publish(args: argparse.Namespace) -> int:
    from ..checkpoints.config import CONFIG_FILE, PROCESSOR_FILE
    from ..checkpoints.publish import check_folder, check_repo, publish

    check_repo(args.repo)
    folder = check_folder(args.folder, args.licence)
    if not args.dry_run:
        print(publish(folder, args.repo, private=args.private, revision=args.revision))
        return 0
    print(f"{args.repo}, {'private' if args.private else 'public'}, branch {args.revision or 'main'}: would get")
    print(f"  model.safetensors  {folder.size:,} bytes, sha256 {folder.sha256}")
    print(f"  {CONFIG_FILE}\n  {PROCESSOR_FILE}\n  README.md")
    print("left out: " + (", ".join(folder.left_out) or "nothing"))
    print("\nREADME.md:\n\n" + folder.card(args.repo))
    entry = json.dumps({f"{folder.config['architecture']}.TAG": folder.manifest_entry(args.repo)}, indent=2)
    print("entry for weights/manifest.json:\n\n" + entry)
    return 0


def _export(args: argparse.Namespace) -> int:
    from ..data.annotations import video_files
    from ..export import BOUNDS, check_target, export_model
    from ..predict import load_model

    check_target(args.output, args.dtype)
    if args.calibrate and args.dtype != "int8":
        raise ValueError(f"--calibrate is for --dtype int8, not {args.dtype}")
    videos = video_files(args.calibrate) if args.calibrate else []
    if args.calibrate and not videos:
        raise ValueError(f"--calibrate {args.calibrate}: no videos there")
    model = load_model(args.model, args.checkpoint, allow_untrained=args.allow_untrained)
    print(f"{args.output}: exporting and checking, which takes some minutes", file=sys.stderr, flush=True)
    options = {"dtype": args.dtype, "from_frames": args.from_frames, "calibration": videos}
    differences = export_model(model, args.output, **options)
    print(f"written       {args.output} ({args.output.stat().st_size / 1e6:.1f} MB)")
    for name, difference in differences.items():
        print(f"checked       on {CHECKED[name]}: logits differ from the model's by {difference:.1e} of the largest")
    if args.dtype not in BOUNDS:
        print(f"{args.dtype} has no limit: `etmamba eval --model {args.output}` tells its accuracy on your videos")
    return 0
