"""The `etmamba` command: parsing arguments and printing. The other modules do the work."""

import argparse
import contextlib
import ctypes
import logging
import os
import sys

from ..version import __version__
from ..words import did_you_mean
from . import models, seeing, training, videos
from .options import in_options


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 if some files failed, 2 if the command failed."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    _keep_freed_memory()
    logging.getLogger("etmamba_timm.ops.kernels").setLevel(logging.INFO)  # that they are compiled, which takes a while
    commands = parser()
    args = commands.parse_args(argv)
    if not hasattr(args, "run"):
        commands.print_help(sys.stderr)
        return 2
    if sys.stdout is None:
        print("etmamba: standard output is closed", file=sys.stderr)
        return 2
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain undecodable bytes
    try:
        if not (getattr(args, "backends", False) or getattr(args, "environment", False)):  # which need no models
            from .. import zoo  # noqa: F401  # registers them, as `etmamba_command` left that out
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        training = args.run.__name__ == "_train"
        print("etmamba: interrupted" + training * "; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `etmamba … | head`
        _drop_stdout()
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"etmamba: {in_options(str(error), args)}", file=sys.stderr)
        if isinstance(error, OSError):
            _drop_stdout()
        return 2


def _keep_freed_memory() -> None:
    """Lets glibc's allocator keep freed memory, instead of returning large blocks to the system at once.

    The system clears memory page by page, which took a fifth of a model's time on a CPU, and more for long clips.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another system or C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def _drop_stdout() -> None:
    """Discards buffered output, so that Python doesn't report an error on exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Its commands' parsers are of this class too: each tells of unknown options with its own usage."""

    def parse_known_args(self, *args, **kwargs):
        found, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            meant = did_you_mean((word.partition("=")[0] for word in unknown), known)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found, unknown


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        print(f"etmamba {__version__}, torch {metadata.version('torch')}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser with all commands."""
    parser = _Parser(prog="etmamba", description="ETMamba and VideoMamba on video files.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions of this package and of PyTorch")
    commands = parser.add_subparsers(metavar="COMMAND")
    for module in (videos, training, seeing, models):
        module.add_commands(commands)
    return parser
