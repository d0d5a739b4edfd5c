"""Generate images from a bundle.

Writes PNG files that carry their settings, and with --count above 1 a contact sheet of all. Image i has seed SEED+i.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import BUNDLE_HELP, add_backend, folder, size
from .control_options import add_control_options, read_controls

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..engines import Manifest
    from ..engines.load import Choice
    from ..runtime import Pipeline
    from ..runtime.params import Params
    from ..runtime.pipeline import PipelineOutput
    from ..runtime.request import Request
    from .control_options import Controls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bundle, the prompt, and what differs from the checkpoint's own settings."""
    parser.add_argument("bundle", type=folder, help=BUNDLE_HELP)
    parser.add_argument("prompt", help="text that describes the image")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="default: CHECKPOINT-SEED.png")
    parser.add_argument("--steps", type=int, metavar="N", help="one of those that the checkpoint was distilled for")
    parser.add_argument("--timesteps", type=int, nargs="+", metavar="T", help="custom timesteps, descending")
    parser.add_argument("--eta", type=float, help="0..1, stochasticity")
    parser.add_argument("--guidance", type=float, metavar="X", help="classifier-free guidance; 1 or less means none")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from, with guidance above 1")
    parser.add_argument("--seed", type=int, help="default: a random one, which is printed")
    parser.add_argument("--size", type=size, metavar="WxH", help="in pixels, within the bundle's range")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="number of images (default: 1)")
    add_backend(
        parser, "auto takes the bundle's TensorRT engines if they can run here, else ONNX Runtime (default: auto)"
    )
    parser.add_argument(
        "--target", metavar="NAME", help="TensorRT engines by the name that `hypersd info` shows, or a part of it"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--vae-tile",
        type=int,
        metavar="PIXELS",
        help="decode in tiles with sides of so many pixels, for less memory; the bundle must be --dynamic",
    )
    parser.add_argument(
        "--one-graph",
        action="store_true",
        help="generate with the bundle's graph of the whole image that has these settings (ONNX Runtime, OpenVINO)",
    )
    parser.add_argument("--force", action="store_true", help="allow steps that the checkpoint was not distilled for")
    parser.add_argument(
        "--allow-random-weights", action="store_true", help="accept a bundle of random weights, whose images are noise"
    )
    add_control_options(parser)


def run(args: argparse.Namespace) -> None:
    """Generate the images one by one, write them, and print seconds by stage."""
    _check(args)
    manifest = _read_manifest(args)
    controls = read_controls(args, manifest)  # before the engines are loaded: a file that is no image is said at once
    pipe = _load(args, _one_graph(args, manifest))
    control = _control_params(pipe, controls, args)
    images = _generate_all(pipe.manifest, lambda i: _generate_one(pipe, args, i, control), controls, args)
    if args.count > 1:
        _write_sheet(images, args)


def _check(args: argparse.Namespace) -> None:
    """Refuse what is wrong before torch is loaded, as far as that can be told; complete what was left open."""
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


def _read_manifest(args: argparse.Namespace) -> Manifest:
    """The bundle's manifest, if its images are worth drawing."""
    from ..engines import Bundle

    bundle = Bundle.load(args.bundle)
    bundle.check_weights(args.allow_random_weights, "--allow-random-weights")
    return bundle.manifest


def _one_graph(args: argparse.Namespace, manifest: Manifest) -> str | None:
    """The name of the one-graph that fits the arguments; None without --one-graph."""
    from ..runtime.one_graph_function import find_one_graph

    return find_one_graph(manifest, _params(args)) if args.one_graph else None


def _load(args: argparse.Namespace, one_graph: str | None) -> Pipeline:
    """The pipeline, with a line that says what runs where."""
    import time

    began = time.perf_counter()
    from ..errors import RequestError
    from ..runtime import Pipeline
    from ..runtime.params import LARGEST_SEED
    from .console import StageNotes

    if args.count > 1 and args.seed + args.count - 1 > LARGEST_SEED:
        raise RequestError(f"--seed {args.seed} with --count {args.count}: the last seed is above {LARGEST_SEED}")
    progress = StageNotes()
    progress.start(f"loading {args.bundle}")
    try:
        pipe = Pipeline.load(
            args.bundle,
            args.backend,
            args.device,
            args.target,
            progress,
            precision=args.precision,
            vae_tile=args.vae_tile,
            one_graph=one_graph,
        )
    finally:
        progress.hide()
    args.output = args.output or Path(f"{pipe.manifest.checkpoint}-{args.seed}.png")
    _say_loaded(pipe, time.perf_counter() - began, progress.notes, auto=args.backend == "auto")
    return pipe


def _params(args: argparse.Namespace, index: int = 0, **control: Any) -> Params:
    """The params of the image of that index."""
    from ..runtime.params import Params

    return Params(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.steps,
        timesteps=args.timesteps,
        eta=args.eta,
        guidance_scale=args.guidance,
        height=args.height,
        width=args.width,
        seed=args.seed + index,
        force=args.force,
        **control,
    )


def _generate_all(
    manifest: Manifest,
    generate_one: Callable[[int], PipelineOutput],
    controls: Controls | None,
    args: argparse.Namespace,
) -> list[Image]:
    """Generate and write every image; ``generate_one`` draws the one of an index."""
    from ..runtime.metadata import image_metadata
    from .console import err, out
    from .image_output import numbered, write_png

    console, images, is_guided, idle = out(), [], False, []
    for i in range(args.count):
        result = generate_one(i)
        path = numbered(args.output, i, args.count)
        metadata = image_metadata(manifest, result.request, args.seed + i) | (controls.metadata() if controls else {})
        write_png(path, result.images[0], metadata)
        stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in result.timings.items())
        console.print(f"{path}  seed {args.seed + i}; seconds: {stages}", markup=False, soft_wrap=True)
        images.append(result.images[0])
        is_guided, idle = result.request.is_guided, _idle_controls(result.request)
    if args.negative_prompt and not is_guided:
        err().print("the negative prompt has no effect: --guidance is 1 or less", markup=False)
    for name in idle:
        err().print(f"{name} has no effect: no step lies between its start and its end", markup=False)
    return images


def _idle_controls(request: Request) -> list[str]:
    """ControlNets that are to act, and do at no step."""
    steps = request.steps
    return [
        control.name
        for control in request.controls
        if control.conditioning_scale > 0 and not any(control.is_active(step, steps) for step in range(steps))
    ]


def _control_params(pipe: Pipeline, controls: Controls | None, args: argparse.Namespace) -> dict[str, Any]:
    """The params of the control images, which are fitted and preprocessed here, once for all images."""
    from ..errors import RequestError
    from .console import err, out
    from .image_output import write_png

    if controls is None:
        return {}
    request = pipe.decide(_params(args, control_image=controls.sources, **controls.arguments))
    images = controls.images(request.width, request.height)
    for name, image in images.items():
        given = controls.sources[name]
        line = (
            f"{name} follows {given.file} ({given.image.width}x{given.image.height}), preprocess {controls.words(name)}"
        )
        err().print(line, markup=False, soft_wrap=True)
        if args.save_control:
            path = args.output.with_name(f"{args.output.stem}-control-{name}.png")
            if path.resolve() in {source.file.resolve() for source in controls.sources.values()}:
                raise RequestError(f"--save-control would write over {path}: give another -o")
            write_png(path, image, {})
            out().print(f"{path}  what {name} sees", markup=False, soft_wrap=True)
    return {"control_image": images, **controls.arguments}


def _generate_one(pipe: Pipeline, args: argparse.Namespace, index: int, control: Mapping[str, Any]) -> PipelineOutput:
    from .console import step_bar

    params = _params(args, index, **control)
    if pipe.one_graph or pipe.is_graphed:  # neither reports steps: a callback would keep the image from being one graph
        return pipe.generate(params)
    with step_bar(f"image {index + 1} of {args.count}", _steps(pipe, args)) as advance:
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
                f"--target {args.target} names TensorRT engines, {option} {value} has none: leave one out"
            )


def _check_one_graph(args: argparse.Namespace) -> None:
    """Reject options that a one-graph does not have."""
    from ..errors import RequestError

    given = {
        "--guidance": args.guidance,
        "--negative-prompt": args.negative_prompt,
        "--control-image": args.control_image,
        "--target": args.target,
        "--precision": args.precision,
        "--vae-tile": args.vae_tile,
        "--backend": args.backend if args.backend.startswith("tensorrt") else None,
    }
    if args.one_graph and (others := [option for option, value in given.items() if value]):
        raise RequestError(f"a one-graph has no {others[0]}: leave it or --one-graph out")


def _say_loaded(pipe: Pipeline, seconds: float, notes: list[str], auto: bool) -> None:
    """What runs where, and what that has to do with engines that were passed over or compiled, or might be faster."""
    from .console import err

    choice, console = pipe.choice, err()
    assert choice is not None  # a pipeline that was loaded has one
    if choice.passed_over and choice.target is None:
        reasons = _each_once(choice.passed_over)
        console.print(f"TensorRT engines passed over: {reasons}", markup=False, soft_wrap=True)
    one_graph = f", {pipe.one_graph}" if pipe.one_graph else ""
    line = f"{pipe.manifest.checkpoint} on {_where(pipe)} with {_backend(choice)}{one_graph}, loaded in {seconds:.2f} s"
    if compiled := [note for note in notes if note.startswith("compiled for this GPU")]:
        unkept = "; " in compiled[0]
        line += f"; kernels {compiled[0]}" + ("" if unkept else ": the next load is quicker")
    if (
        auto
        and not pipe.one_graph
        and choice.backend == "onnxruntime"
        and pipe.device.type == "cpu"
        and _openvino_is_faster()
    ):
        line += "; --backend openvino is faster here, in bfloat16"
    console.print(line, markup=False, soft_wrap=True)


def _openvino_is_faster() -> bool:
    """Whether it is installed, and this processor has what makes it several times faster than ONNX Runtime."""
    from ..engines.openvino import has_native_bf16, is_installed

    return is_installed() and has_native_bf16()


def _each_once(reasons: Mapping[str, str]) -> str:
    """Why targets cannot run: what holds for all of them, then what holds for some, with their names."""
    targets: dict[str, list[str]] = {}
    for name, text in reasons.items():
        for reason in text.split("; "):
            targets.setdefault(reason, []).append(name)
    of_all = [reason for reason, names in targets.items() if len(names) == len(reasons)]
    of_some = [f"{', '.join(names)}: {reason}" for reason, names in targets.items() if len(names) < len(reasons)]
    return "; ".join(of_all + of_some)


def _where(pipe: Pipeline) -> str:
    if pipe.device.type != "cuda":
        return str(pipe.device)
    import torch

    return f"{pipe.device} ({torch.cuda.get_device_name(pipe.device)})"


def _backend(choice: Choice) -> str:
    """The backend in words, with the version that built its engines."""
    from ..engines.tensorrt.api import TITLES

    if choice.precision is not None:
        from ..engines.openvino import openvino_version

        return f"OpenVINO {openvino_version()} in {choice.precision}"
    if choice.target is None:
        return "ONNX Runtime"
    target = choice.manifest.engines[choice.target]
    return f"{TITLES[target.backend]} {target.version}"


def _steps(pipe: Pipeline, args: argparse.Namespace) -> int:
    return len(args.timesteps) if args.timesteps else args.steps or pipe.manifest.sampler.num_inference_steps
