"""Serve bundles over HTTP, with a page that generates as you type.

Requests have the shape of the OpenAI images API (POST /v1/images/generations). A bundle is addressed by the name of its
folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import BUNDLE_HELP, add_allow_random_weights, add_backend, folder, open_bundle
from .lora_options import add_lora_folder, read_lora_folder

if TYPE_CHECKING:
    from ..serve.settings import ServeSettings

EXTRA = "serve"
MEGABYTE = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bundles, the address, the engines and the limits."""
    parser.add_argument("bundles", type=folder, nargs="+", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all networks (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free port (default: 8000)")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="requests must present the bearer token in this file"
    )
    add_backend(parser, "as for generate (default: auto)")
    parser.add_argument(
        "--device",
        nargs="+",
        default=["auto"],
        metavar="DEVICE",
        help="auto, cpu, cuda, or several such as cuda:0 cuda:1, which share the queue (default: auto)",
    )
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="images that may wait (default: 64)")
    parser.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="images generated at once on a GPU (default: 8)"
    )
    parser.add_argument("--max-count", type=int, default=8, metavar="N", help="images per request (default: 8)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="longest time for a request (default: 60)"
    )
    parser.add_argument("--max-prompt", type=int, default=2000, metavar="N", help="characters (default: 2000)")
    parser.add_argument(
        "--max-body-mb", type=float, default=24.0, metavar="MB", help="size of a request, images included (default: 24)"
    )
    add_lora_folder(parser)
    add_allow_random_weights(parser)


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C; running work is finished."""
    settings = _settings(args)
    from ..serve.calls import keep_prompts_out_of_the_log
    from ..serve.server import run_server
    from ..serve.service import LocalService

    keep_prompts_out_of_the_log()
    for bundle in args.bundles:
        open_bundle(bundle).check_weights(args.allow_random_weights, "--allow-random-weights")
    service = LocalService(
        args.bundles,
        devices=args.device,
        queue=args.queue,
        max_batch=args.max_batch,
        backend=args.backend,
        precision=args.precision,
        low_memory=args.low_memory,
        lora_folder=read_lora_folder(args),
    )
    names = ", ".join(service.folders)

    def say(address: str) -> None:
        from .console import err

        line = f"serving {names} on {address} (the page; the API is at {address}v1, metrics at {address}metrics)"
        err().print(line, markup=False, soft_wrap=True, highlight=False)

    run_server(service, settings, args.host, args.port, say)


def _settings(args: argparse.Namespace) -> ServeSettings:
    """The limits.

    Raises:
        RequestError: a limit is out of range, or the token file is empty.
    """
    from ..errors import RequestError
    from ..samplers.numbers import real_number, whole_number
    from ..serve.server import LOOPBACK
    from ..serve.settings import ServeSettings, read_token

    whole_number("--port", args.port, 0, 65535)
    for option, most in (("queue", 1_000_000), ("max_batch", 1024), ("max_count", 1024), ("max_prompt", 10**9)):
        whole_number(f"--{option.replace('_', '-')}", getattr(args, option), 1, most)
    if args.max_count > args.queue:
        raise RequestError(f"--max-count {args.max_count} is above --queue {args.queue}: expected at most that")
    return ServeSettings(
        timeout=real_number("--timeout", args.timeout, 0.001, 86_400.0),
        max_count=args.max_count,
        max_body=int(real_number("--max-body-mb", args.max_body_mb, 0.001, 1024.0) * MEGABYTE),
        max_prompt=args.max_prompt,
        token=None if args.token_file is None else read_token(args.token_file),
        loopback_only=args.host in LOOPBACK,
    )
