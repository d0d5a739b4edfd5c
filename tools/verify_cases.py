"""The images that ``hypersd verify`` compares, and the images that go into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from ..engines import Manifest
from ..runtime.request import StartsFrom

PROMPTS = ("a photo of a cat", "a red car in front of a blue house")
STRENGTH = 0.6  # of an image from an init image; one step needs more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One image to compare.

    Attributes:
        prompt: its text.
        seed: of its noise.
        controlnets: those that take part, by name.
        starts_from: where generation starts: ``"noise"``, an init ``"image"``, or ``"mask"`` for one with a mask.
    """

    prompt: str
    seed: int
    controlnets: tuple[str, ...] = ()
    starts_from: StartsFrom = "noise"

    def __str__(self) -> str:
        control = f", with {' and '.join(self.controlnets)}" if self.controlnets else ""
        start = {"noise": "", "image": ", from an init image", "mask": ", from an init image with a mask"}
        return f"{self.prompt!r}, seed {self.seed}{control}{start[self.starts_from]}"

    def images(self, manifest: Manifest) -> dict[str, Any]:
        """The init image and the mask, of the bundle's usual size, under the names of a call."""
        if self.starts_from == "noise":
            return {}
        mask = {"mask_image": mask_image(manifest)} if self.starts_from == "mask" else {}
        return {"image": init_image(manifest), **mask}

    def strength(self, steps: int) -> float | None:
        """The strength of a run of so many steps; None if it starts from noise. With a mask all is repainted."""
        return {"noise": None, "image": max(STRENGTH, 1 / steps), "mask": 1.0}[self.starts_from]


def make_cases(manifest: Manifest, prompts: Sequence[str], seed: int) -> list[Case]:
    """Each prompt without ControlNets; the first with each and with all of them, and from an init image.

    A base for inpainting generates all of them with a mask.
    """
    usual: StartsFrom = "mask" if manifest.is_inpainting else "noise"
    names = tuple(manifest.controlnets)
    controls = [*((name,) for name in names), *([names] if len(names) > 1 else [])]
    cases = [Case(prompt=prompt, seed=seed + i, starts_from=usual) for i, prompt in enumerate(prompts)]
    cases += [Case(prompt=prompts[0], seed=seed, controlnets=some, starts_from=usual) for some in controls]
    if usual == "noise" and manifest.has_encoder:
        cases.append(Case(prompt=prompts[0], seed=seed, starts_from="image"))
    return cases


def control_image(manifest: Manifest) -> Image.Image:
    """White lines on black, of the bundle's usual size: a control image for ControlNets of any kind."""
    width, height = size = _size(manifest)
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    stroke = max(1, min(size) // 64)
    draw.ellipse((width // 8, height // 8, width // 2, height // 2), outline="white", width=stroke)
    draw.rectangle((width // 3, height // 3, width * 7 // 8, height * 3 // 4), outline="white", width=stroke)
    return image


def init_image(manifest: Manifest) -> Image.Image:
    """Sky, ground and a house in even colours with soft edges, of the bundle's usual size."""
    width, height = size = _size(manifest)
    image = Image.new("RGB", size, (120, 170, 220))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height * 2 // 3, width, height), fill=(90, 140, 70))
    draw.rectangle((width // 4, height // 3, width * 3 // 4, height * 3 // 4), fill=(200, 120, 80))
    draw.ellipse((width * 3 // 4, height // 12, width * 11 // 12, height // 4), fill=(250, 220, 90))
    return image.resize((max(1, width // 4), max(1, height // 4))).resize(size, Image.Resampling.BICUBIC)


def mask_image(manifest: Manifest) -> Image.Image:
    """White where the house of the init image is."""
    width, height = size = _size(manifest)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((width // 4, height // 3, width * 3 // 4, height * 3 // 4), fill=255)
    return mask


def _size(manifest: Manifest) -> tuple[int, int]:
    return manifest.shapes.width.opt, manifest.shapes.height.opt
