"""Draw pictures from a bundle.

Writes PNG files that carry their settings, and with --count above 1 a contact sheet of all. Picture i has seed SEED+i.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import BUNDLE_HELP, folder
from .control_options import add_control_options, read_controls

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..engines.load import Choice
    from ..runtime import Pipeline
    from ..runtime.pipeline import PipelineOutput
    from ..runtime.request import Request
    from .control_options import Controls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bundle, the prompt, and what differs from the checkpoint's own settings."""
    parser.add_argument("bundle", type=folder, help=BUNDLE_HELP)
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="default: CHECKPOINT-SEED.png")
    parser.add_argument("--steps", type=int, metavar="N", help="one of those that the checkpoint was distilled for")
    parser.add_argument("--timesteps", type=int, nargs="+", metavar="T", help="custom timesteps, descending")
    parser.add_argument("--eta", type=float, help="0..1, stochasticity")
    parser.add_argument("--guidance", type=float, metavar="X", help="classifier-free guidance; 1 or less means none")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from, with guidance above 1")
    parser.add_argument("--seed", type=int, help="default: a random one, which is printed")
    parser.add_argument("--size", metavar="WxH", help="in pixels, inside the bundle's range")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="number of pictures (default: 1)")
    parser.add_argument(
        "--backend",
        default="auto",
        choices=["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"],
        help="auto takes the bundle's TensorRT engines if they can run here, else ONNX Runtime (default: auto)",
    )
    parser.add_argument(
        "--target", metavar="NAME", help="TensorRT engines by the name that `hypersd info` shows, or a part of it"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--force", action="store_true", help="allow steps that the checkpoint was not distilled for")
    add_control_options(parser)


def run(args: argparse.Namespace) -> None:
    """Draw the pictures one by one, write them, and print seconds by stage."""
    _check(args)
    controls = _read_controls(args)
    pipe = _load(args)
    images = _draw(pipe, controls, args)
    if args.count > 1:
        _write_sheet(images, args)


def _check(args: argparse.Namespace) -> None:
    """Refuse what is wrong before torch is loaded, as far as that can be told; complete what was left open."""
    import secrets

    from ..errors import RequestError
    from .pictures import check_output, parse_size

    args.width, args.height = parse_size(args.size) if args.size else (None, None)
    if not 1 <= args.count <= 1000:
        raise RequestError(f"--count {args.count} is out of range: expected 1 to 1000")
    check_output(args.output)
    _check_target(args)
    args.seed = secrets.randbits(32) if args.seed is None else args.seed


def _read_controls(args: argparse.Namespace) -> Controls | None:
    """The control pictures, before the engines are loaded: a file that is none is said at once."""
    from ..engines import Bundle

    return read_controls(args, Bundle.load(args.bundle).manifest)


def _load(args: argparse.Namespace) -> Pipeline:
    """The pipeline, with a line that says what runs where."""
    import time

    began = time.perf_counter()
    from ..errors import RequestError
    from ..runtime import Pipeline
    from ..runtime.request import LARGEST_SEED
    from .console import StageNotes

    if args.count > 1 and args.seed + args.count - 1 > LARGEST_SEED:
        raise RequestError(f"--seed {args.seed} with --count {args.count}: the last seed is above {LARGEST_SEED}")
    progress = StageNotes()
    progress.start(f"loading {args.bundle}")
    try:
        pipe = Pipeline.load(args.bundle, args.backend, args.device, args.target, progress)
    finally:
        progress.hide()
    args.output = args.output or Path(f"{pipe.manifest.checkpoint}-{args.seed}.png")
    _say_loaded(pipe, time.perf_counter() - began, progress.notes)
    return pipe


def _draw(pipe: Pipeline, controls: Controls | None, args: argparse.Namespace) -> list[Image]:
    """Draw and write every picture."""
    from .console import err, out
    from .pictures import numbered, write_png

    control = _control_arguments(pipe, controls, args)
    console, images, is_guided, idle = out(), [], False, []
    for i in range(args.count):
        result = _draw_one(pipe, args, i, control)
        path = numbered(args.output, i, args.count)
        metadata = _metadata(pipe, result.request, args.seed + i) | (controls.metadata() if controls else {})
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
    steps = len(request.timesteps or ()) or request.num_inference_steps or 0
    return [
        control.name
        for control in request.controls
        if control.conditioning_scale > 0 and not any(control.is_active(step, steps) for step in range(steps))
    ]


def _control_arguments(pipe: Pipeline, controls: Controls | None, args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments for the control pictures, which are fitted and changed here, once for all pictures."""
    from ..errors import RequestError
    from .console import err, out
    from .pictures import write_png

    if controls is None:
        return {}
    height, width = pipe.picture_size(args.height, args.width)
    images = controls.images(width, height)
    for name, image in images.items():
        given = controls.pictures[name]
        line = (
            f"{name} follows {given.file} ({given.image.width}x{given.image.height}), preprocess {controls.words(name)}"
        )
        err().print(line, markup=False, soft_wrap=True)
        if args.save_control:
            path = args.output.with_name(f"{args.output.stem}-control-{name}.png")
            if path.resolve() in {picture.file.resolve() for picture in controls.pictures.values()}:
                raise RequestError(f"--save-control would write over {path}: give another -o")
            write_png(path, image, {})
            out().print(f"{path}  what {name} sees", markup=False, soft_wrap=True)
    return {"image": images, **controls.arguments}


def _draw_one(pipe: Pipeline, args: argparse.Namespace, index: int, control: Mapping[str, Any]) -> PipelineOutput:
    from .console import step_bar

    with step_bar(f"picture {index + 1} of {args.count}", _steps(pipe, args)) as advance:
        return pipe(
            args.prompt,
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
            callback_on_step_end=lambda *_: advance(),
        )


def _write_sheet(images: list[Image], args: argparse.Namespace) -> None:
    from .console import out
    from .pictures import contact_sheet, write_png

    sheet = args.output.with_name(f"{args.output.stem}-sheet.png")
    write_png(sheet, contact_sheet(images, [f"seed {args.seed + i}" for i in range(args.count)]), {})
    out().print(f"{sheet}  all {args.count}", markup=False, soft_wrap=True)


def _check_target(args: argparse.Namespace) -> None:
    from ..errors import RequestError

    for option, value in (("--backend", "onnxruntime"), ("--device", "cpu")):
        if args.target is not None and getattr(args, option[2:]) == value:
            raise RequestError(
                f"--target {args.target} names TensorRT engines, {option} {value} has none: leave one out"
            )


def _say_loaded(pipe: Pipeline, seconds: float, notes: list[str]) -> None:
    """What runs where, and what that has to do with engines that were passed over or compiled."""
    from .console import err

    choice, console = pipe.choice, err()
    assert choice is not None  # a pipeline that was loaded has one
    if choice.passed_over and choice.target is None:
        reasons = _each_once(choice.passed_over)
        console.print(f"TensorRT engines passed over: {reasons}", markup=False, soft_wrap=True)
    line = f"{pipe.manifest.checkpoint} on {_where(pipe)} with {_backend(choice)}, loaded in {seconds:.2f} s"
    if compiled := [note for note in notes if note.startswith("compiled for this GPU")]:
        unkept = "; " in compiled[0]
        line += f"; kernels {compiled[0]}" + ("" if unkept else ": the next load is quicker")
    console.print(line, markup=False, soft_wrap=True)


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

    if choice.target is None:
        return "ONNX Runtime"
    target = choice.manifest.engines[choice.target]
    return f"{TITLES[target.backend]} {target.version}"


def _steps(pipe: Pipeline, args: argparse.Namespace) -> int:
    return len(args.timesteps) if args.timesteps else args.steps or pipe.manifest.sampler.num_inference_steps


def _metadata(pipe: Pipeline, request: Request, seed: int) -> dict[str, Any]:
    """All that is needed to draw the picture again, under the pipeline's argument names where it has them."""
    manifest = pipe.manifest
    settings = {
        "prompt": request.prompts[0],
        "negative_prompt": request.negative_prompts[0] if request.negative_prompts else None,
        "num_inference_steps": request.num_inference_steps,
        "timesteps": request.timesteps,
        "eta": request.eta,
        "guidance_scale": request.guidance_scale,
        "height": request.height,
        "width": request.width,
        "seed": seed,
        **_control_numbers(request),
        "checkpoint": manifest.checkpoint,
        "base": manifest.origin.base,
        "vae": manifest.origin.vae,
        "lora_scale": manifest.origin.lora_scale,
        "precision": manifest.precision,
        "sampler": manifest.sampler.kind,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _control_numbers(request: Request) -> dict[str, dict[str, float]]:
    if not request.controls:
        return {}
    return {
        "controlnet_conditioning_scale": {control.name: control.conditioning_scale for control in request.controls},
        "control_guidance_start": {control.name: control.start for control in request.controls},
        "control_guidance_end": {control.name: control.end for control in request.controls},
    }
