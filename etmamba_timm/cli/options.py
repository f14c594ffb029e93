"""Arguments that several commands share, and their handling."""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from ..words import number_of

if TYPE_CHECKING:
    import torch

    from ..clip import Stride
    from ..data import EvalClips
    from ..models import EtMamba

T = TypeVar("T")
SHIPPED = "etmamba_ti.mocap"
DTYPES = ("float32", "bfloat16", "float16")
SMALL_BATCH = 4  # clips; up to this many, --compile uses CUDA graphs


class ViewOptions(TypedDict):
    """Options of `predict` and `extract_features`."""

    num_clips: int
    num_crops: int
    dtype: "torch.dtype | None"


def add_model(parser: argparse.ArgumentParser, views: bool = True, default: str | None = None) -> None:
    """Adds arguments for a model and how to run it, with `views` also on how many views of a video.

    `default` is only shown in the help.
    """
    text = "a model's name, hf-hub:ORG/NAME or local-dir:FOLDER" + (f" (default {default})" if default else "")
    parser.add_argument("--model", required=default is None, help=text)
    parser.add_argument(
        "--checkpoint", type=Path, help="weights of the model: .safetensors or .pth, ours or VideoMamba's"
    )
    add_views(parser, views)
    parser.add_argument(
        "--allow-untrained", action="store_true", help="allow a model without trained weights; its results are random"
    )


def add_views(parser: argparse.ArgumentParser, views: bool = True) -> None:
    """Adds arguments for how to run a model, with `views` also on how many views of a video."""
    if views:
        parser.add_argument("--num-clips", type=positive, default=1, metavar="N", help="clips per video (default 1)")
        parser.add_argument("--num-crops", type=int, choices=(1, 3), default=1, help="crops per clip (default 1)")
    else:
        parser.set_defaults(num_clips=1, num_crops=1)
    add_device(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="autocast's dtype (default float32: no autocast)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda if available, else cpu)")


def add_compile(parser: argparse.ArgumentParser) -> None:
    """Adds --compile, for `set_up`."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="run the model through torch.compile: slow at the start, faster then (for many videos)",
    )


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Adds arguments for a dataset of videos."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder of the videos")
    # data.LAYOUTS without importing it
    layouts = "folders, list, kinetics, ssv2, hmdb51, breakfast, huggingface or unlabelled"
    parser.add_argument("--dataset", metavar="LAYOUT", help=f"layout of the dataset: {layouts} (default: found out)")
    parser.add_argument(
        "--annotations", type=Path, metavar="DIR", help="the folder of the annotation files (default: DATA)"
    )
    parser.add_argument("--split", type=positive, metavar="N", help="split of HMDB-51 or Breakfast (default 1)")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="decoding processes (default 2)")


def add_batches(parser: argparse.ArgumentParser) -> None:
    """Adds the argument for the batch size; see `batch_size`."""
    parser.add_argument(
        "--batch-size", type=positive, metavar="B", help="views per batch, of several videos (default 8; 1 on a CPU)"
    )


def batch_size(args: argparse.Namespace, model: "EtMamba") -> int:
    """The batch size chosen by the arguments; by default 1 on a CPU, where larger batches aren't faster, else 8."""
    return args.batch_size or (1 if model.cls_token.device.type == "cpu" else 8)


def eval_clips(args: argparse.Namespace, model: "EtMamba", of_model: bool = True) -> "EvalClips":
    """The dataset chosen by the arguments of `add_dataset` and --subset, in the model's clips.

    The classes are the model's, or, for `of_model=False`, the dataset's own.
    """
    from dataclasses import replace

    from ..data import SOURCES, EvalClips, EvalTransform, find_layout, read_dataset, with_classes
    from ..data.annotations import each

    layout, split = args.dataset or find_layout(args.data, args.annotations), args.split or 1
    subset = args.subset or ("test" if layout in SOURCES else "val")
    annotations = read_dataset(layout, args.data, subset, split=split, annotations=args.annotations)
    names = model.pretrained_cfg.get("label_names") or ()
    if not of_model:
        pass
    elif names and len(names) == model.num_classes:
        annotations = with_classes(annotations, names)
    elif model.num_classes not in (0, len(annotations.classes)):
        raise ValueError(
            f"the dataset has {number_of(len(annotations.classes), 'class')}, and the model {model.num_classes} "
            "without names; give a model with the dataset's classes, or with class names"
        )
    if of_model and annotations.is_multilabel and not model.is_multilabel:
        raise ValueError(
            "the videos have several labels, and the model's classes exclude each other; give another model"
        )
    if of_model and model.is_multilabel and not annotations.is_multilabel:
        annotations = replace(annotations, samples=[(file, each(label)) for file, label in annotations.samples])
    transform = EvalTransform.from_model(model, size=model.img_size)
    return EvalClips(annotations, transform, model.clip, args.num_clips, args.num_crops)


def check_device(device: str) -> None:
    """Raises ValueError unless the device can be used."""
    import torch

    try:
        torch.empty(0, device=device)
        if torch.device(device).type == "meta":
            raise RuntimeError("its tensors have no data")
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:  # as a missing device raises
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device {device!r} can't be used here ({reason}); use cpu, or cuda if available") from None


def set_up(args: argparse.Namespace, need_classifier: bool) -> "tuple[EtMamba, ViewOptions]":
    """Loads the model onto its device; returns it, and the options of `predict` and `extract_features`."""
    import torch

    from ..predict import load_model

    where = device(args)
    if Path(args.model).suffix in (".onnx", ".xml", ".pt2"):
        return _set_up_file(args, where, need_classifier)
    if getattr(args, "runtime", None):
        raise ValueError(f"--runtime is for a file of `etmamba export`, and {args.model} isn't one; omit it")
    model = load_model(
        args.model, args.checkpoint, allow_untrained=args.allow_untrained, need_classifier=need_classifier
    )
    model.to(where)
    if getattr(args, "compile", False):
        # CUDA graphs spare launches, which only small batches wait for. Each size of batch gets its own, and a run
        # overwrites the output of the one before: so the head, which makes a tensor of its own, is left out.
        is_small = batch_size(args, model) <= SMALL_BATCH
        mode = "reduce-overhead" if is_small and torch.device(where).type == "cuda" else None
        forward = torch.compile(model.forward_features, dynamic=True, mode=mode)
        model.forward_features = forward  # type: ignore[method-assign]
    return model, {"num_clips": args.num_clips, "num_crops": args.num_crops, "dtype": autocast_dtype(args)}


def _set_up_file(args: argparse.Namespace, where: str, need_classifier: bool) -> "tuple[EtMamba, ViewOptions]":
    """`set_up` for a file that `etmamba export` wrote."""
    from ..runtime import load_exported

    if not need_classifier:
        raise ValueError(f"{args.model} only gives class scores; name the model that it was exported from")
    if args.checkpoint or args.dtype != "float32" or getattr(args, "compile", False):
        raise ValueError(f"{args.model} has its own weights and dtype; omit --checkpoint, --dtype and --compile")
    if args.device and where != "cpu":
        raise ValueError(f"{args.model} runs on the CPU here; omit --device")
    model = load_exported(args.model, getattr(args, "runtime", None))
    return model, {"num_clips": args.num_clips, "num_crops": args.num_crops, "dtype": None}  # type: ignore[return-value]


def device(args: argparse.Namespace) -> str:
    """The device chosen by the arguments, if it can be used."""
    import torch

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    return name


def autocast_dtype(args: argparse.Namespace) -> "torch.dtype | None":
    """The dtype chosen by the arguments; None for no autocast."""
    import torch

    return None if args.dtype == "float32" else getattr(torch, args.dtype)


@contextlib.contextmanager
def process_group(args: argparse.Namespace) -> Iterator[None]:
    """Joins the processes of a launcher such as torchrun, if there are several. Each gets a GPU, if there are GPUs."""
    import torch
    import torch.distributed as dist

    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        yield
        return
    if args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    dist.init_process_group("gloo")  # for results, which are on the CPU
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns, or raises, in the first process of the group; it isn't called in the others."""
    import torch.distributed as dist

    from ..data.ahead import portable

    if not dist.is_initialized():
        return make()
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = make()
        except (ValueError, OSError, RuntimeError) as error:
            answer[1] = portable(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def each(args: argparse.Namespace, files: list[str], results: Callable[[list[str]], Iterator], take: Callable) -> int:
    """Processes files with a progress bar; a file that fails is reported, and the others go on.

    The processes of a group share the files; the first takes and reports all results.

    Args:
        args: `model` and perhaps `json`.
        files: the files.
        results: makes the result of each of some files, or the error that it failed with.
        take: receives each file and its result in order, and with --json each error.

    Returns: the exit status, 1 if a file failed.
    """
    from tqdm import tqdm

    failed = 0
    shown = len(files) > 1 and is_first_process()
    with tqdm(_in_order(files, results), total=len(files), unit="file", disable=None if shown else True) as bar:
        for file, result in zip(files, bar, strict=is_first_process()):
            if not isinstance(result, Exception):
                with bar.external_write_mode(file=sys.stdout):
                    take(file, result)
            elif isinstance(result, (ValueError, OSError, RuntimeError, MemoryError)):
                failed += 1
                message = in_options(str(result), args)
                message = message if message.startswith(file) else f"{file}: {message}"
                with bar.external_write_mode(file=sys.stderr):
                    print(f"etmamba: {message}", file=sys.stderr)
                if getattr(args, "json", False):
                    print(json.dumps({"file": file, "model": args.model, "error": message}), flush=True)
            else:
                raise result
    if failed and len(files) > 1:
        print(f"etmamba: {failed} of {number_of(len(files), 'file')} failed", file=sys.stderr)
    return 1 if failed else 0


def _in_order(files: list[str], results: Callable[[list[str]], Iterator]) -> Iterator:
    """The results of all processes of the group in the files' order, in the first process; nothing in the others."""
    import torch.distributed as dist

    from ..data.ahead import portable

    if not dist.is_initialized():
        yield from results(files)
        return
    rank, processes = dist.get_rank(), dist.get_world_size()
    own = results(files[rank::processes])
    for first in range(0, len(files), processes):
        result = next(own, None)
        parts: list = [None] * processes
        dist.gather_object(portable(result) if isinstance(result, Exception) else result, parts if rank == 0 else None)
        if rank == 0:
            yield from parts[: len(files) - first]


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a failed import in the block into a message that names the extra to install."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package == "etmamba_timm":
            raise
        raise ValueError(f"{package} isn't installed; pip install 'etmamba-timm[{name}]'") from error


def is_first_process() -> bool:
    """Whether this is the process that prints, among the processes of a launcher."""
    return os.environ.get("RANK", "0") == "0"


def in_options(message: str, args: argparse.Namespace) -> str:
    """An error's message in the words of the command line: `clip_seconds` becomes `--clip-seconds`.

    Names of one word stay: they may be ordinary words. So do names in quotes, paths and attributes.
    """
    if hasattr(args, "checkpoint"):
        message = message.replace("pretrained_cfg_overlay=dict(file=...)", "--checkpoint FILE")
    names = "|".join(name for name in vars(args) if "_" in name)
    name = re.compile(rf"(?<![\w./'\"-])({names})(?![\w/'\"]|\.\w)")
    return name.sub(lambda found: f"--{found[1].replace('_', '-')}", message) if names else message


def count(text: str) -> int:
    """Parses a whole number, 0 or more."""
    return 0 if text == "0" else positive(text)


def stride(text: str) -> "Stride":
    """Parses a whole number, 1 or more, or 'spread'."""
    from ..clip import parse_stride

    try:
        return parse_stride(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """Parses a whole number from 1 to 10,000."""
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number from 1 to 10000")
    return int(text)


def odd(text: str) -> int:
    """Parses an odd whole number from 1 to 10,000."""
    if positive(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is even; give an odd number")
    return int(text)
