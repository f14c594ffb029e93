"""`etmamba predict` and `features`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .options import add_compile, add_model, each, positive, set_up

if TYPE_CHECKING:
    from torch import Tensor

SHIPPED = "etmamba_ti.mocap"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the parsers of this module's commands."""
    predict = commands.add_parser("predict", help="classify the action in video files")
    predict.add_argument("files", nargs="*", metavar="FILE", help="video files (default: the package's sample)")
    add_model(predict, default=SHIPPED)
    add_compile(predict)
    predict.add_argument("--topk", type=positive, default=5, metavar="K", help="classes to print (default 5)")
    predict.add_argument("--json", action="store_true", help="print one JSON object per file, one per line")
    predict.set_defaults(run=_predict)

    features = commands.add_parser("features", help="extract features of video files")
    features.add_argument("files", nargs="+", metavar="FILE", help="video files")
    add_model(features)
    add_compile(features)
    features.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    features.set_defaults(run=_features)


def _predict(args: argparse.Namespace) -> int:
    from ..predict import predict, top_classes

    if args.model is None:
        if args.checkpoint is not None:
            raise ValueError("--checkpoint needs --model, the architecture of its weights")
        args.model = SHIPPED
        if args.files:
            text = f"{SHIPPED} only knows 20 actions of rendered characters; for real video, give --model"
            print(f"etmamba: {text}", file=sys.stderr)
    elif not args.files:
        raise ValueError("no video files are given; name some, or omit --model to run on the sample")
    args.files = args.files or [_sample()]
    model, options = set_up(args, need_classifier=True)

    def one(file: str) -> str:
        best = top_classes(model, predict(model, file, **options), args.topk)
        if args.json:
            return json.dumps({"file": file, "model": args.model, "predictions": best})
        return "\n".join([file, *(f"  {p['score']:7.2%}  {p['label']}" for p in best)])

    return each(args, one, lambda text: print(text, flush=True))


def _sample() -> str:
    """A video that the shipped checkpoint wasn't trained on, named after its action."""
    from ..checkpoints.manifest import weights_folder

    sample = next(weights_folder().glob("sample_*.mp4"), None)
    if sample is None:
        raise RuntimeError(f"no sample in {weights_folder()}; reinstall etmamba-timm, or give a video file")
    return str(sample)


def _features(args: argparse.Namespace) -> int:
    from ..files import check_file
    from ..predict import extract_features

    check_file(args.output, (".safetensors",), "features")
    inputs = [Path(file) for file in args.files] + ([args.checkpoint] if args.checkpoint else [])
    if args.output.exists() and any(path.exists() and path.samefile(args.output) for path in inputs):
        raise ValueError(f"{args.output}: is also an input; give another file for the features")
    model, options = set_up(args, need_classifier=False)
    done: list[tuple[str, Tensor]] = []
    try:
        return each(args, lambda file: (file, extract_features(model, file, **options)), done.append)
    finally:  # also on an interrupt
        if done:
            _write_features(args, done)
            print(f"features of {len(done)} of {len(args.files)} files: {args.output}", file=sys.stderr)


def _write_features(args: argparse.Namespace, features: "list[tuple[str, Tensor]]") -> None:
    """Writes 'features' [files, D], with the file names as metadata; completely or not at all."""
    import torch
    from safetensors.torch import save

    from ..files import whole_file

    files, rows = zip(*features, strict=True)
    metadata = {"files": json.dumps(files), "model": args.model, "checkpoint": str(args.checkpoint or "")}
    try:
        with whole_file(args.output) as draft:
            draft.write_bytes(save({"features": torch.stack(rows)}, metadata))
    except OSError as error:
        raise ValueError(f"{args.output}: can't be written ({error.strerror})") from error
