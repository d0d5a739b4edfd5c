"""A part of a bundle with ControlNets: the halves and quarters of latents follow the size that is asked for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypersd.engines.component_names import cond_embedding, controlnet, residual_input
from hypersd.engines.image_shapes import extents_of, narrowed
from hypersd.engines.manifest import ControlNetSettings, FileRecord, Manifest, decode, encode
from hypersd.engines.specs import Component, ImageShapes, Range, TensorSpec, dim_range
from hypersd.engines.tensorrt.targets import onnx_hash, plan_key, target_name

from .made_by_hand import WIDE, manifest, shapes, target, with_plans
from .test_targets import extents_of_dim, inside, is_inside, spans_inside, tensors

RESIDUALS = {  # of SD1.5: channels, and how often the latents are halved
    "down_block_res_sample_0": (320, 0),
    "down_block_res_sample_3": (320, 1),
    "down_block_res_sample_6": (640, 2),
    "down_block_res_sample_9": (1280, 3),
    "mid_block_res_sample": (1280, 3),
}
NETWORKS = [controlnet("canny"), cond_embedding("canny"), "unet"]


def fixed_or(extent: Range) -> int | Range:
    return extent.opt if extent.min == extent.max else extent


def controlled(wide: ImageShapes = WIDE, guided: bool = True, weights: str = "a") -> Manifest:
    """The bundle made by hand with a ControlNet, as the exporter describes one."""
    bundle = manifest(wide, guided, weights)
    unet = bundle.components["unet"]
    latents = [getattr(wide, side).divided(8, f"latent_{side}") for side in ("height", "width")]

    def tensor(rows: int | Range, channels: int, *sides: Range, rows_per_image: int = 1) -> TensorSpec:
        shape = (rows, channels, *map(fixed_or, sides))
        return TensorSpec(dtype="float16", shape=shape, rows_per_image=rows_per_image)

    sample = unet.inputs["sample"]
    rows, most, batch = sample.shape[0], sample.rows_per_image, fixed_or(wide.batch)
    residuals = {
        name: tensor(rows, channels, *(side.halved(times) for side in latents), rows_per_image=most)
        for name, (channels, times) in RESIDUALS.items()
    }
    scale = TensorSpec(dtype="float32", shape=(1,))
    own = {"cond_embedding": tensor(rows, 320, *latents, rows_per_image=most), "conditioning_scale": scale}
    networks = {
        controlnet("canny"): ({**unet.inputs, **own}, residuals),
        cond_embedding("canny"): (
            {"controlnet_cond": tensor(batch, 3, wide.height, wide.width)},
            {"cond_embedding": tensor(batch, 320, *latents)},
        ),
        "unet": ({**unet.inputs, **{residual_input(name): spec for name, spec in residuals.items()}}, unet.outputs),
    }
    components = {
        name: Component(inputs=inputs, outputs=outputs, files=(f"{name}/model.onnx",), key="0" * 64)
        for name, (inputs, outputs) in networks.items()
    }
    return msgspec.structs.replace(
        bundle,
        controlnets={"canny": ControlNetSettings()},
        components={**bundle.components, **components},
        files={**bundle.files, **{f"{name}/model.onnx": FileRecord(size=1, sha256=weights * 64) for name in networks}},
    )


def sides_of(bundle: Manifest, name: str, tensor: str) -> list[list[int]]:
    component = bundle.components[name]
    return [extents_of_dim(dim) for dim in {**component.inputs, **component.outputs}[tensor].shape[2:]]


def residuals_of(bundle: Manifest) -> dict[int, list[list[int]]]:
    """Both sides of the residuals by how often they are halved; UNet and ControlNet agree on each."""
    found = {}
    for output, (_, times) in RESIDUALS.items():
        made = bundle.components[controlnet("canny")].outputs[output]
        assert bundle.components["unet"].inputs[residual_input(output)] == made
        found[times] = sides_of(bundle, controlnet("canny"), output)
    return found


@given(part=inside, guided=st.booleans())
def test_halves_follow_the_latents(part: ImageShapes, guided: bool) -> None:
    """At both ends of a range they are what the part's latents are when halved, inside the bundle's."""
    bundle = controlled(guided=guided)
    narrow = narrowed(bundle, part)
    latents = [getattr(part, side).divided(8, f"latent_{side}") for side in ("height", "width")]
    for times, sides in residuals_of(narrow).items():
        assert sides == [extents_of_dim(latent.halved(times)) for latent in latents]
    wide = tensors(bundle)
    for key, spec in tensors(narrow).items():
        pairs = list(zip(spec.shape, wide[key].shape, strict=True))
        assert all(is_inside(small, large) for small, large in pairs), key
        assert all(not isinstance(dim, Range) or dim.min < dim.max for dim in spec.shape), "one extent is no range"
        names = [(small.name, dim_range(large).name) for small, large in pairs if isinstance(small, Range)]
        assert all(small == large for small, large in names), "shapes at run time go by the names"


@given(part=inside, guided=st.booleans())
def test_the_networks_of_a_controlnet_fit_together(part: ImageShapes, guided: bool) -> None:
    """The embedding sees each image once, in pixels; with guidance the rest has the UNet's rows, twice as many."""
    narrow = narrowed(controlled(guided=guided), part)
    rest, embedding, unet = (narrow.components[name] for name in NETWORKS)
    assert {name: rest.inputs[name] for name in ("sample", "timestep", "encoder_hidden_states")} == {
        name: unet.inputs[name] for name in ("sample", "timestep", "encoder_hidden_states")
    }
    image = embedding.inputs["controlnet_cond"].shape
    assert [extents_of_dim(image[i]) for i in (0, 2, 3)] == [extents_of_dim(extent) for extent in part.extents]
    assert embedding.outputs["cond_embedding"].shape[1:] == rest.inputs["cond_embedding"].shape[1:]
    rows = unet.inputs["sample"].shape[0]
    assert {spec.shape[0] for name, spec in rest.outputs.items() if name in RESIDUALS} == {rows}
    assert rest.inputs["cond_embedding"].shape[0] == rows
    assert dim_range(rows).max == part.batch.max * (2 if guided else 1)
    assert rest.inputs["conditioning_scale"].shape == (1,)


SMALL = shapes(1, (64, 72, 104), (64, 64, 96))
SIZES: list[tuple[Any, dict[int, list[int]]]] = [  # of a side in pixels, and of its latents halved so many times
    (72, {0: [9] * 3, 1: [5] * 3, 2: [3] * 3, 3: [2] * 3}),
    (104, {0: [13] * 3, 1: [7] * 3, 2: [4] * 3, 3: [2] * 3}),
    (64, {0: [8] * 3, 1: [4] * 3, 2: [2] * 3, 3: [1] * 3}),
    ((72, 80, 104), {0: [9, 10, 13], 1: [5, 5, 7], 2: [3, 3, 4], 3: [2, 2, 2]}),
    ((72, 72, 80), {0: [9, 9, 10], 1: [5, 5, 5], 2: [3, 3, 3], 3: [2, 2, 2]}),
]


@pytest.mark.parametrize("whole", [SMALL, shapes(1, (64, 512, 2048), (64, 512, 2048))], ids=["small", "large"])
@pytest.mark.parametrize(("size", "expected"), SIZES, ids=[str(size) for size, _ in SIZES])
def test_odd_latents_round_up(size: Any, expected: dict[int, list[int]], whole: ImageShapes) -> None:
    """Numbers written down: dividing pixels at once would give 72 / 32 = 2 for a convolution that makes 3."""
    narrow = narrowed(controlled(whole), shapes(1, size, 64))
    assert {times: sides[0] for times, sides in residuals_of(narrow).items()} == expected
    assert {times: sides[1] for times, sides in residuals_of(narrow).items()} == dict(SIZES[2][1])
    for times, (low, _, high) in expected.items():
        output = next(name for name, (_, halvings) in RESIDUALS.items() if halvings == times)
        dim = narrow.components[controlnet("canny")].outputs[output].shape[2]
        assert isinstance(dim, Range) == (low < high), "a plan of one extent is to be a fast fixed one"


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_one_size_is_fixed_throughout(guided: bool) -> None:
    """Without a single range left in any network, if there is one image a call and no guidance."""
    narrow = narrowed(controlled(guided=guided), shapes(1, 264, 504))
    varying = [(key, dim.name) for key, spec in tensors(narrow).items() for dim in spec.shape if isinstance(dim, Range)]
    if guided:
        assert {dim for _, dim in varying} == {"batch"}
        assert {name for (name, _), _ in varying} == {"unet", controlnet("canny")}
    else:
        assert varying == []
    made = narrow.components[controlnet("canny")].outputs
    for output, (channels, times) in RESIDUALS.items():
        sides = tuple(-(-side // 2**times) for side in (33, 63))
        assert extents_of(made[output])[0] == (1, channels, *sides)


@given(whole=inside, guided=st.booleans())
def test_the_whole_of_a_bundle_is_itself(whole: ImageShapes, guided: bool) -> None:
    """By default what is built is exactly what was exported."""
    bundle = controlled(whole, guided)
    assert narrowed(bundle, whole) == bundle


@given(part=inside, guided=st.booleans())
def test_a_part_is_what_would_have_been_exported(part: ImageShapes, guided: bool) -> None:
    """Narrowing a wide bundle gives the networks of a narrow one, unless that has fewer rows than guidance needs."""
    narrow, exported = narrowed(controlled(guided=guided), part), controlled(part, guided)
    if guided:  # one image twice is two rows, but a wide bundle's UNet can also run on one
        copies = {name: narrow.components[name] for name in (cond_embedding("canny"), "vae_decoder", "text_encoder")}
        assert copies == {name: exported.components[name] for name in copies}
    else:
        assert narrow.components == exported.components


@given(part=inside, within=st.data())
def test_a_part_of_a_part_is_a_part_of_the_whole(part: ImageShapes, within: st.DataObject) -> None:
    """In one step or two, also where a half had only one extent left after the first."""
    spans = [(part.batch, 1), (part.height, 8), (part.width, 8)]
    smaller = shapes(*(within.draw(spans_inside(span, multiple)) for span, multiple in spans))
    assert narrowed(narrowed(controlled(), part), smaller) == narrowed(controlled(), smaller)


def test_halves_of_other_dimensions_stay_as_they_are() -> None:
    """A newer exporter may halve more than images."""
    tokens = Range(name="tokens", min=1, opt=77, max=154).halved(1)
    bundle = controlled()
    spec = TensorSpec(dtype="float16", shape=(1, tokens))
    components = {**bundle.components, "unet": msgspec.structs.replace(bundle.components["unet"], outputs={"x": spec})}
    narrow = narrowed(msgspec.structs.replace(bundle, components=components), shapes(1, 256, 256))
    assert narrow.components["unet"].outputs == {"x": spec}


def test_plans_of_a_controlnet() -> None:
    """In folders of their kind inside the target's; written and read back."""
    bundle = controlled()
    name = target_name(target(), bundle)
    made = with_plans(target(), bundle, f"engines/{name}")
    plans = {plan.file: FileRecord(size=1, sha256="b" * 64) for plan in made.plans.values()}
    assert f"engines/{name}/controlnet/canny.engine" in plans
    whole = msgspec.structs.replace(bundle, engines={name: made}, files={**bundle.files, **plans})
    assert decode(encode(whole), "bundle.json") == whole
    assert target_name(target(), manifest()) != name, "a bundle with other networks has another target"


def test_plans_of_other_sizes_are_others() -> None:
    """Also where only halves differ in what a network takes; the ControlNet's weights are in the key."""

    def key(size: ImageShapes, weights: str, name: str) -> str:
        bundle = controlled(weights=weights)
        return plan_key(target(shapes=size), narrowed(bundle, size).components[name], onnx_hash(bundle, name))

    for name in NETWORKS:
        sizes = [shapes(1, 256, 256), shapes(1, 264, 256), shapes(2, 256, 256), shapes(1, (256, 256, 264), 256)]
        keys = [key(size, weights, name) for size in sizes for weights in "ab"]
        assert len(set(keys)) == len(keys), name
