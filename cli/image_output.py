"""Image files: names, metadata, contact sheets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..engines.files import whole_file
from ..errors import RequestError, disk_errors

CAPTION_HEIGHT = 16
MARGIN = 4
OTHER_PLACE = "choose another place"


def check_output(path: Path | None) -> None:
    """Reject an output that cannot be written, before any time is spent on it."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise RequestError(f"-o {path}: expected a name that ends in .png")
    if path.is_dir():
        raise RequestError(f"-o {path} is a folder: expected a file name")


def numbered(path: Path, index: int, count: int) -> Path:
    """The name of one of several images: ``cat-0.png``, ``cat-1.png`` for ``cat.png``."""
    if count == 1:
        return path
    return path.with_name(f"{path.stem}-{index:0{len(str(count - 1))}d}{path.suffix}")


def write_png(path: Path, image: Image.Image, metadata: dict[str, Any]) -> None:
    """Write an image with its settings as JSON in an iTXt chunk, whole or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    from ..runtime.metadata import png_info  # torch comes with it

    with disk_errors(path, OTHER_PLACE):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            image.save(partial, format="PNG", pnginfo=png_info(metadata))


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """All images in a nearly square grid, each above its caption."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width = max(image.width for image in images) + MARGIN
    height = max(image.height for image in images) + MARGIN + CAPTION_HEIGHT
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = MARGIN + i % columns * width, MARGIN + i // columns * height
        sheet.paste(image, (x, y))
        draw.text((x, y + image.height + 1), caption, fill="black")
    return sheet
