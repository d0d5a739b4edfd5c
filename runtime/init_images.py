"""The init image and the mask of a call: fitted to the output size, as the tensors that a run starts from."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..engines.specs import LARGEST_SIDE
from ..errors import RequestError
from ..samplers.numbers import whole_number
from .image_files import blurred, to_rgb, upright_size
from .image_tensors import to_bytes, to_tensor
from .mask_crop import MaskCrop, find_crop
from .params import Params
from .request import Request
from .starts import IMAGE, MASK

LARGEST_BLUR = 1024  # pixels


def make_init_images(params: Params, request: Request) -> dict[str, Tensor]:
    """The image and the mask on the host, by input: as :func:`.starts.make_start` takes them.

    There is one of each, or one for each prompt. A UNet for inpainting has both in any case: without an image all is
    masked.

    Raises:
        RequestError: one is no image, or of another size, or there are neither one nor as many as prompts.
    """
    if request.starts_from == "noise":
        return {}
    if params.image is None:
        size = request.height, request.width
        return {IMAGE: torch.zeros(1, 3, *size), MASK: torch.ones(1, 1, *size, dtype=torch.uint8)}
    images = {IMAGE: _counted("image", _image(params, request), request)}
    if request.starts_from == "mask":
        images[MASK] = _mask(params, request)
    return images


def crop_images(params: Params, request: Request) -> tuple[Params, MaskCrop | None]:
    """The params of the masked part alone, and the way back, where ``padding_mask_crop`` asks for it.

    Raises:
        RequestError: the image and the mask are not one PIL image each, of one size, or the output is none.
    """
    if params.padding_mask_crop is None:
        return params, None
    padding = whole_number("padding_mask_crop", params.padding_mask_crop, 0, LARGEST_SIDE)
    image, mask = params.image, params.mask_image
    if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image) or params.output_type != "pil":
        raise RequestError('padding_mask_crop: expected one PIL image, one PIL mask and output_type="pil"')
    image, mask = to_rgb(image), blurred(to_rgb(mask), _blur(params)).convert("L")
    if image.size != mask.size:
        raise RequestError(
            f"padding_mask_crop: the mask has {mask.width}x{mask.height} pixels, the image {image.width}x"
            f"{image.height}: expected the same size"
        )
    crop = find_crop(image, mask, request.width, request.height, padding)
    return crop.cut(params), crop


def check_aspects(params: Params) -> None:
    """Check that a mask covers the parts of the image that it seems to cover: each is cut or filled by its own aspect.

    Raises:
        RequestError: PIL images and masks are of different aspects, and are not stretched to the output size.
    """
    if params.resize_mode == "stretch":
        return
    images, masks = _as_list(params.image), _as_list(params.mask_image)
    for i in range(max(len(images), len(masks)) if images and masks else 0):
        image, mask = images[i % len(images)], masks[i % len(masks)]
        if isinstance(image, Image.Image) and isinstance(mask, Image.Image):
            _check_aspect(upright_size(image), upright_size(mask))


def _check_aspect(image: tuple[int, int], mask: tuple[int, int]) -> None:
    if abs(image[0] * mask[1] - mask[0] * image[1]) > max(image):  # more than a rounded pixel
        raise RequestError(
            f"mask of {mask[0]}x{mask[1]} pixels for an image of {image[0]}x{image[1]}: expected the same size, or the "
            "same aspect"
        )


def _as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _image(params: Params, request: Request) -> Tensor:
    fitting, given = (request.width, request.height, params.resize_mode), params.image
    images = _as_list(given)
    if images and all(isinstance(image, Image.Image) for image in images):
        rows = [to_bytes(image, *fitting) for image in images]  # the rest is done on the device
        return rows[0] if len(rows) == 1 else torch.cat(rows)
    return to_tensor(given, *fitting)


def _mask(params: Params, request: Request) -> Tensor:
    """The mask; white everywhere if none was given."""
    if params.mask_image is None:
        return torch.ones(1, 1, request.height, request.width, dtype=torch.uint8)
    check_aspects(params)
    radius, given = _blur(params), params.mask_image
    if radius:
        masks = _as_list(given)
        if not all(isinstance(mask, Image.Image) for mask in masks):
            raise RequestError("mask_blur: expected PIL masks; blur arrays and tensors yourself")
        given = [blurred(to_rgb(mask), radius) for mask in masks]
    try:
        rows = to_tensor(given, request.width, request.height, params.resize_mode, mode="L")
    except RequestError as error:
        raise RequestError(f"mask_{error}") from error  # which begins with "image: "
    return (_counted("mask_image", rows, request) >= 0.5).to(torch.uint8)


def _blur(params: Params) -> int:
    return whole_number("mask_blur", params.mask_blur, 0, LARGEST_BLUR)


def _counted(name: str, rows: Tensor, request: Request) -> Tensor:
    if len(rows) not in (1, prompts := len(request.prompts)):
        raise RequestError(f"{name}: {len(rows)} and {prompts} prompts: expected one for all, or as many")
    return rows
