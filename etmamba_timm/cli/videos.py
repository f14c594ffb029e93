"""`etmamba predict`, `features` and `teach`."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..words import number_of
from .options import (
    SHIPPED,
    add_batches,
    add_compile,
    add_dataset,
    add_model,
    add_views,
    autocast_dtype,
    batch_size,
    count,
    device,
    each,
    extra,
    from_first,
    is_first_process,
    positive,
    process_group,
    set_up,
    stride,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..clip import Clip
    from ..models import EtMamba


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the parsers of this module's commands."""
    predict = commands.add_parser("predict", help="classify the action in video files")
    predict.add_argument(
        "files", nargs="*", metavar="FILE", help="video files, or folders of frames (default: the package's sample)"
    )
    add_model(predict, default=SHIPPED)
    _add_feeding(predict)
    add_compile(predict)
    text = "what runs a file of `etmamba export`: onnxruntime, openvino or torch (default: by the file's suffix)"
    predict.add_argument("--runtime", choices=("onnxruntime", "openvino", "torch"), help=text)
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
    features.set_defaults(run=_features, made="features")

    teach = commands.add_parser(
        "teach", help="store a teacher's class probabilities of a dataset, for `train --teacher`"
    )
    teach.add_argument(
        "--model", required=True, metavar="TEACHER", help="a trained model, or a transformers folder or Hub id"
    )
    add_views(teach)
    teach.add_argument("--stride", type=stride, metavar="N", help="frames from one to the next, or spread")
    add_dataset(teach)
    teach.add_argument("--subset", default="train", help="train, val or test (default train)")
    add_batches(teach)
    teach.add_argument("-o", "--output", type=Path, required=True, metavar="PATH", help=text)
    teach.set_defaults(run=_teach, checkpoint=None, made="class probabilities")


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
    if not args.files:
        from ..checkpoints.manifest import sample_video

        args.files = [str(sample_video())]
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


def _features(args: argparse.Namespace) -> int:
    from ..features import check_features_path, checksum
    from ..predict import features_of_files

    check_features_path(args.output)
    inputs = [Path(file) for file in args.files] + ([args.checkpoint] if args.checkpoint else [])
    if args.output.exists() and any(path.exists() and path.samefile(args.output) for path in inputs):
        raise ValueError(f"{args.output}: is also an input; give another file for the features")
    with process_group(args):
        model, options = set_up(args, need_classifier=False)
        feeding = _feeding(args, model)
        run: Callable = partial(features_of_files, model, **options, **feeding)  # type: ignore[arg-type]  # all by name
        return _store(args, args.files, _settings(args, model.clip, checksum(model.state_dict().values())), run)


def _teach(args: argparse.Namespace) -> int:
    from ..clip import Clip
    from ..data import find_layout, read_dataset
    from ..features import check_features_path

    check_features_path(args.output)
    with extra("train"):
        from ..training.distill import video_name
        from ..training.teacher import load_teacher, scores_of_videos
    layout = args.dataset or find_layout(args.data, args.annotations)
    videos = read_dataset(layout, args.data, args.subset, split=args.split or 1, annotations=args.annotations)
    files = {video_name(file, args.data): file for file, _ in videos.samples}
    with process_group(args):
        teacher = load_teacher(args.model).to(device(args))
        if args.stride is not None:
            teacher.clip = Clip(teacher.clip.num_frames, args.stride)
        settings = _settings(args, teacher.clip, teacher.checksum()) | {"classes": json.dumps(teacher.classes)}
        size = args.batch_size or (1 if next(teacher.parameters()).device.type == "cpu" else 8)
        views = {"num_clips": args.num_clips, "num_crops": args.num_crops, "dtype": autocast_dtype(args)}

        def run(names: list[str]) -> Iterator:
            chosen = [files[name] for name in names]
            return scores_of_videos(teacher, chosen, **views, batch_size=size, workers=args.workers)

        return _store(args, list(files), settings, run)


def _store(args: argparse.Namespace, files: list[str], settings: dict[str, str], run: Callable) -> int:
    """Writes what `run` makes of the files to the output, and continues what is there; returns the exit status."""
    from ..features import FeatureFiles

    output: FeatureFiles | None = None

    def begin() -> list[str]:
        nonlocal output
        output = FeatureFiles(args.output, settings)
        return output.missing(files)

    todo = from_first(begin)  # the first process writes
    finished = False
    try:
        status = each(
            args,
            todo,
            run,
            lambda file, row: output.add(file, row),  # type: ignore[union-attr]  # only in the first process
        )
        finished = True
    finally:  # also on an interrupt
        if output is not None:
            output.close(files, finished)
            if done := len(files) - len(output.missing(files)):
                text = f"{args.made} of {done} of {number_of(len(files), 'file')}: {args.output}"
                print(text + ("" if finished else "; the same command continues"), file=sys.stderr)
    return status


def _settings(args: argparse.Namespace, clip: "Clip", weights: str) -> dict[str, str]:
    """All that the features depend on, apart from rounding."""
    return {
        "model": args.model,
        "checkpoint": str(args.checkpoint or ""),
        "weights": weights,
        "clip": f"{clip.num_frames} frames {clip.spacing}",
        "num_clips": str(args.num_clips),
        "num_crops": str(args.num_crops),
        "dtype": args.dtype,
    }
