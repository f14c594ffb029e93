"""`etmamba predict` and `features`."""

import argparse
import json
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from .options import (
    add_batches,
    add_compile,
    add_model,
    batch_size,
    count,
    each,
    from_first,
    is_first_process,
    positive,
    process_group,
    set_up,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..models import EtMamba

SHIPPED = "etmamba_ti.mocap"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the parsers of this module's commands."""
    predict = commands.add_parser("predict", help="classify the action in video files")
    predict.add_argument(
        "files", nargs="*", metavar="FILE", help="video files, or folders of frames (default: the package's sample)"
    )
    add_model(predict, default=SHIPPED)
    _add_feeding(predict)
    add_compile(predict)
    predict.add_argument("--topk", type=positive, default=5, metavar="K", help="classes to print (default 5)")
    predict.add_argument("--json", action="store_true", help="print one JSON object per file, one per line")
    predict.set_defaults(run=_predict)

    features = commands.add_parser("features", help="extract features of video files")
    features.add_argument("files", nargs="+", metavar="FILE", help="video files, or folders of frames")
    add_model(features)
    _add_feeding(features)
    text = "a .safetensors file, or a folder (without a suffix) for one such file per 1000 videos"
    features.add_argument("-o", "--output", type=Path, required=True, metavar="PATH", help=text)
    add_compile(features)
    features.set_defaults(run=_features)


def _add_feeding(parser: argparse.ArgumentParser) -> None:
    add_batches(parser)
    text = "processes that decode ahead of the model (default 2, fewer for one or two files)"
    parser.add_argument("--workers", type=count, metavar="N", help=text)


def _feeding(args: argparse.Namespace, model: "EtMamba") -> dict[str, int]:
    """Arguments of `predict_files` and `features_of_files`. A process for a single file would only cost its start."""
    workers = min(2, len(args.files) - 1) if args.workers is None else args.workers
    return {"batch_size": batch_size(args, model), "workers": workers}


def _predict(args: argparse.Namespace) -> int:
    from ..predict import predict_files, top_classes

    if args.model is None:
        if args.checkpoint is not None:
            raise ValueError("--checkpoint needs --model, the architecture of its weights")
        args.model = SHIPPED
        if args.files and is_first_process():
            text = f"{SHIPPED} only knows 20 actions of rendered characters; for real video, give --model"
            print(f"etmamba: {text}", file=sys.stderr)
    elif not args.files:
        raise ValueError("no video files are given; name some, or omit --model to run on the sample")
    args.files = args.files or [_sample()]
    with process_group(args):
        model, options = set_up(args, need_classifier=True)
        feeding = _feeding(args, model)

        def show(file: str, scores: "Tensor") -> None:
            best = top_classes(model, scores, args.topk)
            if args.json:
                print(json.dumps({"file": file, "model": args.model, "predictions": best}), flush=True)
            else:
                print("\n".join([file, *(f"  {p['score']:7.2%}  {p['label']}" for p in best)]), flush=True)

        return each(args, args.files, lambda files: predict_files(model, files, **options, **feeding), show)


def _sample() -> str:
    """A video that the shipped checkpoint wasn't trained on, named after its action."""
    from ..checkpoints.manifest import weights_folder

    sample = next(weights_folder().glob("sample_*.mp4"), None)
    if sample is None:
        raise RuntimeError(f"no sample in {weights_folder()}; reinstall etmamba-timm, or give a video file")
    return str(sample)


def _features(args: argparse.Namespace) -> int:
    from ..features import FeatureFiles, check_features_path
    from ..predict import features_of_files

    check_features_path(args.output)
    inputs = [Path(file) for file in args.files] + ([args.checkpoint] if args.checkpoint else [])
    if args.output.exists() and any(path.exists() and path.samefile(args.output) for path in inputs):
        raise ValueError(f"{args.output}: is also an input; give another file for the features")
    with process_group(args):
        model, options = set_up(args, need_classifier=False)
        feeding = _feeding(args, model)
        output: FeatureFiles | None = None

        def begin() -> list[str]:
            nonlocal output
            output = FeatureFiles(args.output, _settings(args, model))
            return output.missing(args.files)

        todo = from_first(begin)  # the first process writes
        finished = False
        try:
            status = each(
                args,
                todo,
                lambda files: features_of_files(model, files, **options, **feeding),
                lambda file, row: output.add(file, row),  # type: ignore[union-attr]  # only in the first process
            )
            finished = True
        finally:  # also on an interrupt
            if output is not None:
                output.close(args.files, finished)
                if done := len(args.files) - len(output.missing(args.files)):
                    text = f"features of {done} of {len(args.files)} files: {args.output}"
                    print(text + ("" if finished else "; the same command continues"), file=sys.stderr)
        return status


def _settings(args: argparse.Namespace, model: "EtMamba") -> dict[str, str]:
    """All that the features depend on, apart from rounding."""
    import torch

    weights = 0
    for tensor in model.state_dict().values():
        weights = zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy(), weights)
    return {
        "model": args.model,
        "checkpoint": str(args.checkpoint or ""),
        "weights": f"crc32 {weights:08x}",
        "clip": f"{model.clip.num_frames} frames {model.clip.spacing}",
        "num_clips": str(args.num_clips),
        "num_crops": str(args.num_crops),
        "dtype": args.dtype,
    }
