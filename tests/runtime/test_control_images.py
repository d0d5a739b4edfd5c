"""Control images: whatever file comes, it is read upright as RGB or refused in one line; fitted, it is diffusers'."""

from __future__ import annotations

import io
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hypersd.errors import RequestError
from hypersd.runtime.control_images import canny, scribble
from hypersd.runtime.image_files import fit, open_image, to_rgb
from hypersd.runtime.image_tensors import to_tensor

# As StableDiffusionControlNetPipeline and StableDiffusionXLControlNetPipeline make their control_image_processor.
JUDGE = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False)
ORIENTATION = 274
WHITE = 255

sides = st.integers(8, 90)
sizes = st.tuples(sides, sides)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random bytes [H, W, channels], without the last if there is one channel."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def source(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(height, width, seed=seed))


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The one line with which something is refused; callers that expect a ValueError get one."""
    with pytest.raises(RequestError) as caught:
        call(*arguments, **options)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert message.isprintable()
    return message


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


# Files


@pytest.mark.parametrize("name", ["none.png", "a/b.png", "", "a\0b.png", "x" * 300, "a\nb.png"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    """A slip in the name, a folder, or a prompt in a path's place, too long for any file system: one line."""
    message = refusal(open_image, tmp_path / name)
    assert "is not there" in message
    assert "expected a file" in message
    assert str(tmp_path) in message


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><circle cx="9" cy="9" r="9"/></svg>'


@pytest.mark.parametrize(
    "content",
    [b"", b"a cat\n" * 50, SVG, b"\x89PNG\r\n\x1a\n", bytes(1000)],
    ids=["empty", "text", "SVG", "header", "zeros"],
)
@pytest.mark.parametrize("name", ["sketch.png", "two\nlines.png"])
def test_files_that_are_no_images_are_refused(tmp_path: Path, content: bytes, name: str) -> None:
    """Empty, text, SVG, nothing but a header, zeros: the file and what is read are named."""
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(open_image, path)
    assert "not an image" in message
    assert "PNG, JPEG" in message
    assert "sketch.png" in message or "two" in message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_images_cut_in_half_are_refused(tmp_path: Path, kind: str) -> None:
    """An interrupted download must not become an image with a grey half."""
    whole = io.BytesIO()
    source(96, 96).save(whole, kind)
    path = tmp_path / f"half.{kind.lower()}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    message = refusal(open_image, path)
    assert "damaged" in message
    assert path.name in message
    assert "again" in message


@pytest.mark.parametrize("size", [(1, 1), (7, 64), (64, 7)])
def test_images_smaller_than_a_latent_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    """A tracking pixel or a divider line: both sides are named, and what is expected."""
    message = refusal(open_image, saved(tmp_path / "dot.png", source(*size)))
    assert f"{size[0]}x{size[1]}" in message
    assert "at least 8" in message
    assert "dot.png" in message


def test_the_smallest_image_is_read(tmp_path: Path) -> None:
    """The border that the message names is allowed itself."""
    assert open_image(saved(tmp_path / "tiny.png", source(8, 8))).size == (8, 8)


@pytest.mark.parametrize("limit", [24 * 16 - 1, 24 * 16 // 2 - 1], ids=["Pillow warns", "Pillow raises"])
def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Past the limit Pillow only warns, past its double it raises: both are the same refusal here."""
    path = saved(tmp_path / "bomb.png", source())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message = refusal(open_image, path)
    assert "too many pixels" in message
    assert "bomb.png" in message
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16)
    assert open_image(path).size == (24, 16)


def test_a_damaged_avif_is_refused(tmp_path: Path) -> None:
    """Pillow's decoder of AVIF raises a RuntimeError where others raise an OSError."""
    whole = io.BytesIO()
    try:
        source(64, 64).save(whole, "AVIF")
    except (KeyError, OSError):
        pytest.skip("this Pillow has no AVIF")
    data = bytearray(whole.getvalue())
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    path = tmp_path / "photo.avif"
    path.write_bytes(data)
    assert "damaged" in refusal(open_image, path)


# EXIF

# How an upright image is stored for each orientation; 6 is what phones write that are held upright.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("kind", "tolerance"), [("png", 0), ("jpg", 4)])
def test_images_are_turned_upright(tmp_path: Path, orientation: int, kind: str, tolerance: int) -> None:
    """Phones turn images by EXIF only: without this the ControlNet would see a person lying down."""
    blocks = np.array([[0, 60, 120], [180, 220, 255]], np.uint8).repeat(8, 0).repeat(8, 1)
    upright = np.stack([blocks] * 3, axis=2)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    path = saved(tmp_path / f"phone.{kind}", stored, exif=exif, **({"quality": 95} if kind == "jpg" else {}))
    seen = np.asarray(open_image(path), int)
    assert seen.shape == upright.shape
    assert abs(seen - upright).max() <= tolerance


def exif_of(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of tags as they are stored: tag, type, count, value."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


TURNED = (ORIENTATION, 3, 1, b"\6\0\0\0")
DAMAGED_EXIF = {
    "text for a fraction": (exif_of(TURNED, (282, 2, 4, b"abc\0")), (16, 24)),
    "a fraction for text": (exif_of(TURNED, (0x9000, 11, 1, bytes(4))), (16, 24)),
    "an orientation that does not exist": (exif_of((ORIENTATION, 3, 1, b"\x63\0\0\0")), (24, 16)),
    "an orientation in words": (exif_of((ORIENTATION, 2, 2, b"6\0\0\0")), (24, 16)),
    "cut off": (exif_of(TURNED)[:-14], (24, 16)),
    "nothing but a header": (b"Exif\0\0II*\0", (24, 16)),
    "no header": (b"Exif\0\0IM\0\0\0\0", (24, 16)),
}


@pytest.mark.parametrize(("exif", "size"), DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_spoils_no_image(tmp_path: Path, kind: str, exif: bytes, size: tuple[int, int]) -> None:
    """Every viewer shows such images: what can be told of the orientation holds, the rest is of no interest."""
    assert open_image(saved(tmp_path / f"phone.{kind}", source(), exif=exif)).size == size


# Modes


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_opaque_alpha_changes_nothing(tmp_path: Path, kind: str) -> None:
    """Most PNGs with alpha are opaque: not a bit of their colours may move."""
    colours = noise(16, 24)
    opaque = np.dstack([colours, np.full((16, 24), 255, np.uint8)])
    options = {"lossless": True} if kind == "webp" else {}
    seen = open_image(saved(tmp_path / f"opaque.{kind}", Image.fromarray(opaque), **options))
    assert seen.mode == "RGB"
    assert np.array_equal(np.asarray(seen), colours)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    """Line drawings often have a transparent background with black beneath: black lines on black would be lost."""
    colours = len(mode) - 1
    layers = noise(16, 24, colours + 1)
    layers[:8, :, -1], layers[8:12, :, -1] = 0, 255
    assert Image.fromarray(layers).mode == mode
    seen = np.asarray(open_image(saved(tmp_path / "drawing.png", Image.fromarray(layers))), float)
    alpha = layers[..., -1:] / 255
    expected = np.broadcast_to(layers[..., :-1] * alpha + WHITE * (1 - alpha), (16, 24, colours)).repeat(
        3 // colours, 2
    )
    assert abs(seen - expected).max() <= 1.5
    assert (seen[:8] == WHITE).all()
    assert np.array_equal(seen[8:12], expected[8:12])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_a_transparent_colour_is_white(tmp_path: Path, mode: str) -> None:
    """PNG and GIF can declare one colour transparent, without an alpha channel."""
    drawing = Image.new("RGB", (24, 16), "black")
    drawing.paste("white" if mode == "1" else (9, 9, 9), (0, 0, 12, 16))
    image = drawing.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else drawing.convert(mode)
    path = saved(tmp_path / "drawing.png", image, transparency=image.getpixel((20, 8)))
    left, right = np.asarray(open_image(path)).reshape(16, 2, 12, 3).swapaxes(0, 1)
    assert (right == WHITE).all()
    assert (left == (WHITE if mode == "1" else 9)).all()


def ramp() -> np.ndarray:
    """Every 256th of a 16-bit number and both ends, in rows of 257."""
    return np.tile(np.append(np.arange(256, dtype=np.uint32) * 256, 65535), (8, 1))


@pytest.mark.parametrize(("kind", "dtype"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("tif", "<i4")])
def test_sixteen_bits_become_eight(tmp_path: Path, kind: str, dtype: str) -> None:
    """Depth maps are 16-bit grey: Pillow's own conversion cuts at 255 and makes nearly all of them white."""
    path = saved(tmp_path / f"depth.{kind}", Image.fromarray(ramp().astype(dtype)))
    with Image.open(path) as stored:
        assert stored.mode.startswith("I")
    seen = np.asarray(open_image(path), int)
    assert abs(seen - (ramp() // 256)[..., None]).max() <= 1
    assert (seen[:, 0] == 0).all()
    assert (seen[:, -1] == 255).all()
    assert (np.diff(seen, axis=1) >= 0).all()


def test_sixteen_bit_colours_become_eight(tmp_path: Path) -> None:
    """Pillow reads these as 8 bits by itself: nothing more may be taken away."""
    cv2 = pytest.importorskip("cv2")
    colours = noise(16, 24)
    path = tmp_path / "deep.png"
    assert cv2.imwrite(str(path), colours[..., ::-1].astype(np.uint16) * 257)
    assert abs(np.asarray(open_image(path), int) - colours).max() <= 1


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_more_than_sixteen_bits_are_refused(tmp_path: Path, value: int) -> None:
    """A 32-bit TIFF may mean anything: better no image than a black one."""
    deep = np.full((16, 24), 5, np.int32)
    deep[3, 3] = value
    message = refusal(open_image, saved(tmp_path / "deep.tif", Image.fromarray(deep)))
    assert "beyond 16 bits" in message
    assert "8-bit PNG" in message


def test_grey_images_are_three_times_the_same(tmp_path: Path) -> None:
    """Every level of grey stays what it is."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    seen = open_image(saved(tmp_path / "grey.png", Image.fromarray(levels)))
    assert np.array_equal(np.asarray(seen), np.dstack([levels] * 3))


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    """Scanned drawings: 1 is 255 and not 1."""
    bits = noise(16, 24, 1) > 127
    seen = np.asarray(open_image(saved(tmp_path / "scan.png", Image.fromarray(bits))))
    assert np.array_equal(seen, np.dstack([bits] * 3) * np.uint8(255))


def test_palettes_are_looked_up(tmp_path: Path) -> None:
    """An index is no grey."""
    image = source().quantize(16)
    seen = open_image(saved(tmp_path / "palette.png", image))
    assert np.array_equal(np.asarray(seen), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("ink", "colour"), [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 0), (255,) * 3), ((0, 0, 0, 255), (0, 0, 0))]
)
def test_printers_colours_are_colours(tmp_path: Path, ink: tuple, colour: tuple) -> None:
    """CMYK JPEGs are stored inverted: red comes out red, not cyan."""
    seen = open_image(saved(tmp_path / "print.jpg", Image.new("CMYK", (24, 16), ink), quality=95))
    assert abs(np.asarray(seen, int) - colour).max() <= 4


def test_floats_are_refused(tmp_path: Path) -> None:
    """Nobody knows what is white in a file of floats."""
    path = saved(tmp_path / "height.tif", Image.fromarray(np.ones((16, 24), np.float32)))
    message = refusal(open_image, path)
    assert "mode F" in message
    assert "PNG" in message
    assert "height.tif" in message


MODES = ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "LA", "La", "PA", "RGBA", "RGBa", "RGBX", "F", "I"]
DEEP = ["I;16", "I;16L", "I;16B", "I;16N"]


@pytest.mark.parametrize("mode", [*MODES, *DEEP])
def test_every_mode_is_rgb_or_a_refusal(mode: str) -> None:
    """A caller's image may have any mode that Pillow knows."""
    try:
        seen = to_rgb(Image.new(mode, (24, 16)))
    except RequestError as error:
        assert mode in ("RGBX", "F")
        assert f"mode {mode}" in str(error)
        return
    assert (seen.mode, seen.size) == ("RGB", (24, 16))


# Fitting


@given(size=sizes, target=sizes)
@settings(deadline=None, max_examples=60)
def test_fitting_is_diffusers_to_the_pixel(size: tuple[int, int], target: tuple[int, int]) -> None:
    """Which filter, which side is cut, and on which side the odd pixel goes."""
    image = source(*size)
    for ours, theirs in (("crop", "crop"), ("stretch", "default"), ("fill", "fill")):
        fitted = fit(image, *target, ours)
        assert (fitted.size, fitted.mode) == (target, "RGB")
        if ours == "fill" and min(*ImageOps.contain(image, target).size) <= 1:
            continue  # diffusers fails where a side has no pixel left
        expected = JUDGE.resize(image, target[1], target[0], resize_mode=theirs)
        assert fitted.tobytes() == expected.tobytes()


def test_the_aspect_is_kept_unless_told_otherwise() -> None:
    """The default cuts and does not distort."""
    image = source(40, 16)
    assert fit(image, 16, 16).tobytes() == image.crop((12, 0, 28, 16)).tobytes()


def test_a_panorama_is_cut() -> None:
    """Only what nobody could hold is refused: twenty to one is unusual, and fine."""
    image = source(400, 20).resize((4000, 200))
    assert fit(image, 512, 512).tobytes() == JUDGE.resize(image, 512, 512, resize_mode="crop").tobytes()


@pytest.mark.parametrize("mode", ["default", "", None, ["crop"]])
def test_unknown_resize_modes_name_the_known_ones(mode: Any) -> None:
    """Diffusers' other names included."""
    message = refusal(fit, source(), 8, 8, mode)
    assert repr(mode) in message
    assert "crop or stretch or fill" in message


@pytest.mark.parametrize("size", [(8, 20_000), (20_000, 8)])
def test_a_strip_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    """A page of a web site as a strip, cut to a square: diffusers resizes all of it first, to 655 million pixels."""
    resize = Image.Image.resize

    def watched(image: Image.Image, inner: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        assert inner[0] * inner[1] < 200_000_000
        return resize(image, inner, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    strip = Image.new("RGB", size)
    assert f"{size[0]}x{size[1]}" in refusal(fit, strip, 512, 512)
    assert fit(strip, 512, 512, "stretch").size == (512, 512)


# Conditions


def judged(image: Any, width: int, height: int) -> torch.Tensor:
    return JUDGE.preprocess(image, height=height, width=width).to(torch.float32)


def assert_same(condition: torch.Tensor, expected: torch.Tensor) -> None:
    assert condition.dtype == expected.dtype == torch.float32
    assert condition.is_contiguous()
    assert torch.equal(condition, expected)


@given(size=sizes, target=st.tuples(st.integers(1, 8), st.integers(1, 8)), count=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_images_become_diffusers_tensor(size: tuple[int, int], target: tuple[int, int], count: int) -> None:
    """Bit for bit what the ControlNet gets there, of one image and of a list."""
    width, height = target[0] * 8, target[1] * 8
    images = [source(*size, seed=seed) for seed in range(count)]
    assert_same(to_tensor(images, width, height, "stretch"), judged(images, width, height))
    assert_same(to_tensor(images[0], width, height, "stretch"), judged(images[0], width, height))
    expected = torch.cat([to_tensor(fit(image, width, height), width, height) for image in images])
    assert_same(to_tensor(tuple(images), width, height), expected)  # "crop" is what is left out


NUMBERS = np.random.default_rng(1).random((3, 16, 24, 3))
GIVEN: dict[str, Any] = {
    "array": NUMBERS[0],
    "arrays": NUMBERS,
    "float32 array": NUMBERS.astype(np.float32),
    "half array": NUMBERS.astype(np.float16),
    "list of arrays": list(NUMBERS),
    "tensor": torch.from_numpy(NUMBERS[0]).permute(2, 0, 1),
    "tensors": torch.from_numpy(NUMBERS).permute(0, 3, 1, 2),
    "half tensor": torch.from_numpy(NUMBERS).permute(0, 3, 1, 2).half(),
    "list of tensors": list(torch.from_numpy(NUMBERS).permute(0, 3, 1, 2).float()),
    "both ends": np.zeros((16, 24, 3)) + (np.arange(24) % 2)[:, None],
}


@pytest.mark.parametrize("image", GIVEN.values(), ids=GIVEN)
def test_arrays_and_tensors_are_taken_as_they_are(image: Any) -> None:
    """In diffusers' layouts, every float dtype: only to float32, nothing scaled."""
    assert_same(to_tensor(image, 24, 16), judged(image, 24, 16))


UNUSUAL: dict[str, Any] = {
    "mirrored": NUMBERS[0][:, ::-1].astype(np.float32)[:, ::-1],
    "turned": np.ascontiguousarray(NUMBERS[0].swapaxes(0, 1)).swapaxes(0, 1),
    "the other byte order": NUMBERS[0].astype(">f4"),
    "long double": NUMBERS[0].astype(np.longdouble),
    "read-only": np.broadcast_to(NUMBERS[0], (16, 24, 3)),
}


@pytest.mark.parametrize("image", UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.filterwarnings("error")
def test_every_array_of_floats_is_taken(image: np.ndarray) -> None:
    """Numpy's views and dtypes that torch refuses or warns of are images all the same: ``array[:, ::-1]``."""
    expected = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None]
    assert torch.equal(to_tensor(image, 24, 16), expected)


@pytest.mark.filterwarnings("error")
def test_a_tensor_that_learns_is_only_looked_at() -> None:
    """A condition that drags a graph along would fill the memory, and numpy would refuse it."""
    condition = to_tensor(torch.full((3, 16, 24), 0.5, requires_grad=True), 24, 16)
    assert not condition.requires_grad


def test_inpainting_may_mark_with_minus_one() -> None:
    """Inpainting ControlNets mark pixels to repaint with -1."""
    marked = torch.full((3, 16, 24), -1.0)
    assert_same(to_tensor(marked, 24, 16, least=-1.0), marked[None])


WRONG: dict[str, tuple[Any, str]] = {
    "array of another size": (np.zeros((24, 16, 3)), "16x24 pixels: expected 3 of 24x16"),
    "tensor of another size": (torch.zeros(3, 24, 16), "16x24 pixels: expected 3 of 24x16"),
    "one of another size": ([np.zeros((16, 24, 3)), np.zeros((24, 16, 3))], "16x24 pixels"),
    "array with alpha": (np.zeros((16, 24, 4)), "4 channels"),
    "grey array": (np.zeros((16, 24, 1)), "1 channels"),
    "tensor's layout in an array": (np.zeros((3, 16, 24)), "expected 3 of 24x16"),
    "array's layout in a tensor": (torch.zeros(16, 24, 3), "expected 3 of 24x16"),
    "flat array": (np.zeros((16, 24)), "expected floats [H, W, 3]"),
    "flat tensor": (torch.zeros(16, 24), "expected floats [3, H, W]"),
    "bytes": (noise(16, 24), "uint8"),
    "whole numbers": (torch.zeros(3, 16, 24, dtype=torch.int64), "int64"),
    "bools": (np.zeros((16, 24, 3), bool), "bool"),
    "values up to 255": (np.full((16, 24, 3), 255.0), "to 255: expected floats in 0..1"),
    "a bit above 1": (torch.full((3, 16, 24), 1.01), "to 1.01"),
    "below -1": (torch.full((3, 16, 24), -1.5), "from -1.5"),
    "nan": (np.where(np.arange(24)[:, None] == 7, np.nan, np.zeros((16, 24, 3))), "nan"),
    "nan in a tensor": (torch.full((3, 16, 24), torch.nan), "nan"),
    "infinity": (torch.full((3, 16, 24), torch.inf), "inf"),
    "no arrays": (np.zeros((0, 16, 24, 3)), "expected"),
    "no tensors": (torch.zeros(0, 3, 16, 24), "expected"),
    "empty list": ([], "empty"),
    "empty list in a list": ([source(), []], "empty"),
    "path": ("photo.jpg", "str: expected a PIL image"),
    "Path": (Path("photo.jpg"), "expected a PIL image"),
    "None": (None, "NoneType"),
    "None in a list": ([source(), None], "NoneType"),
    "number": (0.5, "float"),
    "tiny image": (source(3, 9), "3x9 pixels"),
    "image of floats": (Image.new("F", (24, 16)), "mode F"),
}


@pytest.mark.parametrize(("image", "telling"), WRONG.values(), ids=WRONG)
def test_what_is_no_image_is_refused(image: Any, telling: str) -> None:
    """Above all the usual slips: bytes or 0..255 for 0..1, the other layout, another size, a file's name."""
    message = refusal(to_tensor, image, 24, 16)
    assert message.startswith(("image: ", "image of "))
    assert telling in message


# Canny and scribble


@pytest.mark.parametrize("thresholds", [(), (50, 150), (0, 0), (100.5, 100.5), (0, 10_000)])
def test_edges_are_opencvs(thresholds: tuple[float, ...]) -> None:
    """As in the code of diffusers' and the ControlNets' model cards, white on black, in three equal channels."""
    cv2 = pytest.importorskip("cv2")
    image = source(40, 30).resize((560, 420), Image.Resampling.BICUBIC)  # soft: edges of every strength
    edges = canny(image, *thresholds)
    expected = cv2.Canny(np.asarray(image), *(thresholds or (100, 200)))
    assert edges.mode == "RGB"
    assert np.array_equal(np.asarray(edges), np.dstack([expected] * 3))
    assert set(np.unique(expected)) == ({0} if thresholds == (0, 10_000) else {0, 255})


@pytest.mark.parametrize(
    ("low", "high", "wrong"),
    [
        (200, 100, "200 and 100"),
        (-1, 100, "-1"),
        (-5, -1, "-5"),
        (float("nan"), 100, "nan"),
        (100, float("nan"), "nan"),
        (100, float("inf"), "inf"),
        (0, 10_001, "10001"),
    ],
)
def test_thresholds_out_of_order_are_refused(low: float, high: float, wrong: str) -> None:
    """OpenCV swaps them in silence, and makes of nan what it likes."""
    message = refusal(canny, source(), low, high)
    assert "Canny threshold" in message
    assert wrong in message
    assert "expected" in message


@pytest.mark.parametrize("thresholds", [("100", 200), (100, None), (True, 200), ([1], 2)])
def test_thresholds_that_are_no_numbers_are_refused(thresholds: tuple[Any, Any]) -> None:
    """As every other number that a call takes."""
    assert "hreshold" in refusal(canny, source(), *thresholds)


def test_without_opencv_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV is in an extra, and the extra that is named exists; hypersd itself is on no package index."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    message = refusal(canny, source())
    named = re.search(r"pip install -e '\.\[([\w-]+)\]'", message)
    assert named is not None
    extras = (Path(__file__).parents[2] / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert re.search(rf"^{named[1]} = \[.*opencv", extras, re.MULTILINE)


def test_scribbles_are_inverted() -> None:
    """Dark lines on white become light lines on black."""
    drawing = source()
    assert np.array_equal(np.asarray(scribble(drawing)), 255 - np.asarray(drawing))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_is_upright_is_not_turned_again(tmp_path: Path, orientation: int) -> None:
    """An image that was read with ``open_image`` goes through the pipeline as it is."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = open_image(saved(tmp_path / "phone.jpg", source(), exif=exif))
    assert upright.info == {}
    again = to_rgb(upright)
    assert again.size == upright.size
    assert again.tobytes() == upright.tobytes()
