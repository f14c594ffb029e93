"""Views of many videos, decoded ahead of the model by worker processes.

Worker w of W decodes files w, w + W, ... in order. It writes each clip's crops into a ring of slots in shared memory
and says so through a pipe; a message through the pipe gives the slot back. So the memory is bounded, the clips arrive
in the order of the files, and a worker that dies is known to have died at the first file that it hasn't finished.
"""

import contextlib
import logging
import math
import pickle
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from .dataset import Views
from .ffmpeg import VideoError

_logger = logging.getLogger(__name__)

MOST_DEATHS = 2  # of workers in a row at the same clip, before its file (or all, if none ever began) is given up
_READY, _CLIP = "ready", "clip"


def read_ahead(
    views: Views, indices: Sequence[int], workers: int = 0, ahead: int = 1
) -> Iterator[tuple[int, Tensor | Exception]]:
    """Reads the files with these indices, one clip after the other.

    Args:
        views: the files and their views.
        indices: the files to read, in this order.
        workers: decoding processes of one thread each; 0 decodes in this process when a clip is asked for. Only with
            workers does a file that crashes its decoder leave this process alive.
        ahead: number of views that workers may decode ahead, at least two clips in each worker.

    Yields: the file's index, and either a clip's crops, uint8 [num_crops, T, h, w, C], or the error that ends the
        file. With workers, the crops are only valid until the next clip is asked for.

    Raises:
        RuntimeError: the workers don't start.
    """
    if not workers or not indices:
        for index in indices:
            yield from ((index, clip) for clip in _clips(views, index))
        return
    workers = min(workers, len(indices))
    slots = 1 + max(1, math.ceil(ahead / (workers * views.num_crops)))
    team = [_Worker(views, indices[w::workers], slots) for w in range(workers)]
    try:
        for worker in team:
            worker.start()
        for turn, index in enumerate(indices):
            yield from ((index, clip) for clip in team[turn % workers].clips())
    finally:
        for worker in team:
            worker.stop()


def portable(error: Exception) -> Exception:
    """The error, or its text if it can't be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an error's own constructor raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _Worker:
    """A worker process, seen from the process that takes its clips. It is started again if it dies."""

    def __init__(self, views: Views, indices: Sequence[int], slots: int) -> None:
        self.views, self.indices = views, indices
        # From the standard library's heap, which avoids a /dev/shm that is too small, as containers have it.
        self.context: Any = torch.multiprocessing.get_context()
        shape = (slots, views.num_crops, *views.shape)
        self.memory = self.context.RawArray("B", math.prod(shape))
        self.slots = _tensor(self.memory, shape)
        self.file = 0  # position in `indices`
        self.process: Any = None
        self.can_start = False  # whether a process has ever begun its work

    def start(self, first_clip: int = 0) -> None:
        """Starts a process that begins with a clip of the current file."""
        self.slot, self.lent = 0, False
        self.connection, theirs = self.context.Pipe()
        ends = theirs, self.connection
        arguments = ends, self.memory, len(self.slots), self.views, self.indices[self.file :], first_clip
        self.process = self.context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def clips(self) -> Iterator[Tensor | Exception]:
        """The clips of the next file, or the error that ends it."""
        done = deaths = 0
        while done < self.views.num_clips:
            try:
                message = self._receive()
            except (EOFError, OSError):  # the process has died
                deaths += 1
                died = self._reason()
                self.stop()
                if not self.can_start and deaths == MOST_DEATHS:
                    raise RuntimeError(
                        f"a decoding process ended before its work began ({died}); its own message may say why. "
                        "Without workers, no processes are started"
                    ) from None
                file = self.views.files[self.indices[self.file]]
                if deaths < MOST_DEATHS:
                    _logger.warning("%s: the process that decodes it has died (%s); a new one is started", file, died)
                    self.start(done)
                    continue
                yield VideoError(
                    f"{file}: the process that decodes it has died ({died}), {deaths} times; the file may be damaged, "
                    "or the memory too small: convert the file with ffmpeg, or use fewer workers"
                )
                if self.file + 1 < len(self.indices):
                    self.file += 1
                    self.start()
                return
            if isinstance(message, Exception):
                yield message
                break
            self.lent = True
            yield self.slots[self.slot]
            self.slot = (self.slot + 1) % len(self.slots)
            done, deaths = done + 1, 0
        self.file += 1

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self.process is not None:
            self.connection.close()
            self.process.terminate()
            self.process.join()

    def _receive(self) -> str | Exception:
        """The process's next message; the slot of the clip before is free from now on."""
        if self.lent:
            self.lent = False
            with contextlib.suppress(OSError):  # it may have died after its last message
                self.connection.send_bytes(b"")
        message = self.connection.recv()
        if message == _READY:
            self.can_start = True
            message = self.connection.recv()
        return message

    def _reason(self) -> str:
        self.process.join()
        code = self.process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


def _work(
    ends: tuple[Any, Any], memory: Any, num_slots: int, views: Views, indices: Sequence[int], first_clip: int
) -> None:
    """A worker process: decodes files until there are no more, or nobody listens any more."""
    connection, other_end = ends
    other_end.close()  # or it wouldn't see that the parent has died
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that ends this one
    torch.set_num_threads(1)
    slots = _tensor(memory, (num_slots, views.num_crops, *views.shape))
    number = 0
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(_READY)
        for index in indices:
            for count, clip in enumerate(_clips(views, index)):
                if isinstance(clip, Exception):
                    connection.send(portable(clip))
                elif count >= first_clip:
                    if number >= num_slots:
                        connection.recv_bytes()  # a slot is free again
                    slots[number % num_slots] = clip
                    number += 1
                    connection.send(_CLIP)
            first_clip = 0


def _clips(views: Views, index: int) -> Iterator[Tensor | Exception]:
    """The clips of a file; an error ends them."""
    try:
        yield from views.read(index)
    except Exception as error:  # the caller decides what to make of it
        yield error


def _tensor(memory: Any, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8).view(*shape)
