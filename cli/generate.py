"""Generate images from a bundle.

Writes PNG files that contain their settings, and with --count above 1 a contact sheet of all. Image i has seed SEED+i.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import BUNDLE_HELP, add_allow_random_weights, add_backend, add_image_settings, folder, open_bundle
from .control_options import add_control_options, read_controls
from .image_options import add_image_options, add_resize_mode, read_init_image
from .lora_options import add_lora_options, check_lora_options, load_loras

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..engines import Bundle
    from ..runtime import Pipeline
    from ..runtime.params import Params
    from ..runtime.pipeline import PipelineOutput
    from ..runtime.request import Request
    from .control_options import Controls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bundle, the prompt, the settings that differ from the checkpoint's, and the engines."""
    parser.add_argument("bundle", type=folder, help=BUNDLE_HELP)
    parser.add_argument("prompt", help="text that describes the image")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="default: CHECKPOINT-SEED.png")
    parser.add_argument("--timesteps", type=int, nargs="+", metavar="T", help="custom timesteps, descending")
    add_image_settings(parser)
    parser.add_argument("--seed", type=int, help="default: a random one, which is printed")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="number of images (default: 1)")
    add_backend(parser, "auto: the bundle's TensorRT engines if they can run here, else ONNX Runtime (default: auto)")
    parser.add_argument(
        "--target", metavar="NAME", help="TensorRT engines: a target that `hypersd info` shows, or a part of its name"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--vae-tile",
        type=int,
        metavar="PIXELS",
        help="decode in tiles of this width and height, for less memory; the bundle must be --dynamic",
    )
    parser.add_argument(
        "--one-graph",
        action="store_true",
        help="generate with the bundle's graph of the whole image for these settings (ONNX Runtime, OpenVINO)",
    )
    parser.add_argument("--force", action="store_true", help="allow steps that the checkpoint was not distilled for")
    add_allow_random_weights(parser)
    add_resize_mode(parser, "--image, --mask and --control-image")
    add_image_options(parser)
    add_control_options(parser)
    add_lora_options(parser)


def run(args: argparse.Namespace) -> None:
    """Generate the images one by one, write them, and print seconds by stage."""
    _check(args)
    bundle = open_bundle(args.bundle)
    bundle.check_weights(args.allow_random_weights, "--allow-random-weights")
    # A file that is no image is reported before the engines are loaded.
    controls, init = read_controls(args, bundle.manifest), read_init_image(args)
    _check_resize_mode(args)
    check_lora_options(args, bundle.manifest)
    pipe = _load(args, bundle)
    given = {"resize_mode": args.resize_mode or "crop", **(init.arguments if init else {})}
    given["adapters"] = load_loras(pipe, args)
    given |= _control_params(pipe, controls, args, given)
    if init:
        _say(init.words(pipe.decide(_params(args, **given))))
    metadata = {**(init.metadata if init else {}), **(controls.metadata() if controls else {})}
    if metadata:
        metadata["resize_mode"] = given["resize_mode"]
    images = _generate_all(pipe, lambda i: _generate_one(pipe, args, i, given), metadata, args)
    if args.count > 1:
        _write_sheet(images, args)


def _check(args: argparse.Namespace) -> None:
    """Reject wrong options before torch is loaded, and choose a seed if none is given."""
    import secrets

    from ..errors import RequestError
    from .image_output import check_output

    args.width, args.height = args.size or (None, None)
    if not 1 <= args.count <= 1000:
        raise RequestError(f"--count {args.count} is out of range: expected 1 to 1000")
    check_output(args.output)
    _check_target(args)
    _check_one_graph(args)
    args.seed = secrets.randbits(32) if args.seed is None else args.seed


def _load(args: argparse.Namespace, bundle: Bundle) -> Pipeline:
    """Load the pipeline, and name the output where the command does not."""
    from ..errors import RequestError
    from .console import load_pipeline

    if args.count > 1:
        from ..runtime.params import LARGEST_SEED

        if args.seed + args.count - 1 > LARGEST_SEED:
            raise RequestError(f"--seed {args.seed} with --count {args.count}: the last seed is above {LARGEST_SEED}")
    one_graph = None
    if args.one_graph:
        from ..runtime.one_graph_function import find_one_graph

        one_graph = find_one_graph(bundle.manifest, _params(args))
    pipe = load_pipeline(args, bundle, vae_tile=args.vae_tile, one_graph=one_graph)
    args.output = args.output or Path(f"{pipe.manifest.checkpoint}-{args.seed}.png")
    return pipe


def _params(args: argparse.Namespace, index: int = 0, **given: Any) -> Params:
    """The params of the image of that index."""
    from ..runtime.params import Params

    return Params(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.steps,
        timesteps=args.timesteps,
        eta=args.eta,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        seed=args.seed + index,
        force=args.force,
        **given,
    )


def _generate_all(
    pipe: Pipeline,
    generate_one: Callable[[int], PipelineOutput],
    given: Mapping[str, Any],
    args: argparse.Namespace,
) -> list[Image]:
    """Generate and write every image; ``generate_one`` generates the image of an index.

    ``given`` is metadata for every image besides its request.
    """
    from ..runtime.metadata import image_metadata
    from .console import err, out
    from .image_output import numbered, write_png

    console, images, is_guided, idle, seconds = out(), [], False, [], []
    for i in range(args.count):
        result = generate_one(i)
        path = numbered(args.output, i, args.count)
        metadata = {**image_metadata(pipe.manifest, result.request, args.seed + i), **given}
        write_png(path, result.images[0], metadata)
        stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in result.timings.items())
        console.print(f"{path}  seed {args.seed + i}; seconds: {stages}", markup=False, soft_wrap=True)
        images.append(result.images[0])
        seconds.append(result.timings["total"])
        is_guided, idle = result.request.is_guided, _idle_controls(result.request)
    if args.count > 1:
        _say(_costs(seconds, pipe.is_graphed))
    if args.negative_prompt and not is_guided:
        err().print("the negative prompt has no effect: --guidance-scale is 1 or less", markup=False)
    for name in idle:
        err().print(f"{name} has no effect: no step lies between its start and its end", markup=False)
    return images


def _costs(seconds: Sequence[float], is_graphed: bool) -> str:
    """Seconds of the first images, which prepare what all others use, and of those."""
    from statistics import median

    from ..engines.cuda.graphs import WARM_UPS

    begin = WARM_UPS + 1 if is_graphed else 1
    first = ", ".join(f"{each:.3f}" for each in seconds[:begin])
    line = f"seconds of an image: the first {first}"
    if is_graphed:
        line += " (then its CUDA graph is recorded)"
    if later := seconds[begin:]:
        line += f"; later ones {median(later):.3f}"
    return line


def _idle_controls(request: Request) -> list[str]:
    """ControlNets with a strength that act at no step."""
    steps = request.steps
    return [
        control.name
        for control in request.controls
        if control.conditioning_scale > 0 and not any(control.is_active(step, steps) for step in range(steps))
    ]


def _control_params(
    pipe: Pipeline, controls: Controls | None, args: argparse.Namespace, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The params of the control images, which are fitted and preprocessed once for all images."""
    from ..errors import RequestError
    from .console import out
    from .image_output import write_png

    if controls is None:
        return {}
    request = pipe.decide(_params(args, control_image=controls.sources, **controls.arguments, **given))
    images = controls.images(request.width, request.height)
    for name, image in images.items():
        file, opened = controls.sources[name].file, controls.sources[name].image
        _say(f"{name} follows {file} ({opened.width}x{opened.height}), preprocess {controls.words(name)}")
        if args.save_control:
            path = args.output.with_name(f"{args.output.stem}-control-{name}.png")
            if path.resolve() in {source.file.resolve() for source in controls.sources.values()}:
                raise RequestError(f"--save-control would overwrite {path}: give another -o")
            write_png(path, image, {})
            out().print(f"{path}  what {name} sees", markup=False, soft_wrap=True)
    return {"control_image": images, **controls.arguments}


def _say(line: str) -> None:
    from .console import err

    err().print(line, markup=False, soft_wrap=True)


def _check_resize_mode(args: argparse.Namespace) -> None:
    from ..errors import RequestError

    if args.resize_mode and not (args.image or args.control_image):
        raise RequestError("--resize-mode fits images to the output: expected --image or --control-image with it")


def _generate_one(pipe: Pipeline, args: argparse.Namespace, index: int, given: Mapping[str, Any]) -> PipelineOutput:
    from .console import step_bar

    params = _params(args, index, **given)
    if pipe.one_graph or pipe.is_graphed:  # neither reports steps: a callback would prevent one graph of the image
        return pipe.generate(params)
    with step_bar(f"image {index + 1} of {args.count}", pipe.decide(params).steps) as advance:
        return pipe.generate(params, callback_on_step_end=lambda *_: advance())


def _write_sheet(images: list[Image], args: argparse.Namespace) -> None:
    from .console import out
    from .image_output import contact_sheet, write_png

    sheet = args.output.with_name(f"{args.output.stem}-sheet.png")
    write_png(sheet, contact_sheet(images, [f"seed {args.seed + i}" for i in range(args.count)]), {})
    out().print(f"{sheet}  all {args.count}", markup=False, soft_wrap=True)


def _check_target(args: argparse.Namespace) -> None:
    from ..errors import RequestError

    for option, value in (("--backend", "onnxruntime"), ("--backend", "openvino"), ("--device", "cpu")):
        if args.target is not None and getattr(args, option[2:]) == value:
            raise RequestError(
                f"--target {args.target} names TensorRT engines, {option} {value} has none: leave one of them out"
            )


def _check_one_graph(args: argparse.Namespace) -> None:
    """Reject options that a one-graph does not support."""
    from ..errors import RequestError

    given = {
        "--guidance-scale": args.guidance_scale,
        "--negative-prompt": args.negative_prompt,
        "--image": args.image,
        "--control-image": args.control_image,
        "--target": args.target,
        "--precision": args.precision,
        "--vae-tile": args.vae_tile,
        "--low-memory": args.low_memory,
        "--backend": args.backend if args.backend.startswith("tensorrt") else None,
    }
    if args.one_graph and (others := [option for option, value in given.items() if value]):
        raise RequestError(f"a one-graph has no {others[0]}: leave it or --one-graph out")
