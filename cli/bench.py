"""Measure a bundle's latency on this machine, beside the alternatives that are installed.

Every contender generates the same images from the same fused weights, in a process of its own, one at a time, round by
round. Their images are compared with hypersd's, or, if only some of its backends are named, with those of the first
named one. By default all contenders that can run here take part. A contender in another environment needs its Python:
--python optimum=/path/to/python openvino-genai=/path/to/another.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from .arguments import BUNDLE_HELP, count, folder, open_bundle, size, size_word


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bundle, the contenders, the images, and the file of the result."""
    from ..tools.bench.contenders import CONTENDERS

    names = ", ".join(contender.name for contender in CONTENDERS)
    parser.add_argument("bundle", type=folder, help=BUNDLE_HELP)
    parser.add_argument("--contenders", nargs="+", default=[], metavar="NAME", help=f"some of: {names}")
    parser.add_argument("--steps", nargs="+", type=int, default=[], metavar="N", help="default: the checkpoint's own")
    parser.add_argument("--size", type=size, metavar="WxH", help="in pixels, within the bundle's range")
    parser.add_argument("--eta", type=float, help="0..1, stochasticity")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="images of each (default: 5)")
    parser.add_argument(
        "--warmup", type=count, metavar="N", help="images before them that do not count (default: 1; 3 on a GPU)"
    )
    parser.add_argument("--prompt", default="a photo of a cat", metavar="TEXT", help="default: a photo of a cat")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--python", nargs="+", type=_named, default=[], metavar="NAME=PYTHON", help="interpreter of a contender"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")


def _named(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: expected e.g. optimum=/path/to/python")
    return name, value


def run(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    _check_outputs(args)
    from ..engines.files import write_whole
    from ..tools.bench.report import encode
    from ..tools.bench.session import BenchOptions, run_bench
    from ..tools.bench.table import print_report
    from .console import StageLines, out

    width, height = args.size or (None, None)
    options = BenchOptions(
        contenders=args.contenders,
        steps=args.steps,
        height=height,
        width=width,
        eta=args.eta,
        rounds=args.rounds,
        warmup=args.warmup,
        prompt=args.prompt,
        seed=args.seed,
        device=args.device,
        pythons=dict(args.python),
    )
    report = run_bench(open_bundle(args.bundle), options, _command(args), StageLines())
    if args.json is not None:  # first, for a reader of the tables may leave
        write_whole(args.json, encode(report))
    print_report(report, out())


def _check_outputs(args: argparse.Namespace) -> None:
    """Check that the result can be written, before minutes are spent.

    Raises:
        RequestError: the folder of the file does not exist.
    """
    from ..errors import RequestError

    if args.json is not None and (args.json.is_dir() or not args.json.resolve().parent.is_dir()):
        raise RequestError(f"--json {args.json}: expected a file name in an existing folder")


def _command(args: argparse.Namespace) -> str:
    """The command line that measures the same again, without the file of the result."""
    words = ["hypersd", "bench", str(args.bundle)]
    for name in ("contenders", "steps", "size", "eta", "rounds", "warmup", "prompt", "seed", "device"):
        value = size_word(args.size) if name == "size" else getattr(args, name)
        if value is not None and value != []:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    words += [word for name, python in args.python for word in ("--python", f"{name}={python}")]
    return shlex.join(words)
