"""Arguments that several commands share, and what becomes of them."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..clip import Stride
    from ..data import EvalClips
    from ..models import EtMamba

DTYPES = ("float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser, views: bool = True, default: str | None = None) -> None:
    """A model and how it is to run, on how many views of a video if there is a choice; `default` is told, not set."""
    text = "a model's name, hf-hub:ORG/NAME or local-dir:FOLDER" + (f" (default {default})" if default else "")
    parser.add_argument("--model", required=default is None, help=text)
    parser.add_argument("--checkpoint", type=Path, help="its weights: .safetensors or .pth, ours or VideoMamba's")
    if views:
        parser.add_argument("--num-clips", type=positive, default=1, metavar="N", help="clips over a video (default 1)")
        parser.add_argument("--num-crops", type=int, choices=(1, 3), default=1, help="crops of a frame (default 1)")
    else:
        parser.set_defaults(num_clips=1, num_crops=1)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of autocast (default float32: none)")
    parser.add_argument("--allow-untrained", action="store_true", help="run a model without weights: a random result")


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """A dataset of videos."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder of the videos")
    layouts = "folders, list, kinetics, ssv2, hmdb51, breakfast or huggingface"  # data.LAYOUTS, without its imports
    parser.add_argument("--dataset", metavar="LAYOUT", help=layouts)
    parser.add_argument("--annotations", type=Path, metavar="DIR", help="the folder of the lists (default: DATA)")
    parser.add_argument("--split", type=positive, metavar="N", help="of HMDB-51 and Breakfast (default 1)")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="processes that decode (default 2)")


def eval_clips(args: argparse.Namespace, model: "EtMamba") -> "EvalClips":
    """The videos of the dataset that `add_dataset` and --subset name, as the model takes them, in its classes."""
    from ..data import EvalClips, EvalTransform, read_dataset, with_classes

    layout, split = args.dataset or "folders", args.split or 1
    annotations = read_dataset(layout, args.data, args.subset, split=split, annotations=args.annotations)
    names = model.pretrained_cfg.get("label_names") or ()
    if names and len(names) == model.num_classes:
        annotations = with_classes(annotations, names)
    elif model.num_classes not in (0, len(annotations.classes)):
        raise ValueError(
            f"the dataset has {len(annotations.classes)} classes, and the model {model.num_classes} without names"
        )
    transform = EvalTransform.from_model(model, size=model.img_size)
    return EvalClips(annotations, transform, model.clip, args.num_clips, args.num_crops)


def set_up(args: argparse.Namespace, need_classifier: bool) -> tuple:
    """The model on its device, and the options of `predict` and `extract_features`."""
    import torch

    from ..predict import load_model

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:  # for one that isn't there
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(
            f"device {device!r} can't be used here; use cpu, or cuda where there is one ({reason})"
        ) from None
    model = load_model(
        args.model, args.checkpoint, allow_untrained=args.allow_untrained, need_classifier=need_classifier
    )
    dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)
    return model.to(device), {"num_clips": args.num_clips, "num_crops": args.num_crops, "dtype": dtype}


def each(args: argparse.Namespace, work: Callable[[str], object], take: Callable) -> int:
    """Works through the files behind a progress bar; a bad file is reported and does not stop the others."""
    from tqdm import tqdm

    failed = 0
    with tqdm(args.files, unit="file", disable=None if len(args.files) > 1 else True) as bar:
        for file in bar:
            try:
                result = work(file)
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                failed += 1
                message = str(error) if str(error).startswith(file) else f"{file}: {error}"
                with bar.external_write_mode(file=sys.stderr):
                    print(f"etmamba: {message}", file=sys.stderr)
                if getattr(args, "json", False):
                    take(json.dumps({"file": file, "model": args.model, "error": message}))
                continue
            with bar.external_write_mode(file=sys.stdout):
                take(result)
    if failed and len(args.files) > 1:
        print(f"etmamba: {failed} of {len(args.files)} files failed", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports of what the extra brings."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("etmamba_timm"):
            raise
        raise ValueError(f"{error.name} isn't installed; pip install 'etmamba-timm[{name}]'") from error


def is_first_process() -> bool:
    """Whether this is the process that prints, of several."""
    return os.environ.get("RANK", "0") == "0"


def count(text: str) -> int:
    """A whole number, 0 among them."""
    return 0 if text == "0" else positive(text)


def stride(text: str) -> "Stride":
    """A whole number from 1, or 'spread'."""
    from ..clip import parse_stride

    try:
        return parse_stride(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 10000")
    return int(text)


def odd(text: str) -> int:
    """An odd whole number from 1."""
    if positive(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is even; give an odd number")
    return int(text)
