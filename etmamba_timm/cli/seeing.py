"""`etmamba analyze`, `timeline` and `demo`."""

import argparse
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..words import number_of
from .options import (
    SHIPPED,
    add_batches,
    add_dataset,
    add_model,
    batch_size,
    eval_clips,
    extra,
    odd,
    positive,
    set_up,
)

if TYPE_CHECKING:
    from ..models import EtMamba


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the parsers of this module's commands."""
    analyze = commands.add_parser("analyze", help="plot confusions, features, receptive fields or cost")
    kinds = analyze.add_subparsers(required=True, metavar="PLOT")

    confusion = kinds.add_parser("confusion", help="the confusion matrix: which classes are predicted for which")
    confusion.add_argument("scores", type=Path, metavar="SCORES", help="a file written by `etmamba eval --scores`")
    _add_output(confusion)
    confusion.set_defaults(run=_confusion)

    tsne = kinds.add_parser("tsne", help="features of videos, embedded in two dimensions")
    add_model(tsne)
    add_dataset(tsne)
    tsne.add_argument("--subset", help="train, val or test (default val; test of hmdb51 and breakfast)")
    add_batches(tsne)
    tsne.add_argument("--classes", type=positive, default=10, metavar="N", help="plot at most N classes (default 10)")
    _add_output(tsne)
    tsne.set_defaults(run=_tsne)

    erf = kinds.add_parser("erf", help="the effective receptive field: the pixels that an output depends on")
    erf.add_argument("files", nargs="+", metavar="FILE", help="video files to average over")
    add_model(erf, views=False)
    erf.add_argument("--token", action="store_true", help="field of the class token instead of the central patch")
    _add_output(erf)
    erf.set_defaults(run=_erf)

    cost = kinds.add_parser("cost", help="accuracy against multiply-adds")
    cost.add_argument(
        "--of", default="Kinetics-400", metavar="DATASET", help="a dataset of the manifest (default Kinetics-400)"
    )
    cost.add_argument(
        "--rows", type=Path, metavar="FILE", help="CSV file to plot instead: name, params, macs, top1, source"
    )
    _add_output(cost)
    cost.set_defaults(run=_cost)

    timeline = commands.add_parser("timeline", help="find which action happens when in a long video")
    timeline.add_argument("file", metavar="FILE", help="a video file")
    add_model(timeline, views=False)
    timeline.add_argument("--clip-seconds", type=float, metavar="S", help="duration of a clip (default: the model's)")
    timeline.add_argument("--hop", type=float, metavar="S", help="time between starts of clips (default: half a clip)")
    timeline.add_argument(
        "--smooth", type=odd, default=3, metavar="N", help="average scores over N hops (odd, default 3)"
    )
    timeline.add_argument("--batch-size", type=positive, default=8, metavar="B", help="clips per batch (default 8)")
    timeline.add_argument("--segments", type=Path, metavar="FILE", help="write the segments to a .csv or .json file")
    timeline.add_argument("-o", "--output", type=Path, metavar="FILE", help="plot the scores: .png, .pdf or .svg")
    timeline.set_defaults(run=_timeline)

    demo = commands.add_parser("demo", help="try models in the browser, on videos that you upload")
    add_model(demo, views=False, default=SHIPPED)
    demo.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default: this computer alone)"
    )
    demo.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860 on)")
    demo.add_argument("--share", action="store_true", help="open a public link, through Gradio's servers")
    demo.add_argument("--max-seconds", type=positive, default=120, metavar="S", help="longest video (default 120)")
    demo.add_argument("--max-mb", type=positive, default=200, metavar="MB", help="largest video (default 200)")
    demo.set_defaults(run=_demo)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".png, .pdf or .svg")


def _check(output: Path) -> None:
    """Raises ValueError, before the work, if a plot can't be drawn or written."""
    from ..seeing.plots import check_plot_file

    check_plot_file(output)
    with extra("analyze"):
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401


def _confusion(args: argparse.Namespace) -> int:
    from ..seeing.analyze import most_confused, plot_confusion
    from ..training.evaluate import Scores

    _check(args.output)
    scores = Scores.load(args.scores)
    plot_confusion(scores, args.output)
    for true, predicted, share, number in most_confused(scores):
        print(f"{share:7.2%}  {true} predicted as {predicted} ({number})")
    return 0


def _tsne(args: argparse.Namespace) -> int:
    from ..seeing.analyze import collect_features, plot_tsne

    _check(args.output)
    model, options = set_up(args, need_classifier=False)
    clips = eval_clips(args, model, of_model=False)
    features, labels, _ = collect_features(
        model,
        clips,
        batch_size=batch_size(args, model),
        workers=args.workers,
        dtype=options["dtype"],
        progress=True,
    )
    plot_tsne(features, labels, clips.annotations.classes, args.output, num_classes=args.classes)
    return 0


def _erf(args: argparse.Namespace) -> int:
    import torch

    from ..data import EvalTransform, fixed_clips, open_video
    from ..seeing.analyze import plot_receptive_field, receptive_field, smallest_share

    _check(args.output)
    if args.dtype != "float32":
        raise ValueError("the receptive field is computed in float32; omit --dtype")
    model, _ = set_up(args, need_classifier=False)
    transform = EvalTransform.from_model(model, size=model.img_size)
    readers = [open_video(file) for file in args.files]
    clips = [transform(reader.read(fixed_clips(model.clip, reader.info.num_frames)[0])) for reader in readers]
    field = receptive_field(model, torch.cat(clips).to(model.cls_token), "token" if args.token else "centre")
    output = "class token" if args.token else "central patch"
    plot_receptive_field(field, args.output, f"{args.model}: effective receptive field of the {output}")
    print(
        f"half of the gradient is on {smallest_share(field, 0.5):.2%} of the pixels of {number_of(len(field), 'frame')}"
    )
    return 0


def _cost(args: argparse.Namespace) -> int:
    from ..seeing.analyze import manifest_rows, plot_cost, read_cost_rows

    _check(args.output)
    rows = read_cost_rows(args.rows) if args.rows else manifest_rows(args.of)
    title = "Accuracy against cost" if args.rows else f"Accuracy against cost, {args.of}"
    plot_cost(rows, args.output, title)
    return 0


def _timeline(args: argparse.Namespace) -> int:
    from ..seeing.timeline import check_segments_file, plot_timeline, timeline, write_segments

    if args.output is not None:
        _check(args.output)
    if args.segments is not None:
        check_segments_file(args.segments)
    model, options = set_up(args, need_classifier=True)
    scores = timeline(
        model,
        args.file,
        clip_seconds=args.clip_seconds,
        hop=args.hop,
        batch_size=args.batch_size,
        dtype=options["dtype"],
        progress=True,
    )
    segments = scores.segments(args.smooth)
    for segment in segments:
        print(f"{_clock(segment.start)} to {_clock(segment.end)}  {segment.score:7.2%}  {segment.label}")
    if args.segments is not None:
        write_segments(segments, args.segments)
    if args.output is not None:
        plot_timeline(scores, args.output, args.smooth)
    return 0


def _demo(args: argparse.Namespace) -> int:
    import signal

    from ..checkpoints import manifest
    from ..checkpoints.manifest import sample_video

    with extra("demo"):
        import matplotlib.figure  # noqa: F401 - now, rather than at the first answer

        from ..seeing.demo import serve
    if args.port is not None and not 0 < args.port < 65536:
        raise ValueError(f"--port is {args.port}; choose one from 1 to 65535")
    if args.model is None and args.checkpoint is not None:
        raise ValueError("--checkpoint needs --model, the architecture of its weights")
    shipped = [name for name, entry in manifest().items() if entry.folder and entry.is_classifier]
    names = [args.model] if args.model else []
    names += [name for name in shipped if name not in names]

    @lru_cache(maxsize=2)
    def load(name: str) -> "EtMamba":
        checkpoint = args.checkpoint if name == args.model else None
        chosen = argparse.Namespace(**{**vars(args), "model": name, "checkpoint": checkpoint})
        return set_up(chosen, need_classifier=True)[0]

    load(names[0])  # errors are shown here, rather than in the page
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are deleted then too
    limits = {"most_seconds": args.max_seconds, "most_megabytes": args.max_mb}
    with serve(load, names, sample_video(), host=args.host, port=args.port, share=args.share, **limits) as page:
        print(page.share_url or page.local_url, flush=True)
        print("Ctrl+C stops it.", file=sys.stderr)
        threading.Event().wait()
    return 0


def _clock(seconds: float) -> str:
    minutes, tenths = divmod(round(10 * seconds), 600)
    return f"{minutes:3}:{tenths / 10:04.1f}"
