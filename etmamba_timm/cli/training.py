"""`etmamba train` and `eval`."""

import argparse
import json
import logging
import sys
from pathlib import Path

from .options import (
    add_batches,
    add_compile,
    add_dataset,
    add_model,
    batch_size,
    eval_clips,
    extra,
    is_first_process,
    positive,
    process_group,
    set_up,
)


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the parsers of this module's commands."""
    train = commands.add_parser("train", help="train a model on a dataset of videos, or resume a run")
    train.add_argument("--recipe", default="k400", metavar="NAME", help="k400, ssv2, hmdb51, breakfast, or a YAML file")
    train.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="override settings of the recipe"
    )
    add_dataset(train)
    train.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the run's folder")
    train.add_argument("--save-updates", type=positive, default=500, metavar="N", help="save the state every N updates")
    text = "where the logs go too: tensorboard (default), wandb, mlflow, ... (accelerate's names)"
    train.add_argument("--trackers", nargs="+", default=["tensorboard"], metavar="NAME", help=text)
    text = "train the classifier alone, on features computed once (the folder gets the model, and can't be resumed)"
    train.add_argument("--probe", choices=["linear"], help=text)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="measure a model's accuracy on a dataset of videos")
    add_model(evaluate)
    add_compile(evaluate)
    add_dataset(evaluate)
    evaluate.add_argument("--subset", default="val", help="train, val or test (default val)")
    add_batches(evaluate)
    evaluate.add_argument(
        "--scores", type=Path, metavar="FILE", help="write the scores of all videos to a safetensors file"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_evaluate)


def _train(args: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from ..data import read_dataset

    with extra("train"):
        from ..training.probe import linear_probe
        from ..training.recipe import load_recipe, parse_overrides
        from ..training.train import train
    options = {"dataset": args.dataset, "split": args.split}
    settings = parse_overrides(args.set) | {name: value for name, value in options.items() if value is not None}
    recipe = load_recipe(args.recipe, **settings)
    train_set, val_set = (
        read_dataset(recipe.dataset, args.data, subset, split=recipe.split, annotations=args.annotations)
        for subset in ("train", "val")
    )
    if is_first_process():
        logging.getLogger("etmamba_timm").setLevel(logging.INFO)
    if args.probe:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shown = sys.stderr.isatty()
        metrics = linear_probe(
            recipe, train_set, val_set, args.output, device=device, workers=args.workers, progress=shown
        )
        print(_accuracies(metrics))
        print(f"model: {args.output / 'model'}")
        return 0
    is_ours = not dist.is_initialized()  # accelerate starts a process group, and keeps it for a next run
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
    if is_ours and dist.is_initialized():
        dist.destroy_process_group()
    if is_first_process():
        print(_accuracies(metrics))
        print(f"model: {args.output / 'model'}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from ..files import check_file
    from ..training.evaluate import evaluate

    if args.scores is not None:
        check_file(args.scores)
    with process_group(args):
        model, options = set_up(args, need_classifier=True)
        scores = evaluate(
            model,
            eval_clips(args, model),
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
        print(_accuracies(metrics))
    if args.scores is not None:
        scores.save(args.scores)
    return 0


def _accuracies(metrics: dict[str, float]) -> str:
    text = f"top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%}, mean of classes {metrics['mean_class']:.2%}, "
    text += f"{metrics['videos']} videos"
    left_out = [f"{metrics[name]} {name}" for name in ("failed", "missing") if metrics[name]]
    return text + (f" ({', '.join(left_out)}, not counted)" if left_out else "")
