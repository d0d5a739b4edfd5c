"""Generate an image from every frame of a video, and write them as a video with the same times and sound.

Finished segments are kept in OUTPUT.segments until the video is whole: after an interruption the same command continues
there. Every frame has the same seed, so that what stays the same in the video stays the same in the images.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import (
    BUNDLE_HELP,
    add_allow_random_weights,
    add_backend,
    add_image_settings,
    count,
    folder,
    open_bundle,
)
from .image_options import add_resize_mode, add_strength
from .lora_options import add_lora_options, check_lora_options, load_loras

if TYPE_CHECKING:
    from ..video.conversion import Progress, VideoJob

EXTRA = "video"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bundle, the two videos, the prompt, the settings of the images, and the engines."""
    parser.add_argument("bundle", type=folder, help=BUNDLE_HELP)
    parser.add_argument("source", metavar="INPUT", help="a video file, an address, or with --format a device")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a name in .mp4, .m4v, .mov, .mkv or .webm")
    parser.add_argument("prompt", help="text that describes the images")
    add_image_settings(parser)
    parser.add_argument("--seed", type=int, default=0, help="of every frame (default: 0)")
    group = parser.add_argument_group("frames", "each is an init image")
    add_strength(group)
    add_resize_mode(group, "frames")
    group.add_argument(
        "--control", action="append", default=[], metavar="NAME", help="a ControlNet that sees the frames, too"
    )
    group.add_argument("--control-scale", type=float, metavar="X", help="strength of the ControlNets")
    group.add_argument(
        "--skip-similar", type=float, metavar="X", help="repeat the last image for frames of this similarity, e.g. 0.98"
    )
    group.add_argument("--frames", type=count, metavar="N", help="stop after N frames")
    parser.add_argument("--no-audio", action="store_true", help="leave the sound out")
    parser.add_argument("--replace", action="store_true", help="overwrite OUTPUT, and segments of other settings")
    group = parser.add_argument_group("cameras and streams", "frames that come too fast are left out; Ctrl-C ends it")
    group.add_argument("--format", metavar="NAME", help="FFmpeg's name of the device, such as v4l2 for /dev/video0")
    group.add_argument(
        "--input-option",
        type=_named,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of FFmpeg, such as video_size=640x480",
    )
    add_backend(parser, "as for generate (default: auto)")
    parser.add_argument("--target", metavar="NAME", help="TensorRT engines: a target, or a part of its name")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--force", action="store_true", help="allow steps that the checkpoint was not distilled for")
    add_allow_random_weights(parser)
    add_lora_options(parser)


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE, such as framerate=30")
    return name, value


def run(args: argparse.Namespace) -> None:
    """Convert the video, showing frames per second and the time left."""
    from ..engines.files import lock_file
    from ..video.conversion import check_places, convert_video
    from .console import err, frame_bar, load_pipeline

    job = _job(args)
    check_places(job)  # before the engines are loaded
    bundle = open_bundle(args.bundle)
    bundle.check_weights(args.allow_random_weights, "--allow-random-weights")
    check_lora_options(args, bundle.manifest)
    pipe = load_pipeline(args, bundle)
    params = dataclasses.replace(job.params, adapters=load_loras(pipe, args))
    job = dataclasses.replace(job, params=params)
    waiting = f"waiting for another process that writes {job.output}"
    with lock_file(job.output, on_wait=lambda: err().print(waiting, markup=False, soft_wrap=True)):
        try:
            with frame_bar(str(job.output)) as show:
                progress = convert_video(pipe, job, lambda now: show(now.frames, now.total))
        except KeyboardInterrupt:
            if not job.segments_folder.exists():
                raise
            words = f"finished segments are in {job.segments_folder}: the same command continues"
            raise KeyboardInterrupt(words) from None
    _say_end(job, progress)


def _job(args: argparse.Namespace) -> VideoJob:
    from ..errors import RequestError
    from ..runtime.params import Params
    from ..video.conversion import VideoJob

    if args.control_scale is not None and not args.control:
        raise RequestError("--control-scale is about a ControlNet: expected --control NAME with it")
    width, height = args.size or (None, None)
    params = Params(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.steps,
        eta=args.eta,
        guidance_scale=args.guidance_scale,
        height=height,
        width=width,
        seed=args.seed,
        strength=args.strength,
        keep_steps=args.keep_steps,
        controlnet_conditioning_scale=args.control_scale,
        resize_mode=args.resize_mode or "crop",
        force=args.force,
    )
    return VideoJob(
        source=args.source,
        output=args.output,
        params=params,
        control=tuple(args.control),
        skip_similar=args.skip_similar,
        format=args.format,
        options=dict(args.input_option),
        most_frames=args.frames,
        has_audio=not args.no_audio,
        replace=args.replace,
    )


def _say_end(job: VideoJob, progress: Progress) -> None:
    """Print what was written; a source that was not whole is an error all the same."""
    from ..errors import UserError
    from .console import out

    line = f"{job.output}  {progress.frames} frames{''.join(f', {words}' for words in _remarks(progress))}"
    out().print(line, markup=False, soft_wrap=True)
    reasons = [f"{progress.damaged} packets could not be decoded"] if progress.damaged else []
    reasons += [progress.problem] if progress.problem else []
    if reasons:
        raise UserError(f"{job.source} is not whole ({', '.join(reasons)}): {job.output} has what could be decoded")
    if progress.interrupted:
        raise KeyboardInterrupt(f"{job.output} has the frames until then")


def _remarks(progress: Progress) -> Iterator[str]:
    if progress.found:
        yield f"{progress.found} of them from an earlier run"
    if made := progress.frames - progress.found:
        yield f"{made / progress.seconds:.2f} frames/s"
    if progress.repeated:
        yield f"{progress.repeated} repeat the one before"
    if progress.dropped:
        yield f"{progress.dropped} of the source were left out, to keep up with it"
