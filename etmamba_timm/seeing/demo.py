"""A page in the browser: upload a video, see its classes, its timeline, and the model's effective receptive field.

Needs Gradio and matplotlib: pip install 'etmamba-timm[demo]'. The page loads nothing from elsewhere and reports to
nobody. Uploads are kept in a folder of its own. One that can't be read is deleted at once, the others after
`KEPT_SECONDS` without use, and all when the server stops.
"""

import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ..data import EvalTransform, VideoError, VideoReader, fixed_clips
from ..data.ffmpeg import check_file, opened
from ..models import EtMamba
from ..predict import predict, top_classes
from ..words import number_of
from .analyze import plot_receptive_field, receptive_field
from .timeline import Timeline, plot_timeline, timeline

_logger = logging.getLogger(__name__)

KEPT_SECONDS = 600  # how long an unused upload is kept
MOST_RATE = 60  # frames per second, on average
MOST_PIXELS = 4096 * 2304  # of a frame
_CSS = ".grid-container {grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)) !important}"  # also on phones
_OTHER_BYTES = 10**5  # of a request, besides the video


@contextmanager
def serve(
    load: Callable[[str], EtMamba],
    models: list[str],
    sample: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    most_seconds: int = 120,
    most_megabytes: int = 200,
) -> Iterator[gr.Blocks]:
    """Serves the page until the block ends.

    Args:
        load: returns the model of a name, in evaluation mode and with a classifier.
        models: the names that can be chosen; the first is chosen at the start.
        sample: a video file to try; besides the uploads, the only file that can be downloaded.
        host: the address to listen at; the default is reached from this computer alone.
        port: None for the first free one from 7860 on.
        share: whether to open a public link through Gradio's servers.
        most_seconds, most_megabytes: the longest and largest video that is taken.

    Yields: the running page; its `local_url` and `share_url` are the addresses.

    Raises:
        OSError: the host or port can't be listened at.
    """
    most_bytes = most_megabytes * 10**6
    before = os.environ.get("GRADIO_TEMP_DIR")
    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="etmamba-demo-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        page = _page(_Answers(load, folder, most_seconds), models, Path(sample), most_megabytes)
        threading.Thread(target=_sweep_until, args=(stop, folder), daemon=True).start()
        try:
            page.launch(
                share=share,
                server_name=host,
                server_port=port,
                allowed_paths=[str(sample)],
                max_file_size=most_bytes,
                app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, dispatch=_guard(folder, most_bytes))]},
                prevent_thread_lock=True,
                quiet=True,
                css=_CSS,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
            )
            yield page
        finally:
            stop.set()
            page.close(verbose=False)
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def check_limits(path: Path, most_seconds: int) -> None:
    """Checks that a video can be read and isn't too long or too large, before it is decoded.

    Raises:
        VideoError: it is no video, or has too many pixels, frames or seconds.
    """
    check_file(path)
    with opened(path) as (_, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MOST_PIXELS:
        raise VideoError(f"{path}: has {width}×{height} pixels, which is too many; scale it down, to 1280×720 say")
    times = VideoReader(path).times()
    most = most_seconds * MOST_RATE
    if times[-1] > most_seconds or len(times) > most:
        has = f"is {times[-1]:.0f} s long and has {number_of(len(times), 'frame')}"
        raise VideoError(f"{path}: {has}; cut it to {most_seconds} s and {number_of(most, 'frame')} at most")


class _Answers:
    """What the page shows of a video."""

    def __init__(self, load: Callable[[str], EtMamba], folder: Path, most_seconds: int) -> None:
        self.load, self.folder, self.most_seconds = load, folder, most_seconds

    def analyse(self, file: str | None, name: str, seconds: float) -> Iterator[list[Any]]:
        """Yields [message, classes, thumbnails, timeline, picture of it, receptive field], as far as they are known."""
        results: list[Any] = ["", None, [], None, None, None]
        yield results
        if file is None:
            return
        path = Path(file)
        try:
            path.touch()  # kept for longer
            check_limits(path, self.most_seconds)
            model = self.load(name)
            results[1] = {best["label"]: best["score"] for best in top_classes(model, predict(model, path))}
            yield results
            span = seconds if model.clip.known().is_spread else None
            over_time = timeline(model, path, clip_seconds=span, batch_size=4)
            results[2:5] = _thumbnails(path, over_time), over_time, self._picture(plot_timeline, over_time)
            yield results
            reader, transform = VideoReader(path), EvalTransform.from_model(model, size=model.img_size)
            clip = transform(reader.read(fixed_clips(model.clip, reader.info.num_frames)[0]))
            field = receptive_field(model, clip.to(model.cls_token))
            title = f"Pixels that the central patch depends on, {name}"
            results[5] = self._picture(plot_receptive_field, field, title=title)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if path.is_relative_to(self.folder):
                shutil.rmtree(path.parent, ignore_errors=True)  # Gradio's folder for this one file
            _logger.info("no answer on an upload", exc_info=error)
            text = "the video can't be analysed; upload it again"
            if isinstance(error, ValueError):  # its text is for users; others may name files of the server
                text = str(error).replace(f"{path}: ", "").replace(str(path), "the file")
            results = [f"**No answer:** {text}", None, [], None, None, None]
        yield results

    def _picture(self, plot: Callable[..., None], *args: Any, **kwargs: Any) -> str:
        path = self.folder / f"{secrets.token_hex(16)}.png"
        plot(*args, path, **kwargs)
        return str(path)


def _thumbnails(path: Path, over_time: Timeline) -> list[tuple[Image.Image, str]]:
    """The middle frame of each moment, and when it is and what it shows."""
    reader, middles = VideoReader(path), over_time.times.mean(1).tolist()
    times, best = reader.times(), over_time.probabilities.argmax(1).tolist()
    numbers = [min(bisect_left(times, middle), len(times) - 1) for middle in middles]
    pictures = {}
    for number, frame in zip(sorted(set(numbers)), reader.stream(numbers), strict=True):
        pictures[number] = Image.fromarray(frame.numpy())
        pictures[number].thumbnail((240, 240))
    texts = [f"{middle:.1f} s: {over_time.classes[index]}" for middle, index in zip(middles, best, strict=True)]
    return [(pictures[number], text) for number, text in zip(numbers, texts, strict=True)]


def _moment(over_time: Timeline, event: gr.SelectData) -> dict:
    """The classes of the moment whose thumbnail was clicked."""
    start, end = over_time.times[event.index].tolist()
    scores = dict(zip(over_time.classes, over_time.probabilities[event.index].tolist(), strict=True))
    return gr.update(value=scores, label=f"From {start:.1f} to {end:.1f} s")


def _page(answers: _Answers, models: list[str], sample: Path, most_megabytes: int) -> gr.Blocks:
    with gr.Blocks(title="ETMamba", analytics_enabled=False) as page:
        gr.Markdown("# Which action, and when?")
        with gr.Row():
            with gr.Column():
                limits = f"up to {answers.most_seconds} s and {most_megabytes} MB"
                video = gr.Video(label=f"Video, {limits}", sources=["upload"], height=280)
                message = gr.Markdown()
                try_sample = gr.Button("Take the sample")
                model = gr.Dropdown(models, value=models[0], label="Model")
                info = "for models without one of their own"
                seconds = gr.Slider(1, 10, 2, step=0.5, label="Length of an action in seconds", info=info)
            with gr.Column():
                whole = gr.Label(label="The whole video", num_top_classes=5)
        with gr.Row():
            with gr.Column(scale=2):
                options: dict[str, Any] = {"allow_preview": False, "buttons": []}
                moments = gr.Gallery(label="Moments: click one", height=360, interactive=False, **options)
            with gr.Column(scale=1):
                moment = gr.Label(label="One moment", num_top_classes=5)
        plot: dict[str, Any] = {"interactive": False, "show_label": False, "buttons": ["fullscreen"]}
        picture, field = gr.Image(label="Timeline", **plot), gr.Image(label="Effective receptive field", **plot)
        over_time = gr.State()
        asked: dict[str, Any] = {"fn": answers.analyse, "inputs": [video, model, seconds], "concurrency_id": "model"}
        asked["outputs"] = [message, whole, moments, over_time, picture, field]
        gr.on([video.upload, model.input, seconds.release], **asked, concurrency_limit=1)
        try_sample.click(lambda: str(sample), None, video).then(**asked, api_name="sample")
        moments.select(_moment, over_time, moment)
    return page.queue(max_size=16)


def _guard(folder: Path, most_bytes: int) -> Callable[[Request, RequestResponseEndpoint], Any]:
    """Refuses what Gradio would take and the page never asks for, before anything is stored.

    Gradio limits the size of a file, not how many a request holds or how much all requests store. Where a request names
    an address instead of an upload, it fetches from there. What it takes as a screen recording is stored elsewhere.
    """

    def refusal(request: Request, is_upload: bool) -> tuple[int, str] | None:
        length, most = request.headers.get("content-length", ""), _OTHER_BYTES + is_upload * most_bytes
        if not length.isdecimal():
            return 411, "The length is missing"
        if int(length) > most:
            return 413, f"Larger than {most / 10**6:.1f} MB"
        if is_upload and sweep(folder, KEPT_SECONDS) > 5 * most_bytes:
            return 503, "Too many uploads at once; try again in ten minutes"
        return None

    async def guard(request: Request, answer: RequestResponseEndpoint) -> Response:
        if re.search(r"/(process_recording|file[=/]\s*https?:)", request.scope["path"], re.IGNORECASE):
            return PlainTextResponse("Not found", 404)
        if request.method == "POST":
            is_upload = request.url.path.endswith("/upload")
            refused = refusal(request, is_upload)
            if not refused and not is_upload and _names_an_address(await request.body()):
                refused = 403, "Not an upload"
            if refused:
                return PlainTextResponse(refused[1], refused[0])
        return await answer(request)

    return guard


def _names_an_address(body: bytes) -> bool:
    """Whether a request would have Gradio fetch a file from the net."""
    try:
        return re.search(r'"path": "\s*https?:', json.dumps(json.loads(body or b"{}")), re.IGNORECASE) is not None
    except (ValueError, RecursionError):
        return True  # Gradio needn't read what we can't


def _sweep_until(stop: threading.Event, folder: Path) -> None:
    while not stop.wait(KEPT_SECONDS / 10):
        sweep(folder, KEPT_SECONDS)


def sweep(folder: Path, seconds: float) -> int:
    """Deletes files that were last touched so many seconds ago: also uploads that broke off, which Gradio keeps.

    Returns: the bytes that are left.
    """
    left = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # deleted meanwhile
            if file.is_file() and time.time() - file.stat().st_ctime > seconds:
                file.unlink()
            else:
                left += file.stat().st_size
    return left
