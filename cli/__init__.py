"""The command ``hypersd``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import HyperSDError

#: subcommands and their modules, in the order of --help
COMMANDS = ("list", "export", "build", "info", "generate", "video", "batch", "serve", "verify", "bench", "push")
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Reports bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands. It is quick: commands import libraries when they run."""
    parser = _Parser(prog="hypersd", description="Generate images with Hyper-SD in one to eight steps.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"hypersd {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        summary = (module.__doc__ or name).strip().split("\n")[0]
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subparser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run, extra=getattr(module, "EXTRA", "export"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 done, 2 the user's input was wrong, 130 interrupted, 1 anything else.
    """
    code = 0
    try:
        code = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # from --help; commands handle their own
        pass
    except OSError as error:
        code = code or _fail(f"the output cannot be written: {error.strerror or error}", 1, debug=False)
    _drop_unwritten()
    return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as error:
        return int(error.code or 0)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug=False)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            args.run(args)
            return 0
        except KeyboardInterrupt as error:
            return _fail(f"interrupted; {error}" if str(error) else "interrupted", INTERRUPTED, args.debug)
        except SystemExit as error:  # the reader of the output has gone
            return int(error.code or 0)
        except HyperSDError as error:
            return _fail(str(error), error.exit_code, args.debug)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "hypersd":
                raise
            needed = f"{error.name} is not installed; in the clone: pip install -e '.[{args.extra}]'"
            return _fail(needed, 2, args.debug)
        except Exception as error:
            return _fail(f"{type(error).__name__}: {error} (a bug? --debug shows where)", 1, args.debug)


def _drop_unwritten() -> None:
    """Drop unwritten output, which would fail again at the interpreter's end, with another exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    _say(message if code == INTERRUPTED else f"error: {message}")
    return code


def _show_warning(message: Warning | str, *_: object) -> None:
    _say(f"warning: {message}")


def _say(text: str) -> None:
    """Print one line to stderr; line breaks in the text become spaces."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"hypersd: {' '.join(text.split())}", file=sys.stderr)
