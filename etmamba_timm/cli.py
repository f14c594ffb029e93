"""The `etmamba` command: arguments and printing; the work is done by the modules it calls."""

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 if a file or more failed, 2 if nothing could be done."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    args = _parser().parse_args(argv)
    if sys.stdout is None:
        print("etmamba: standard output is closed", file=sys.stderr)
        return 2
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("etmamba: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `etmamba … | head`
        _drop_stdout()
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"etmamba: {error}", file=sys.stderr)
        if isinstance(error, OSError):
            _drop_stdout()
        return 2


def _drop_stdout() -> None:
    """What is still to be written to standard output goes nowhere, without a complaint when Python exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="etmamba", description="ETMamba and VideoMamba on video files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", help="name the action in video files")
    _add_model_and_files(predict)
    predict.add_argument("--topk", type=_positive, default=5, metavar="K", help="classes to print (default 5)")
    predict.add_argument("--json", action="store_true", help="print one JSON object a file, each on a line")
    predict.set_defaults(run=_predict)

    features = commands.add_parser("features", help="write features of video files")
    _add_model_and_files(features)
    features.add_argument("-o", "--output", type=Path, required=True, help="a .safetensors file")
    features.set_defaults(run=_features)

    train = commands.add_parser("train", help="train a model on a dataset of videos, or go on with it")
    train.add_argument("--recipe", default="k400", metavar="NAME", help="k400, ssv2, hmdb51, breakfast, or a YAML file")
    train.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings other than the recipe's")
    _add_dataset(train)
    train.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the run's folder")
    train.add_argument(
        "--save-updates", type=_positive, default=500, metavar="N", help="save the state every N updates"
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="measure a model's accuracy on a dataset of videos")
    _add_model(evaluate)
    _add_dataset(evaluate)
    evaluate.add_argument("--subset", default="val", help="train, val or test (default val)")
    evaluate.add_argument("--batch-size", type=_positive, default=8, metavar="B", help="clips at a time (default 8)")
    evaluate.add_argument("--scores", type=Path, metavar="FILE", help="write all scores, as safetensors")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_evaluate)

    info = commands.add_parser("info", help="list the models, or tell one's parameters and multiply-adds")
    info.add_argument("model", nargs="?", help="a model's name")
    info.add_argument("--num-frames", type=_positive, metavar="T", help="frames of the clip that is counted")
    info.add_argument("--img-size", type=_positive, metavar="S", help="its height and width, in pixels")
    info.add_argument("--backends", action="store_true", help="tell which scans this machine can run, and why not")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    convert = commands.add_parser("convert", help="make a folder in the Hub's layout of a checkpoint")
    convert.add_argument("source", type=Path, metavar="SOURCE", help="VideoMamba's .pth, one of training, safetensors")
    convert.add_argument("folder", type=Path, metavar="OUT_DIR", help="a new folder")
    convert.add_argument("--tag", help="what the manifest calls it (videomamba_m.k400_f8): labels, licence, figures")
    convert.add_argument("--num-frames", type=_positive, metavar="T", help="resample the temporal positions")
    convert.add_argument("--img-size", type=_positive, nargs="+", metavar="S", help="resample the spatial positions")
    convert.add_argument("--dtype", choices=DTYPES, help="of the stored weights (default: their own, float32)")
    convert.add_argument("--labels", type=Path, metavar="FILE", help="the classes' names, one a line, in order")
    convert.add_argument("--stride", type=_positive, metavar="N", help="frames from one of a clip to the next")
    convert.add_argument("--licence", help="e.g. Apache-2.0")
    convert.set_defaults(run=_convert)

    publish = commands.add_parser("publish", help="check a folder in the Hub's layout, and upload it")
    publish.add_argument("folder", type=Path, metavar="DIR", help="a folder that `etmamba convert` made")
    publish.add_argument("repo", metavar="REPO", help="ORG/NAME on the Hub; made if it isn't there")
    publish.add_argument("--dry-run", action="store_true", help="check, show everything, upload nothing")
    publish.add_argument("--private", action="store_true", help="make a new repository private")
    publish.add_argument("--revision", metavar="BRANCH", help="a branch that is there (default main)")
    publish.set_defaults(run=_publish)
    return parser


def _add_model_and_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="video files")
    _add_model(parser)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder of the videos")
    parser.add_argument("--dataset", metavar="LAYOUT", help="folders, list, kinetics, ssv2, hmdb51 or breakfast")
    parser.add_argument("--annotations", type=Path, metavar="DIR", help="the folder of the lists (default: DATA)")
    parser.add_argument("--split", type=_positive, metavar="N", help="of HMDB-51 and Breakfast (default 1)")
    parser.add_argument("--workers", type=_count, default=2, metavar="N", help="processes that decode (default 2)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a model's name, hf-hub:ORG/NAME or local-dir:FOLDER")
    parser.add_argument("--checkpoint", type=Path, help="its weights: .safetensors or .pth, ours or VideoMamba's")
    parser.add_argument("--num-clips", type=_positive, default=1, metavar="N", help="clips over a video (default 1)")
    parser.add_argument("--num-crops", type=int, choices=(1, 3), default=1, help="crops of a frame (default 1)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of autocast (default float32: none)")
    parser.add_argument("--allow-untrained", action="store_true", help="run a model without weights: a random result")


def _predict(args: argparse.Namespace) -> int:
    from .predict import predict, top_classes

    model, options = _set_up(args, need_classifier=True)

    def one(file: str) -> str:
        best = top_classes(model, predict(model, file, **options), args.topk)
        if args.json:
            return json.dumps({"file": file, "model": args.model, "predictions": best})
        return "\n".join([file, *(f"  {p['score']:7.2%}  {p['label']}" for p in best)])

    return _each(args, one, lambda text: print(text, flush=True))


def _features(args: argparse.Namespace) -> int:
    from .predict import extract_features

    if args.output.suffix != ".safetensors":
        raise ValueError(f"{args.output}: features are written as safetensors; give a name that ends in .safetensors")
    args.output = args.output.resolve()  # writes through a link
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: no such folder; make it first")
    if args.output.is_dir():
        raise ValueError(f"{args.output}: is a folder; name a file in it")
    inputs = [Path(file) for file in args.files] + ([args.checkpoint] if args.checkpoint else [])
    if args.output.exists() and any(path.exists() and path.samefile(args.output) for path in inputs):
        raise ValueError(f"{args.output}: is an input; name another file for the features")
    try:
        drafts = tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".etmamba-")
    except OSError as error:
        raise ValueError(f"{args.output}: can't be written ({error.strerror}); choose another folder") from error
    with drafts as folder:
        model, options = _set_up(args, need_classifier=False)
        done = []
        try:
            return _each(args, lambda file: (file, extract_features(model, file, **options)), done.append)
        finally:  # also when it is interrupted
            if done:
                _write_features(args, done, Path(folder) / args.output.name)
                print(f"features of {len(done)} of {len(args.files)} files: {args.output}", file=sys.stderr)


def _write_features(args: argparse.Namespace, features: list[tuple], draft: Path) -> None:
    """Writes 'features' [files, D], and the files' names in the metadata; whole or not at all."""
    import torch
    from safetensors.torch import save

    files, rows = zip(*features, strict=True)
    metadata = {"files": json.dumps(files), "model": args.model, "checkpoint": str(args.checkpoint or "")}
    try:
        draft.write_bytes(save({"features": torch.stack(rows)}, metadata))
        os.replace(draft, args.output)
    except OSError as error:
        raise ValueError(f"{args.output}: can't be written ({error.strerror})") from error


def _set_up(args: argparse.Namespace, need_classifier: bool) -> tuple:
    """The model on its device, and the options of `predict` and `extract_features`."""
    import torch

    from .predict import load_model

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


def _each(args: argparse.Namespace, work: Callable[[str], object], take: Callable) -> int:
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


def _train(args: argparse.Namespace) -> int:
    from .data import read_dataset

    with _extra("train"):
        from .recipe import load_recipe, parse_overrides
        from .train import train
    given = {"dataset": args.dataset, "split": args.split}
    settings = parse_overrides(args.set) | {name: value for name, value in given.items() if value is not None}
    recipe = load_recipe(args.recipe, **settings)
    parts = [
        read_dataset(recipe.dataset, args.data, subset, split=recipe.split, annotations=args.annotations)
        for subset in ("train", "val")
    ]
    if _is_first_process():
        logging.getLogger(__package__).setLevel(logging.INFO)
    figures = train(
        recipe, *parts, args.output, workers=args.workers, save_updates=args.save_updates, progress=sys.stderr.isatty()
    )
    if _is_first_process():
        print(_accuracies(figures))
        print(f"model: {args.output / 'model'}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from .data import EvalClips, EvalTransform, read_dataset, with_classes
    from .evaluate import evaluate
    from .predict import sampling_of

    layout, split = args.dataset or "folders", args.split or 1
    annotations = read_dataset(layout, args.data, args.subset, split=split, annotations=args.annotations)
    if args.scores is not None and not args.scores.resolve().parent.is_dir():
        raise ValueError(f"{args.scores.parent}: no such folder; make it first")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:  # started by torchrun or `accelerate launch`
        if args.device is None and torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        dist.init_process_group("nccl" if (args.device or "cpu").startswith("cuda") else "gloo")
    try:
        model, options = _set_up(args, need_classifier=True)
        names = model.pretrained_cfg.get("label_names") or ()
        if len(names) == model.num_classes:
            annotations = with_classes(annotations, names)
        elif len(annotations.classes) != model.num_classes:
            raise ValueError(
                f"the dataset has {len(annotations.classes)} classes, and the model {model.num_classes} without names"
            )
        transform = EvalTransform.from_model(model, size=model.img_size)
        clips = EvalClips(annotations, transform, sampling_of(model), options["num_clips"], options["num_crops"])
        scores = evaluate(
            model, clips, batch_size=args.batch_size, workers=args.workers, dtype=options["dtype"], progress=True
        )
    finally:
        if processes > 1:
            dist.destroy_process_group()
    if not _is_first_process():
        return 0
    if args.scores is not None:
        scores.save(args.scores)
    figures, each = scores.figures(), dict(zip(scores.classes, scores.per_class(), strict=True))
    if args.json:
        print(json.dumps(figures | {"per_class": each}))
        return 0
    width = max(map(len, each))
    for name, accuracy in each.items():
        print(f"{name:{width}}  " + ("no videos" if accuracy is None else f"{accuracy:7.2%}"))
    print(_accuracies(figures))
    return 0


def _accuracies(figures: dict) -> str:
    text = f"top-1 {figures['top1']:.2%}, top-5 {figures['top5']:.2%}, mean of classes {figures['mean_class']:.2%}, "
    text += f"{figures['videos']} videos"
    left_out = [f"{figures[name]} {name}" for name in ("failed", "missing") if figures[name]]
    return text + (f" ({', '.join(left_out)}, not counted)" if left_out else "")


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Imports of what the extra brings."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith(__package__):
            raise
        raise ValueError(f"{error.name} isn't installed; pip install 'etmamba-timm[{name}]'") from error


def _info(args: argparse.Namespace) -> int:
    if args.backends:
        from .ops import scan_backends

        backends = scan_backends()
        if args.json:
            print(json.dumps(backends))
        else:
            print("\n".join(f"{name:12}{reason or 'ready'}" for name, reason in backends.items()))
        return 0
    from .models import VARIANTS

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


def _convert(args: argparse.Namespace) -> int:
    import torch

    from .conversion import convert_checkpoint

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
        label_names=args.labels.read_text(encoding="utf-8").splitlines() if args.labels else None,
        stride=args.stride,
        licence=args.licence,
    )
    print(report.text())
    print(f"written       {args.folder}")
    return 0


def _publish(args: argparse.Namespace) -> int:
    from .publish import check_folder, check_repo, publish

    check_repo(args.repo)
    folder = check_folder(args.folder)
    if not args.dry_run:
        print(publish(folder, args.repo, private=args.private, revision=args.revision))
        return 0
    print(f"{args.repo}, {'private' if args.private else 'public'}, branch {args.revision or 'main'}: would get")
    print(f"  model.safetensors  {folder.size:,} bytes, sha256 {folder.sha256}")
    print("  config.json\n  README.md")
    print("left out: " + (", ".join(folder.left_out) or "nothing"))
    print("\nREADME.md:\n\n" + folder.card(args.repo))
    entry = json.dumps({f"{folder.config['architecture']}.TAG": folder.manifest_entry(args.repo)}, indent=2)
    print("entry for weights/manifest.json:\n\n" + entry)
    return 0


def _describe(name: str, args: argparse.Namespace) -> dict:
    import timm

    from .models import VARIANTS, count_cost

    if name.partition(".")[0] not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(VARIANTS)}")
    model = timm.create_model(name, device="meta")
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
        "tokens": cost.tokens,
        "params": cost.params,
        "macs": cost.macs,
        "scan_macs": cost.scan_macs,
        "total_macs": cost.total_macs,
        "videomamba_macs": cost.videomamba_macs,
        "weights": timm.list_pretrained(name.partition(".")[0] + ".*"),
    }


def _readable(row: dict) -> dict:
    return {
        "model": row["model"],
        "width, depth": f"{row['embed_dim']}, {row['depth']}",
        "clip C×T×H×W": "×".join(map(str, row["clip"])),
        "tokens": row["tokens"],
        "parameters": f"{row['params'] / 1e6:.2f} M",
        "multiply-adds": f"{row['total_macs'] / 1e9:.1f} G, {row['scan_macs'] / 1e9:.1f} G of them in the scan",
        "  as VideoMamba": f"{row['videomamba_macs'] / 1e9:.1f} G, without the inner SSM: not the true cost",
        "weights": ("\n" + " " * 18).join(map(_told, row["weights"])) or "none",
    }


def _told(name: str) -> str:
    """What the manifest says of a checkpoint, in a line."""
    from .card import views
    from .models import find_checkpoint

    entry = find_checkpoint(name)
    if entry.status == "warm start":
        return f"{name}: a starting point, from {entry.started_from}"
    figures = [f"{f['dataset']} {f['metric']} {f['value']} ({views(f)}, {f['whose']})" for f in entry.figures]
    return f"{name}: {', '.join(figures) or 'no figures'}"


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 10000")
    return int(text)
