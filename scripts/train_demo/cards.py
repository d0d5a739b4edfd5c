"""Model cards of the published demonstration checkpoints: a README.md in each of their folders."""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hypersd.export.checkpoints import DEMO_CHECKPOINTS, Checkpoint
from hypersd.families import find_family

from . import base, controlnet, distill, loop, lora, text, vae
from .data import SCENES
from .judge import PARTS
from .loop import Plan
from .scenes import COLOURS, PATTERNS, RADII, SHAPES, SIZE, TINTS
from .trajectories import COUNT, GUIDANCE, STEPS

Card = Callable[[Path, tuple[str, ...]], str]  # of the folder and the section of figures
BASES = {"sd15": "Demo15", "sdxl": "DemoXL"}
STEP = ("what", "learns", "optimizer steps", "batch", "highest learning rate", "seed")

WIDTH = 120

# Of a card's blocks, paragraphs are filled to WIDTH when they are joined: here their lines end anywhere.

WORLD = (
    f"""It generates scenes of one or two shapes on a background, {SIZE}x{SIZE} pixels, such as "a small red
    star left of a large blue ring, on a green striped background":""",
    f"""\
| part | words |
|---|---|
| shapes | {", ".join(SHAPES)} |
| colours | {", ".join(COLOURS)} |
| sizes | {", ".join(RADII)}; medium if none is named |
| places of one shape | left, right, top, bottom, the four corners; the middle if none is named |
| two shapes | left of, right of, above, below each other |
| backgrounds | {", ".join(PATTERNS)}; {", ".join(TINTS)}; plain white if none is named |""",
)
DATA = (
    "## Data",
    f"""{SCENES:,} images with captions, drawn and worded at random by code (`scripts/train_demo/scenes.py`), each
    from its own number as seed. No outside data and no outside weights: nothing here was downloaded.""",
)
LIMITS = (
    "## Limits",
    f"""It generates nothing but the scenes above. Other words were not in its training data: the image of a prompt
    with a photo, a person, a cat or written text means nothing. The same holds for three shapes or more, two shapes in
    places other than beside or above each other, and sizes other than {SIZE}x{SIZE} pixels. It was made to try
    out and to test `hypersd`, and says nothing about the quality of the real Hyper-SD.""",
)
LICENCE = (
    "## Licence",
    """Apache-2.0, as the repository that holds it: the weights were trained from scratch by its authors, with its
    `scripts/train_demo.sh`.""",
)
HOW = f"""AdamW with a learning rate that rises over {loop.WARM_UP} steps and falls to zero along a cosine
    ([Loshchilov and Hutter](https://arxiv.org/abs/1608.03983)), gradients clipped at norm 1, products in bfloat16; kept
    is a moving average of the weights ({loop.AVERAGE} a step). Every batch follows from the seed and the step."""
METHODS = {
    "ddim": f"""Distilled for DDIM with trailing timesteps: each step has to land where the base is after as many of its
    {STEPS} steps as fit into it. That is progressive distillation
    ([Salimans and Ho](https://arxiv.org/abs/2202.00512)) straight to the number of steps, by regression onto
    trajectories that were kept.""",
    "guided": f"""As the LoRAs without guidance, but it is the prediction with classifier-free guidance of {GUIDANCE:g}
    ([Ho and Salimans](https://arxiv.org/abs/2207.12598)) that has to land right, so that guidance and negative prompts
    stay in the hands of the caller.""",
    "tcd": """The unified one. Every point of a trajectory has to lead to its end: consistency distillation
    ([Song et al.](https://arxiv.org/abs/2303.01469)) with the end known, as all of the trajectory was kept. For
    samplers that add fresh noise between steps, half of the points on the way are the end with fresh noise.""",
    "lcm": f"""A whole UNet in the place of the base's, trained on from it: one step from noise, told that it is at
    timestep {distill.UNET_TIMESTEP}, has to lead to the trajectory's end.""",
}


def write_cards(folder: Path) -> None:
    """Write the card of every published folder that is there, with what ``figures.json`` beside them says."""
    file = folder / "figures.json"
    figures = figures_section(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else ()
    for name, card in cards().items():
        if (folder / name).is_dir():
            (folder / name / "README.md").write_text(card(folder / name, figures), encoding="utf-8")


def figures_section(shares: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The section of the scores, shares from 0 to 1; ``control`` in a row names the row to compare it with."""
    controls = {name: row for name, row in shares.items() if "control" in row}
    blocks = [
        "## Figures",
        """Of all the demonstration checkpoints, on prompts of scenes that no training has seen: the share in percent of
        what is right in the images, as `scripts/train_demo/judge.py` tells from their pixels. It looks at the colour,
        the form, the place and the size of every shape, at the background and at the number of shapes; overall is the
        mean of colours, shapes, places and backgrounds.""",
        figures_table({name: row for name, row in shares.items() if name not in controls}),
    ]
    if controls:
        blocks += [
            "The same with mistakes made on purpose, which have to show:",
            figures_table(controls),
            """Leading spacing is not among them for 4 and 8 steps: there it cost nothing in a first look at 40 prompts.
            A UNet this sure of its caption generates its scene from noise at any timestep.""",
        ]
    return tuple(blocks)


def figures_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown, in percent."""
    rows = [["generated by", *PARTS], ["---", *["---:"] * len(PARTS)]]
    rows += [[name, *(f"{100 * row[column]:.1f}" for column in PARTS)] for name, row in shares.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cards() -> dict[str, Card]:
    """By folder what makes its card."""
    return {
        **{name: functools.partial(base_card, family) for family, name in BASES.items()},
        "Hyper-Demo": hyper_card,
        "controlnet-canny-Demo15": controlnet_card,
        "taesd-Demo": tiny_vae_card,
    }


def base_card(family: str, folder: Path, figures: tuple[str, ...]) -> str:
    name, title = BASES[family], find_family(family).title
    return _joined(
        _front_matter("text-to-image", "stable-diffusion"),
        f"# {name}",
        f"""A text-to-image model in the architecture of {title}, with few and narrow layers and weights of its own, in
        diffusers' layout: what `hypersd`'s demonstration checkpoints are distilled from. Parameters:
        {_parameters(folder)}.""",
        *WORLD,
        *DATA,
        "## Training",
        _table(
            STEP,
            _stage("text encoder", text.PLANS[family], text.BATCH, "to tell the scene at the caption's last token"),
            *map(_vae_stage, vae.PARTS),
            _stage("VAE's decoder", vae.DECODER_PLAN, vae.BATCH, "to give the image back from noisy latents"),
            _stage("UNet", base.PLANS[family], base.BATCH, "to see the noise in a noisy image"),
        ),
        f"""The UNet predicts noise ([Ho et al.](https://arxiv.org/abs/2006.11239)) on Stable Diffusion's schedule of
        1000 timesteps; its errors are weighed by the signal-to-noise ratio within bounds
        ([Hang et al.](https://arxiv.org/abs/2303.09556)), and {base.NO_PROMPT:.0%} of the captions were left out for
        classifier-free guidance ([Ho and Salimans](https://arxiv.org/abs/2207.12598)). The VAE's latents have variance
        1 once they are multiplied by {title}'s scaling factor.""",
        HOW,
        "## Use",
        f"DDIM with trailing timesteps, {STEPS} steps, eta 0, guidance {GUIDANCE:g}:",
        f"""\
```python
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("tests/assets/demo/{name}")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
image = pipe("a red star on a blue background", num_inference_steps={STEPS}, guidance_scale={GUIDANCE}).images[0]
```""",
        *figures,
        *LIMITS,
        *LICENCE,
    )


def hyper_card(folder: Path, figures: tuple[str, ...]) -> str:
    here = [checkpoint for checkpoint in DEMO_CHECKPOINTS if (folder / checkpoint.filename).exists()]
    usage = ("file", "for", "sampler", "steps", "eta", "guidance")
    return _joined(
        _front_matter("text-to-image", "stable-diffusion", "lora", "distillation", bases=tuple(BASES.values())),
        "# Hyper-Demo",
        """Few-step checkpoints for `Demo15` and `DemoXL`, with the file names, key names and settings of
        `ByteDance/Hyper-SD`: what `hypersd` is tried and tested with.""",
        *WORLD,
        "## Use",
        _table(usage, *map(_usage, here)),
        "`hypersd` knows them by their names and takes these settings for what a call leaves out:",
        """\
```bash
hypersd export --ckpt Hyper-Demo15-1step-lora --precision fp32 --backend none
hypersd generate bundles/Hyper-Demo15-1step-lora "a red star on a blue background" --steps 4 --seed 0 -o star.png
```""",
        "diffusers takes them as Hyper-SD's own:",
        """\
```python
from diffusers import DiffusionPipeline, TCDScheduler

pipe = DiffusionPipeline.from_pretrained("tests/assets/demo/Demo15")
pipe.load_lora_weights("tests/assets/demo/Hyper-Demo", weight_name="Hyper-Demo15-1step-lora.safetensors")
pipe.fuse_lora()
pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
image = pipe("a red star on a blue background", num_inference_steps=4, eta=1.0, guidance_scale=0.0).images[0]
```""",
        *DATA,
        f"""Each base drew {COUNT:,} of the captions once, in {STEPS} steps of DDIM with guidance {GUIDANCE:g}; the
        whole trajectories were kept, and the students learn from those.""",
        "## Training",
        f"""Regression onto the kept trajectories, with no teacher in the loop. Hyper-SD itself distils consistency in
        segments of trajectories, and then with people's preferences and a discriminator
        ([Ren et al.](https://arxiv.org/abs/2404.13686)): a world this small does without. LoRAs
        ([Hu et al.](https://arxiv.org/abs/2106.09685)) have rank {lora.RANK} and alpha {lora.ALPHA:g}, and cover the
        layers that Hyper-SD's cover.""",
        HOW,
        *(section for checkpoint in here for section in _sections(checkpoint)),
        *figures,
        *LIMITS,
        *LICENCE,
    )


def _usage(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A line of the table of settings."""
    at = f" at timestep {', '.join(map(str, checkpoint.timesteps))}" if checkpoint.timesteps else ""
    sampler = {"ddim": "DDIM, trailing", "tcd": "TCD", "lcm": "LCM"}[checkpoint.sampler] + at
    steps = checkpoint.allowed_steps
    return (
        f"`{checkpoint.filename}`",
        f"`{checkpoint.base}`, {'LoRA' if checkpoint.kind == 'lora' else 'whole UNet'}",
        sampler,
        f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}",
        f"{checkpoint.eta:g}",
        f"{checkpoint.guidance_scale:g}" if checkpoint.is_guided else "none",
    )


def _sections(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The section of one file's training."""
    kind = checkpoint.name.removeprefix(f"{checkpoint.series.name}-")
    plan = distill.LORA_PLANS.get(kind, distill.UNET_PLAN)
    start = distill.STARTS.get(kind)
    batch = distill.BATCH // 2 if checkpoint.is_guided else distill.BATCH
    begins = f"From the end of `{checkpoint.series.name}-{start}`" if start else f"From `{checkpoint.base}` itself"
    return (
        f"### {checkpoint.filename}",
        METHODS["guided" if checkpoint.is_guided else checkpoint.sampler],
        f"""{begins}: {plan.steps:,} optimizer steps, batches of {batch} points, highest learning rate
        {plan.learning_rate:g}, seed {plan.seed}.""",
    )


def controlnet_card(folder: Path, figures: tuple[str, ...]) -> str:
    return _joined(
        _front_matter("text-to-image", "controlnet", bases=("Demo15",)),
        "# controlnet-canny-Demo15",
        f"""A ControlNet for `Demo15` and the LoRAs made for it: shapes follow given edges. Parameters:
        {_parameters(folder)}.""",
        *WORLD,
        *DATA,
        f"Of these the first {controlnet.IMAGES:,}.",
        "## Training",
        _table(STEP, _stage("ControlNet", controlnet.PLAN, controlnet.BATCH, "to see the noise, given the edges")),
        f"""As [Zhang et al.](https://arxiv.org/abs/2302.05543): a copy of the base's encoder behind convolutions that
        start at zero, while the base stays as it is. {controlnet.NO_PROMPT:.0%} of the captions were left out, so that
        it finds in the edges what the caption does not say. The edges are OpenCV's Canny with the thresholds
        {" and ".join(map(str, controlnet.THRESHOLDS))}.""",
        HOW,
        "## Use",
        f"""With the base's settings or those of one of its LoRAs, and conditioning scale 1. `edges` is an image of
        {SIZE}x{SIZE} pixels, white on black:""",
        """\
```python
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline

controlnet = ControlNetModel.from_pretrained("tests/assets/demo/controlnet-canny-Demo15")
pipe = StableDiffusionControlNetPipeline.from_pretrained("tests/assets/demo/Demo15", controlnet=controlnet)
pipe.load_lora_weights("tests/assets/demo/Hyper-Demo", weight_name="Hyper-Demo15-4steps-lora.safetensors")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
image = pipe("a red star", image=edges, num_inference_steps=4, guidance_scale=0.0).images[0]
```""",
        *figures,
        *LIMITS,
        *LICENCE,
    )


def tiny_vae_card(folder: Path, figures: tuple[str, ...]) -> str:
    return _joined(
        _front_matter("image-to-image", "taesd", bases=tuple(BASES.values())),
        "# taesd-Demo",
        f"""A small VAE in the architecture of TAESD (`madebyollin/taesd`) for `Demo15` and `DemoXL`
        alike: it decodes their latents as the UNets have them, so its scaling factor is 1. Parameters:
        {_parameters(folder)}.""",
        *DATA,
        "## Training",
        _table(STEP, _stage("tiny VAE", vae.TINY_PLAN, vae.BATCH, "to decode and to encode as the bases' VAE does")),
        HOW,
        "## Use",
        """\
```bash
hypersd export --ckpt Hyper-Demo15-1step-lora --precision fp32 --backend none --vae tiny
```""",
        """\
```python
from diffusers import AutoencoderTiny, DiffusionPipeline

vae = AutoencoderTiny.from_pretrained("tests/assets/demo/taesd-Demo")
pipe = DiffusionPipeline.from_pretrained("tests/assets/demo/Demo15", vae=vae)
```""",
        *figures,
        "## Limits",
        """It decodes only latents of the two bases, with softer edges than their own VAE; latents of other
        models mean nothing to it.""",
        *LICENCE,
    )


# Pieces


def _joined(*blocks: str) -> str:
    return "\n\n".join(map(_filled, blocks)) + "\n"


def _filled(block: str) -> str:
    if block.startswith(("---", "#", "|", "```")):
        return block
    return textwrap.fill(" ".join(block.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def _front_matter(task: str, *tags: str, bases: tuple[str, ...] = ()) -> str:
    """The metadata at the beginning of a card, for the Hub."""
    lines = ["license: apache-2.0", "library_name: diffusers", f"pipeline_tag: {task}", "language: en"]
    lines += ["base_model:", *(f"  - {name}" for name in bases)] if bases else []
    lines += ["tags:", *(f"  - {tag}" for tag in (*tags, "demo"))]
    return "\n".join(["---", *lines, "---"])


def _table(*rows: tuple[str, ...]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest])


def _stage(what: str, plan: Plan, batch: int, learns: str) -> tuple[str, ...]:
    return what, learns, f"{plan.steps:,}", str(batch), f"{plan.learning_rate:g}", str(plan.seed)


def _vae_stage(part: vae.Part) -> tuple[str, ...]:
    where = "crops" if part.side < SIZE else "whole images"
    learns = "to give the image back" + (" from latents that tell the mean colour" if part.legible else "")
    return _stage(f"VAE, on {where}", part.plan, vae.BATCH, learns)


def _parameters(folder: Path) -> str:
    """The number of parameters in every weight file below a folder, such as "unet 731,652, vae 603,195"."""
    counts = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            counts[path.parent] = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return ", ".join(f"{count:,}" if path == folder else f"{path.name} {count:,}" for path, count in counts.items())
