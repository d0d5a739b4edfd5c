"""The inputs and outputs of a bundle on Triton, whose batch dimension is left out."""

from __future__ import annotations

import dataclasses

from ..engines import Manifest

PROMPT = "prompt"
NEGATIVE_PROMPT = "negative_prompt"
SEED = "seed"
CONTROL_IMAGE = "control_image"
IMAGE = "image"
#: inputs of one number, by the pipeline's arguments
NUMBERS = {
    "steps": "num_inference_steps",
    "eta": "eta",
    "guidance_scale": "guidance_scale",
    "width": "width",
    "height": "height",
}
CONTROL_NUMBERS = {
    "control_scale": "controlnet_conditioning_scale",
    "control_start": "control_guidance_start",
    "control_end": "control_guidance_end",
}
WHOLE = ("steps", "width", "height")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorConfig:
    """An input or output as a model configuration describes it.

    Attributes:
        data_type: ``"TYPE_INT64"`` and so on; ``TYPE_STRING`` are bytes.
        dims: -1 for an extent that varies.
        optional: what a request leaves out is the bundle's own setting.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False


def input_configs(manifest: Manifest) -> list[TensorConfig]:
    """What a request may say, a row for every image.

    Control images are PNG, JPEG or WebP files, one for each ControlNet in the bundle's order, empty for none. They
    are strings, not UINT8: requests are batched only with others of equal shapes, and files have unequal lengths.
    """
    numbers = dict(NUMBERS)
    if manifest.controlnets:
        numbers |= CONTROL_NUMBERS
    configs = [
        TensorConfig(name=PROMPT, data_type="TYPE_STRING"),
        TensorConfig(name=NEGATIVE_PROMPT, data_type="TYPE_STRING", optional=True),
        TensorConfig(name=SEED, data_type="TYPE_INT64", optional=True),
        *(
            TensorConfig(name=name, data_type="TYPE_INT32" if name in WHOLE else "TYPE_FP32", optional=True)
            for name in numbers
        ),
    ]
    if manifest.controlnets:
        dims = (len(manifest.controlnets),)
        configs.append(TensorConfig(name=CONTROL_IMAGE, data_type="TYPE_STRING", dims=dims, optional=True))
    return configs


def output_configs() -> list[TensorConfig]:
    """What an answer holds: pixels, as clients of image models expect them, and the seed that drew them."""
    return [
        TensorConfig(name=IMAGE, data_type="TYPE_UINT8", dims=(-1, -1, 3)),
        TensorConfig(name=SEED, data_type="TYPE_INT64"),
    ]
