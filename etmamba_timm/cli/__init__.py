"""The `etmamba` command: arguments and printing; the work is done by the modules it calls."""

import argparse
import contextlib
import logging
import os
import sys

from . import models, seeing, training, videos


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 if a file or more failed, 2 if nothing could be done."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    args = parser().parse_args(argv)
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


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="etmamba", description="ETMamba and VideoMamba on video files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (videos, training, seeing, models):
        module.add_commands(commands)
    return parser
