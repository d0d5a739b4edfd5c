"""Names of targets and keys of plans, and the part of a bundle that a target covers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypersd.engines.image_shapes import extents_of, narrowed
from hypersd.engines.manifest import Manifest, check_relative
from hypersd.engines.specs import LARGEST_BATCH, LARGEST_SIDE, Component, ImageShapes, Range, TensorSpec, dim_range
from hypersd.engines.tensorrt.targets import (
    cost_of_ranges,
    describe,
    onnx_hash,
    plan_key,
    target_name,
    this_platform,
)
from hypersd.errors import RequestError

from .made_by_hand import WIDE, manifest, shapes, target, with_plans

LONGEST_NAME = 255 - len(".text_encoder_2.engine.partial")  # file systems take 255 bytes a name; leave some for others

# The values that decide whether a plan can run. The bundle's precision and hashes are part of it.
DECISIVE: dict[str, dict[str, Any]] = {
    "backend": {"backend": "tensorrt"},
    "version": {"version": "1.7.1.117"},
    "one GPU": {"compute_capabilities": ("8.9",)},
    "two GPUs": {"compute_capabilities": ("8.9", "12.0")},
    "platform": {"platform": "win32-x86_64"},
    "precision": {"precision": "fp32"},
    "batch": {"shapes": shapes((1, 2, 2), (256, 512, 1024), (256, 512, 768))},
    "height": {"shapes": shapes((1, 2, 4), 512, (256, 512, 768))},
    "usual width": {"shapes": shapes((1, 2, 4), (256, 512, 1024), (256, 640, 768))},
    "stripped": {"stripped": True},
    "level": {"optimization_level": 0},
}


def unet_key(changes: dict[str, Any], bundle: Manifest) -> str:
    made = target(**changes)
    return plan_key(made, narrowed(bundle, made.shapes).components["unet"], onnx_hash(bundle, "unet"))


def test_targets_that_run_elsewhere_have_another_folder() -> None:
    """Two targets in one folder would overwrite each other's plans; one of two names would be built twice."""
    bundle = manifest()
    names = [target_name(target(**changes), bundle) for changes in [{}, *DECISIVE.values()]]
    names.append(target_name(target(), manifest(weights="b")))
    assert len(set(names)) == len(DECISIVE) + 2
    other = msgspec.structs.replace(
        bundle, checkpoint="another", scheduler={"beta_start": 1.0}, versions={"torch": "3"}
    )
    assert target_name(with_plans(target(), bundle), other) == names[0], "nothing else of a bundle has a say"


def test_keys_differ_with_all_that_a_plan_is_built_from() -> None:
    """A plan of the same key is taken from another bundle without a build: that must never be another plan."""
    bundle = manifest()
    keys = [unet_key(changes, bundle) for changes in [{}, *DECISIVE.values()]]
    keys.append(unet_key({}, manifest(weights="b")))
    keys.append(unet_key({}, manifest(guided=False)))
    assert len(set(keys)) == len(DECISIVE) + 3
    assert unet_key({"plans": with_plans(target(), bundle).plans}, bundle) == keys[0]


def test_sizes_of_images_share_the_text_encoders() -> None:
    """Their networks know no pixels: a plan for one size is the plan for another; of other batches it is not."""
    bundle = manifest()

    def keys(size: ImageShapes) -> dict[str, str]:
        made = target(shapes=size)
        return {
            name: plan_key(made, component, onnx_hash(bundle, name))
            for name, component in narrowed(bundle, size).components.items()
        }

    small, large, two = keys(shapes(1, 256, 256)), keys(shapes(1, 1024, 768)), keys(shapes(2, 256, 256))
    assert {name for name in small if small[name] == large[name]} == {"text_encoder"}
    assert {name for name in small if small[name] == two[name]} == set()


counts = st.tuples(*[st.integers(1, LARGEST_BATCH)] * 3).map(sorted)
extents = st.tuples(*[st.integers(1, LARGEST_SIDE // 8)] * 3).map(sorted)
capabilities = st.lists(st.sampled_from(["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]), unique=True)


@given(
    batch=counts,
    height=extents,
    width=extents,
    gpus=capabilities,
    backend=st.sampled_from(["tensorrt", "tensorrt-rtx"]),
    version=st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,4}){3}(\.post[0-9])?", fullmatch=True),
    stripped=st.booleans(),
)
def test_names_are_names_of_folders(
    batch: Any, height: Any, width: Any, gpus: list[str], backend: str, version: str, stripped: bool
) -> None:
    """Any target's folder can be made on any system, and the manifest lets its plans be inside."""
    size = shapes(tuple(batch), *(tuple(8 * extent for extent in span) for span in (height, width)))
    made = target(backend=backend, version=version, compute_capabilities=tuple(gpus), shapes=size, stripped=stripped)
    name = target_name(made, manifest())
    check_relative(name)
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_."), name
    assert len(name) <= LONGEST_NAME
    assert "\n" not in describe(made)


def test_a_target_in_words() -> None:
    """The description names the backend, its version, the GPUs and the images."""
    portable = target(version="1.7.1.116", shapes=shapes(1, 1024, 768))
    assert describe(portable) == "TensorRT-RTX 1.7.1.116, portable, 1 of 768 x 1024"
    bound = target(backend="tensorrt", version="10.8.0.43", stripped=True)
    words = "TensorRT 10.8.0.43, compute capability 8.9, 1..4 of 256..768 x 256..1024, without weights"
    assert describe(bound) == words


@pytest.mark.parametrize(
    ("system", "processor", "name"),
    [
        ("linux", "x86_64", "linux-x86_64"),
        ("win32", "AMD64", "win32-x86_64"),
        ("linux", "aarch64", "linux-aarch64"),
        ("darwin", "arm64", "darwin-aarch64"),
    ],
)
def test_systems_that_call_one_processor_by_two_names(
    system: str, processor: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan's platform must read the same wherever it is asked for."""
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.machine", lambda: processor)
    assert this_platform("tensorrt") == name
    assert this_platform("tensorrt-rtx") == name.split("-")[1], "RTX's plans run on any system"


# A part of a bundle


def spans_inside(wide: Range, multiple: int) -> st.SearchStrategy[tuple[int, ...]]:
    """(min, opt, max) in multiples inside a range, as often as not all equal."""
    one = st.integers(wide.min // multiple, wide.max // multiple).map(lambda extent: extent * multiple)
    return st.tuples(one, one, one).map(lambda span: tuple(sorted(span))) | one.map(lambda extent: (extent,) * 3)


inside = st.builds(shapes, spans_inside(WIDE.batch, 1), spans_inside(WIDE.height, 8), spans_inside(WIDE.width, 8))


def tensors(bundle: Manifest) -> dict[tuple[str, str], TensorSpec]:
    return {
        (name, key): spec
        for name, component in bundle.components.items()
        for key, spec in {**component.inputs, **component.outputs}.items()
    }


def is_inside(narrow: int | Range, wide: int | Range) -> bool:
    small, large = dim_range(narrow), dim_range(wide)
    return large.min <= small.min and small.max <= large.max


@given(part=inside, guided=st.booleans())
def test_a_part_of_a_bundle_is_inside_it_and_fits_together(part: ImageShapes, guided: bool) -> None:
    """A plan is built for these extents: outside the graph's it fails, and disagreeing components generate garbage."""
    bundle = manifest(guided=guided)
    narrow = narrowed(bundle, part)
    assert narrow.shapes == part
    wide_tensors, narrow_tensors = tensors(bundle), tensors(narrow)
    for key, spec in narrow_tensors.items():
        pairs = zip(spec.shape, wide_tensors[key].shape, strict=True)
        assert all(is_inside(narrow_dim, wide_dim) for narrow_dim, wide_dim in pairs), key
        assert all(not isinstance(dim, Range) or dim.min < dim.max for dim in spec.shape), "one extent is no range"
        assert spec.dtype == wide_tensors[key].dtype
    latents = narrow_tensors["vae_decoder", "latent_sample"].shape
    for side, latent in zip((part.height, part.width), latents[2:], strict=True):
        assert [8 * extent for extent in extents_of_dim(latent)] == extents_of_dim(side)
    assert latents[2:] == narrow_tensors["unet", "sample"].shape[2:]
    copies = 2 if guided else 1
    low, usual, high = extents_of_dim(narrow_tensors["unet", "sample"].shape[0])
    assert (low, usual, high) == (part.batch.min, copies * part.batch.opt, copies * part.batch.max)
    assert extents_of_dim(narrow_tensors["text_encoder", "input_ids"].shape[0]) == extents_of_dim(part.batch)


def extents_of_dim(dim: int | Range) -> list[int]:
    extent = dim_range(dim)
    return [extent.min, extent.opt, extent.max]


@given(whole=inside, guided=st.booleans())
def test_the_whole_of_a_bundle_is_itself(whole: ImageShapes, guided: bool) -> None:
    """For a bundle of any shapes, fixed ones too: what is built by default is exactly what was exported."""
    bundle = manifest(whole, guided)
    assert narrowed(bundle, whole) == bundle


@given(part=inside, within=st.data())
def test_a_part_of_a_part_is_a_part_of_the_whole(part: ImageShapes, within: st.DataObject) -> None:
    """The runtime narrows what the builder narrowed: in one step or two, it is the same."""
    spans = [(part.batch, 1), (part.height, 8), (part.width, 8)]
    smaller = shapes(*(within.draw(spans_inside(span, multiple)) for span, multiple in spans))
    assert narrowed(narrowed(manifest(), part), smaller) == narrowed(manifest(), smaller)


@given(
    name=st.sampled_from(["batch", "height", "width"]),
    beyond=st.integers(1, 60),
    below=st.booleans(),
    part=inside,
)
def test_what_reaches_outside_is_rejected_with_both(name: str, beyond: int, below: bool, part: ImageShapes) -> None:
    """However far outside: the message names the extent and the bundle's range, in one line."""
    wide, step = getattr(WIDE, name), 1 if name == "batch" else 8
    least = max(1, wide.min - step * beyond)
    if below and least < wide.min:
        span, outside = (least, wide.min, wide.max), least
    else:
        outside = wide.max + step * beyond
        span = (wide.min, wide.max, outside)
    low, usual, high = span
    reaching = msgspec.structs.replace(part, **{name: Range(name=name, min=low, opt=usual, max=high)})
    with pytest.raises(RequestError) as caught:
        narrowed(manifest(), reaching)
    message = str(caught.value)
    assert f"{name} {outside}" in message
    assert f"{wide.min}..{wide.max}" in message
    assert "--dynamic" in message
    assert "\n" not in message


def test_sides_that_are_no_whole_latents_are_rejected() -> None:
    """A plan for 516 pixels would take 64 latents and give 512."""
    with pytest.raises(RequestError, match=r"height 516 is not a multiple of 8: take 512"):
        narrowed(manifest(), shapes(1, 516, 512))


def test_dimensions_of_other_names_stay_as_they_are() -> None:
    """A newer exporter may let more vary than images do."""
    tokens = Range(name="tokens", min=1, opt=77, max=154)
    bundle = manifest()
    spec = TensorSpec(dtype="int64", shape=(1, tokens))
    encoder = Component(inputs={"input_ids": spec}, outputs={"out": spec}, files=("x",), key="0" * 64)
    bundle = msgspec.structs.replace(
        bundle, components={"text_encoder": encoder}, files={"x": next(iter(bundle.files.values()))}
    )
    assert narrowed(bundle, shapes(1, 256, 256)).components == bundle.components


def test_the_three_shapes_of_a_tensor() -> None:
    """A profile's smallest, usual and largest: equal where nothing varies."""
    unet = manifest().components["unet"]
    assert extents_of(unet.inputs["sample"]) == ((1, 4, 32, 32), (4, 4, 64, 64), (8, 4, 128, 96))
    assert extents_of(unet.inputs["timestep"]) == ((1,), (1,), (1,))


def test_ranges_are_said_to_cost_speed() -> None:
    """With the options of a target for one shape, which costs none."""
    line = cost_of_ranges(target(shapes=shapes(1, (256, 512, 1024), 640)))
    assert line is not None
    assert "ranges (height 256..1024) are slower" in line
    assert "`--batch 1 --size 640x512` builds for one" in line
    assert "compiled at its first image" in line
    assert "compiled" not in str(cost_of_ranges(target(backend="tensorrt", shapes=shapes((1, 2, 4), 512, 512))))
    assert cost_of_ranges(target(shapes=shapes(2, 512, 640))) is None
