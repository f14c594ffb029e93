"""`etmamba train` and `eval`."""

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..words import number_of
from .options import (
    add_batches,
    add_compile,
    add_dataset,
    add_device,
    add_model,
    batch_size,
    check_device,
    device,
    eval_clips,
    extra,
    is_first_process,
    positive,
    process_group,
    set_up,
)

if TYPE_CHECKING:
    from ..data import Annotations


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the parsers of this module's commands."""
    train = commands.add_parser("train", help="train a model on a dataset of videos, or resume a run")
    text = "finetune (default), the paper's k400, ssv2, hmdb51 or breakfast, or a YAML file"
    train.add_argument("--recipe", default="finetune", metavar="NAME", help=text)
    train.add_argument("--model", help="the model's name (default: the recipe's)")
    train.add_argument(
        "--checkpoint", type=Path, help="weights to start from: .safetensors or .pth, ours or VideoMamba's"
    )
    add_device(train)
    train.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="override settings of the recipe"
    )
    text = "a model whose labels are learnt too, of this package or of transformers, or what `teach` wrote"
    train.add_argument("--teacher", metavar="NAME", help=text)
    add_dataset(train)
    train.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the run's folder")
    train.add_argument("--save-updates", type=positive, default=500, metavar="N", help="save the state every N updates")
    text = "where the logs go too: tensorboard (default), wandb, mlflow, ... (accelerate's names)"
    train.add_argument("--trackers", nargs="+", default=["tensorboard"], metavar="NAME", help=text)
    text = (
        "train the classifier alone: linear (default), on features computed once (the folder gets the model, and can't "
    )
    text += "be resumed), or attentive, with an attention pooling before it (a run with a frozen backbone)"
    train.add_argument("--probe", nargs="?", const="linear", choices=["linear", "attentive"], help=text)
    train.add_argument("--dry-run", action="store_true", help="say what the run would do, and stop")
    train.set_defaults(run=_train)
    basics = train.format_help
    train.format_help = lambda: basics() + "\n" + _settings_help(train)

    evaluate = commands.add_parser("eval", help="measure a model's accuracy on a dataset of videos")
    add_model(evaluate)
    add_compile(evaluate)
    add_dataset(evaluate)
    text = "train, val or test (default val; test of hmdb51 and breakfast); of a folder DATA/CLASS/*, all videos (for "
    text += "those that a run held out, add --dataset list --annotations RUN/split)"
    evaluate.add_argument("--subset", help=text)
    add_batches(evaluate)
    evaluate.add_argument(
        "--scores", type=Path, metavar="FILE", help="write the scores of all videos to a safetensors file"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_evaluate)


def _settings_help(train: argparse.ArgumentParser) -> str:
    from ..training.recipe import describe_settings

    formatter = train._get_formatter()
    formatter.start_section("settings for --set, as in the recipe finetune (auto: the model or the data decide)")
    for names, text in describe_settings():
        formatter.add_argument(argparse.Action([names], names, nargs=0, help=text.replace("%", "%%")))
    formatter.end_section()
    return formatter.format_help()


def _train(args: argparse.Namespace) -> int:
    import torch.distributed as dist

    is_ours = not dist.is_initialized()  # accelerate starts a process group, and keeps it for a next run
    with _on_device(args.device):
        metrics, views = _run(args)
    if is_ours and dist.is_initialized():
        dist.destroy_process_group()
    if metrics and is_first_process():
        print("validation: " + _accuracies(metrics, *views))
        print(f"model: {args.output / 'model'}")
    return 0


def _run(args: argparse.Namespace) -> tuple[dict[str, float], tuple[int, int]]:
    """Says what the run will do, and does it.

    Returns: its metrics, or nothing with --dry-run, and the clips and crops of each video that they are over.
    """
    from ..data import find_layout, write_split

    if args.probe == "linear" and args.teacher:
        raise ValueError("a linear probe learns the true labels alone; leave out --teacher, or take --probe attentive")
    with extra("train"):
        from ..training.plan import make_plan, settle
        from ..training.probe import linear_probe
        from ..training.recipe import parse_overrides, read_settings
        from ..training.train import train
    given = {"dataset": args.dataset, "split": args.split, "model": args.model, "teacher": args.teacher}
    given["checkpoint"] = args.checkpoint and str(args.checkpoint)
    settings = parse_overrides(args.set) | {name: value for name, value in given.items() if value is not None}
    settings = read_settings(args.recipe, **settings)
    if args.probe == "attentive":
        settings["freeze_backbone"] = True
        settings["model_args"] = dict(settings.get("model_args") or {}, global_pool="map")
    settings["dataset"] = settings.get("dataset") or find_layout(args.data, args.annotations)
    train_set, val_set, lists = _datasets(args, settings)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    recipe = settle(settings, train_set, processes)
    plan = make_plan(recipe, train_set, val_set, processes, linear_probe=args.probe == "linear")
    if is_first_process():
        for name, text in [("data", f"{args.data} ({recipe.dataset})"), *plan.facts]:
            print(f"{name:8} {text}", flush=True)
        for text in plan.warnings:
            print(f"etmamba: warning: {text}", file=sys.stderr)
        logging.getLogger("etmamba_timm").setLevel(logging.INFO)
    views = recipe.num_clips, recipe.num_crops
    if args.dry_run:
        return {}, views
    if args.probe == "linear":
        shown = sys.stderr.isatty()
        metrics = linear_probe(
            recipe, train_set, val_set, args.output, device=device(args), workers=args.workers, progress=shown
        )
    if lists is not None and is_first_process():  # after a probe, which wants an empty folder
        write_split(lists, args.data, train_set, val_set)
    if args.probe == "linear":
        return metrics, views
    metrics = train(
        recipe,
        train_set,
        val_set,
        args.output,
        workers=args.workers,
        save_updates=args.save_updates,
        progress=sys.stderr.isatty(),
        trackers=args.trackers,
    )
    return metrics, views


def _datasets(args: argparse.Namespace, settings: dict) -> "tuple[Annotations, Annotations, Path | None]":
    """The videos for training and for validation.

    Where there are none for validation, `split_videos` takes some of those for training, and the split stays the run's.

    Returns: the videos, and the folder that a new split is to be written into.
    """
    from ..data import SOURCES, AnnotationError, is_undivided, read_dataset, read_split, split_videos
    from ..training.run_folder import RUN_FILE, SPLIT, RunError, RunFolder

    layout, run = settings["dataset"], RunFolder(args.output)
    run.check()

    def read(subset: str) -> "Annotations":
        return read_dataset(layout, args.data, subset, split=settings.get("split", 1), annotations=args.annotations)

    if not is_undivided(layout, args.data, args.annotations):
        return read("train"), read("val"), None
    videos = read("train")
    if (run / RUN_FILE).exists() and (run / SPLIT).exists():
        try:
            return *read_split(run / SPLIT, args.data, videos.classes), None
        except AnnotationError as error:
            raise RunError(
                f"{run.path} contains a run on other videos ({error}); choose another folder for the new run (-o), or "
                "give the folder of this one's videos (--data)"
            ) from error
    return *split_videos(videos, settings.get("seed", 0), SOURCES.get(layout)), run / SPLIT


@contextlib.contextmanager
def _on_device(device: str | None) -> Iterator[None]:
    """Names the device to accelerate, which takes it from the environment."""
    if device is None:
        yield
        return
    check_device(device)
    name = "ACCELERATE_USE_CPU" if device == "cpu" else "ACCELERATE_TORCH_DEVICE"
    before = os.environ.get(name)
    os.environ[name] = "true" if device == "cpu" else device
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _evaluate(args: argparse.Namespace) -> int:
    from ..files import check_file
    from ..training.evaluate import evaluate

    if args.scores is not None:
        check_file(args.scores)
    with process_group(args):
        model, options = set_up(args, need_classifier=True)
        videos = eval_clips(args, model)
        if is_first_process():
            _warn_of_training_videos(args, videos.annotations)
        scores = evaluate(
            model,
            videos,
            batch_size=batch_size(args, model),
            workers=args.workers,
            dtype=options["dtype"],
            progress=True,
        )
    if not is_first_process():
        return 0
    metrics, by_class = scores.metrics(), dict(zip(scores.classes, scores.per_class(), strict=True))
    if args.json:
        print(json.dumps(metrics | {"per_class": by_class}))
    else:
        width = max(map(len, by_class))
        for name, accuracy in by_class.items():
            print(f"{name:{width}}  " + ("no videos" if accuracy is None else f"{accuracy:7.2%}"))
        print(_accuracies(metrics, args.num_clips, args.num_crops))
    if args.scores is not None:
        scores.save(args.scores)
    return 0


def _warn_of_training_videos(args: argparse.Namespace, videos: "Annotations") -> None:
    """Warns if the model's run was trained on some of the videos, as far as the run's folder tells."""
    from ..training.run_folder import SPLIT, training_videos

    kind, _, folder = args.model.partition(":")
    weights = args.checkpoint or (Path(folder) if kind == "local-dir" else None)
    for run in weights.parents[:2] if weights else ():
        learnt = training_videos(run, args.data)
        if count := sum(file in learnt for file, _ in videos.samples):
            print(
                f"etmamba: warning: the model was trained on {count} of {number_of(len(videos.samples), 'video')} that "
                "it is evaluated on, so the accuracy is too high. For those that its run held out, add "
                f"--dataset list --annotations {run / SPLIT}",
                file=sys.stderr,
            )


def _accuracies(metrics: dict[str, float], clips: int, crops: int) -> str:
    from ..training.evaluate import METRICS, MULTILABEL_METRICS

    names = (METRICS | MULTILABEL_METRICS).items()
    shown = [f"{name} {metrics[key]:.2%}" for key, name in names if key in metrics]
    shown += [number_of(int(metrics["videos"]), "video")]
    text = ", ".join([*shown, f"{number_of(clips, 'clip')} × {number_of(crops, 'crop')} of each"])
    left_out = [f"{metrics[name]} {name}" for name in ("failed", "missing") if metrics[name]]
    return text + (f" ({', '.join(left_out)}, not counted)" if left_out else "")
