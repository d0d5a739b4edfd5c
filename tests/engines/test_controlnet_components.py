"""ControlNets in a manifest: their names, their components, and dimensions that are a half or a quarter of others."""

from __future__ import annotations

import copy
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hypersd.engines.component_names import (
    RESIDUAL_INPUT,
    check_controlnet_name,
    cond_embedding,
    controlnet,
    residual_input,
)
from hypersd.engines.engine import NullEngine, varying_extents
from hypersd.engines.manifest import ControlNetOrigin, ControlNetSettings, check_relative, decode, encode
from hypersd.engines.specs import Component, Range, TensorSpec

from .test_manifest import DELETE, HASH, MANIFEST, WHERE, changed, refusal, text

UNET = MANIFEST["components"]["unet"]
WITHOUT_SLOT = {**UNET, "inputs": {name: spec for name, spec in UNET["inputs"].items() if name != "lora"}}

# --- names -----------------------------------------------------------------------------------------------------------

NAMES = ["canny", "sd-controlnet-canny", "controlnet-canny-sdxl-1.0", "control_v11p_sd15_canny", "1", "-", ".a", "..a"]
BAD_NAMES = ["", ".", "..", "...", "a/b", "../a", "/a", "a\\b", "a b", "a=b", "a:b", "a\n", "\x1b[31m", "ä", "x" * 101]


@pytest.mark.parametrize("name", [*NAMES, "x" * 100])
def test_names_of_repositories_are_names(name: str) -> None:
    """The Hub's repositories can keep theirs."""
    check_controlnet_name(name)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_no_name(name: str) -> None:
    """Refused with the name and what was expected, on one line."""
    with pytest.raises(ValueError, match=r"ControlNet name .*: expected letters, digits") as error:
        check_controlnet_name(name)
    assert "\n" not in str(error.value)


nasty = st.text(st.sampled_from("ab1._-/\\:=~*?\"'$ \t\n\0\u00e9\u0663\uff41"), max_size=8) | st.text(max_size=8)


@given(name=nasty | st.from_regex(r"[\w.-]{1,100}", fullmatch=True))
def test_an_accepted_name_is_one_folder(name: str) -> None:
    """An accepted name leads to no other folder on any system, and can stand in NAME=VALUE."""
    try:
        check_controlnet_name(name)
    except ValueError:
        return
    for component in (controlnet(name), cond_embedding(name)):
        for flavour in (PurePosixPath, PureWindowsPath):
            kind, folder = flavour(component).parts
            assert (kind, folder) == (component.split("/")[0], name)
        assert folder not in (".", "..")
        check_relative(f"{component}/model.onnx")
    assert name.isascii()
    assert name.isprintable()
    assert not set(name) & set("= /\\:")


def test_the_components_of_two_names_differ() -> None:
    """Neither kind takes the other's place, whatever the ControlNets are called."""
    components = [kind(name) for name in NAMES for kind in (controlnet, cond_embedding)]
    assert len(set(components)) == 2 * len(NAMES)


@pytest.mark.parametrize("output", ["mid_block_res_sample", *(f"down_block_res_sample_{i}" for i in (0, 8, 11))])
def test_what_a_residual_is_called_in_the_unet(output: str) -> None:
    """diffusers' names at both ends; the runtime knows the inputs by their pattern."""
    name = residual_input(output)
    assert name == output.replace("res_sample", "additional_residual")
    assert RESIDUAL_INPUT.fullmatch(name)
    assert not RESIDUAL_INPUT.fullmatch(output)


@pytest.mark.parametrize(
    "name",
    ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "cond_embedding", "conditioning_scale"],
)
def test_the_other_inputs_are_no_residuals(name: str) -> None:
    """They would be fed zeros."""
    assert not RESIDUAL_INPUT.fullmatch(name)


# --- the manifest ----------------------------------------------------------------------------------------------------

COMPONENTS = [controlnet("canny"), cond_embedding("canny")]
SETTINGS = {"conditioning_scale": 0.5, "preprocess": "canny"}


def controlled() -> dict[str, Any]:
    """The good manifest with a ControlNet."""
    manifest = copy.deepcopy(MANIFEST)
    residual = {"dtype": "float32", "shape": [1, 32, 4, 4]}
    manifest["components"]["unet"]["inputs"]["mid_block_additional_residual"] = residual
    for name in COMPONENTS:
        file = f"{name}/model.onnx"
        made = {"outputs": {"mid_block_res_sample": residual}, "files": [file]}
        manifest["components"][name] = {**WITHOUT_SLOT, **made}
        manifest["files"][file] = {"size": 3, "sha256": HASH}
    manifest["controlnets"] = {"canny": dict(SETTINGS)}
    manifest["origin"]["controlnets"] = {"canny": {"location": "a/canny", "revision": "c0ffee"}}
    return manifest


def test_controlnets_are_read_back() -> None:
    """Settings and origins, nothing lost on the way to the disk and back."""
    manifest = decode(text(controlled()), WHERE)
    assert manifest.controlnets == {"canny": ControlNetSettings(conditioning_scale=0.5, preprocess="canny")}
    assert manifest.origin.controlnets == {"canny": ControlNetOrigin(location="a/canny", revision="c0ffee")}
    assert decode(encode(manifest), WHERE) == manifest
    assert encode(decode(encode(manifest), WHERE)) == encode(manifest)


def test_bundles_from_before_there_were_controlnets_are_read() -> None:
    """Older ones have neither key, and are bundles without any."""
    older = changed("controlnets", to={})
    del older["controlnets"]
    older["origin"].pop("controlnets", None)
    manifest = decode(text(older), WHERE)
    assert (manifest.controlnets, manifest.origin.controlnets) == ({}, {})


def test_settings_have_defaults() -> None:
    """diffusers': a scale of 1, and a control image as it is given."""
    manifest = controlled()
    manifest["controlnets"]["canny"] = {}
    expected = ControlNetSettings(conditioning_scale=1.0, preprocess="none")
    assert decode(text(manifest), WHERE).controlnets["canny"] == expected


@pytest.mark.parametrize("absent", [COMPONENTS[:1], COMPONENTS[1:], COMPONENTS], ids=" ".join)
def test_a_controlnet_without_its_networks(absent: list[str]) -> None:
    """It is noticed when the bundle is opened, not at the first image; the message names everything that is missing."""
    manifest = controlled()
    for name in absent:
        del manifest["components"][name]
    message = refusal(text(manifest))
    assert "ControlNet canny without its" in message
    assert [name for name in COMPONENTS if name in message] == absent


@pytest.mark.parametrize("taken", [{}, {"down_block_additional_residual_0": {"dtype": "float32", "shape": [1]}}])
def test_a_unet_that_takes_no_residuals(taken: dict[str, Any]) -> None:
    """A ControlNet put into a plain bundle by hand is rejected when it is opened, not at the first image."""
    manifest = controlled()
    manifest["components"]["unet"]["inputs"] = UNET["inputs"] | taken
    assert "mid_block_additional_residual" in refusal(text(manifest))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_controlnet_of_another_name(name: str) -> None:
    """A name that no export gives is rejected, even with components for it."""
    manifest = controlled()
    manifest["controlnets"] = {name: SETTINGS}
    for kind in (controlnet, cond_embedding):
        manifest["components"][kind(name)] = WITHOUT_SLOT
    assert "ControlNet name" in refusal(text(manifest))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("controlnets", "canny", "preprocess"), "depth", "depth"),
        (("controlnets", "canny", "conditioning_scale"), "1", "float"),
        (("controlnets", "canny", "surprise"), 1, "`surprise`"),
        (("origin", "controlnets", "canny", "surprise"), 1, "`surprise`"),
        (("origin", "controlnets", "canny", "location"), DELETE, "`location`"),
        (("controlnets",), ["canny"], "controlnets"),
        (("controlnets",), None, "controlnets"),
    ],
    ids=lambda value: "DELETE" if value is DELETE else str(value)[:40],
)
def test_controlnets_of_another_schema(place: tuple[str, ...], value: Any, words: str) -> None:
    """Nothing that this version does not know is ignored."""
    manifest = controlled()
    *inside, last = place
    holder: Any = manifest
    for key in inside:
        holder = holder[key]
    if value is DELETE:
        del holder[last]
    else:
        holder[last] = value
    assert words in refusal(text(manifest))


# --- halved dimensions -----------------------------------------------------------------------------------------------

MOST = 9  # times: 512, the last divisor of three digits
extents = st.integers(1, 10**6)
ranges = st.builds(
    lambda name, ends: Range(name=name, min=ends[0], opt=ends[1], max=ends[2]),
    st.sampled_from(["latent_height", "latent_width", "batch", "a_divide", "div2"]),
    st.tuples(extents, extents, extents).map(sorted),
)


def one_by_one(extent: int, times: int) -> int:
    """So many convolutions of kernel 3, stride 2 and padding 1."""
    for _ in range(times):
        extent = (extent + 2 - 3) // 2 + 1
    return extent


@given(wide=ranges, times=st.integers(0, MOST))
def test_halved_is_halved_one_by_one(wide: Range, times: int) -> None:
    """All three ends stay in order, are what the convolutions give, and at least 1."""
    half = wide.halved(times)
    assert [half.min, half.opt, half.max] == [one_by_one(end, times) for end in (wide.min, wide.opt, wide.max)]
    assert 1 <= half.min <= half.opt <= half.max
    assert half.is_halved == (times > 0)
    if not times:
        assert half == wide


@given(wide=ranges, times=st.integers(0, MOST), data=st.data())
def test_the_extent_follows_from_the_whole(wide: Range, times: int, data: st.DataObject) -> None:
    """Inside the halved range for all of the whole's; one that is known itself wins; of others nothing follows."""
    half = wide.halved(times)
    whole = data.draw(st.integers(wide.min, wide.max))
    extent = half.extent({wide.name: whole, "another": 77})
    assert extent == one_by_one(whole, times)
    assert extent is not None
    assert half.min <= extent <= half.max
    assert half.extent({wide.name: whole, half.name: 3}) == 3
    assert half.extent({"another": 77, f"{wide.name}s": 5}) is None


@pytest.mark.parametrize("name", ["latent_height", "height_div", "div2", "_div", "a_div2b", "a_div2\n", "a_div1234"])
def test_other_names_are_not_halved(name: str) -> None:
    """They vary by themselves."""
    wide = Range(name=name, min=1, opt=2, max=3)
    assert not wide.is_halved
    assert wide.extent({"a": 8, "height": 8}) is None


@pytest.mark.parametrize("name", ["height_div0", "height_div00", "height_div000"])
def test_a_divisor_of_zero(name: str) -> None:
    """A manifest may hold any name: it must not end in a ZeroDivisionError when the network is run."""
    spec = TensorSpec(dtype="float32", shape=(Range(name=name, min=1, opt=2, max=3),))
    assert spec.shape_at({"height": 8}) == (2,)


def latents(name: str = "latent_height", low: int = 8, usual: int = 9, high: int = 16) -> Range:
    return Range(name=name, min=low, opt=usual, max=high)


SAMPLE = TensorSpec(dtype="float16", shape=(latents("batch", 1, 1, 4), 4, latents(), latents("latent_width", 8, 8, 8)))
HALVED = TensorSpec(
    dtype="float16",
    shape=(latents("batch", 1, 1, 4), 32, latents().halved(2), latents("latent_width", 8, 8, 8).halved(1)),
)


@given(rows=st.integers(1, 4), height=st.integers(8, 16))
def test_shapes_and_extents_are_each_others_inverse(rows: int, height: int) -> None:
    """A tensor's extents give its shape again, and that of what is made from it."""
    shape = (rows, 4, height, 8)
    found = SAMPLE.extents(shape)
    assert found == {"batch": rows, "latent_height": height, "latent_width": 8}
    assert SAMPLE.shape_at(found) == shape
    assert HALVED.shape_at(found) == (rows, 32, one_by_one(height, 2), 4)
    assert HALVED.accepts(HALVED.shape_at(found))
    assert HALVED.shape_at(HALVED.extents(HALVED.shape_at(found))) == HALVED.shape_at(found)


def test_what_is_not_known_has_its_usual_extent() -> None:
    """A tensor of the manifest can be made before any is there."""
    assert SAMPLE.shape_at({}) == (1, 4, 9, 8)
    assert HALVED.shape_at({"batch": 3}) == (3, 32, 3, 4)


def test_extents_of_a_tensor_that_does_not_fit() -> None:
    """The engine says what is wrong with it, so this does not."""
    assert SAMPLE.extents((2, 4)) == {"batch": 2}
    assert SAMPLE.extents((2, 4, 9, 8, 7)) == {"batch": 2, "latent_height": 9, "latent_width": 8}


def test_extents_of_several_inputs() -> None:
    """Each input says what it knows; of tensors that are no inputs nothing is taken."""
    specs = {"sample": SAMPLE, "text": TensorSpec(dtype="float32", shape=(latents("tokens", 1, 77, 99), 8))}
    feeds = {"sample": torch.zeros(2, 4, 9, 8), "text": torch.zeros(5, 8), "other": torch.zeros(3)}
    known = {"batch": 2, "latent_height": 9, "latent_width": 8, "tokens": 5}
    assert varying_extents(specs, feeds) == known
    assert varying_extents(specs, {"text": feeds["text"]}) == {"tokens": 5}


# --- the null engine -------------------------------------------------------------------------------------------------


def null_engine(sample: TensorSpec) -> NullEngine:
    outputs = {"half": HALVED, "whole": sample}
    return NullEngine("net", Component(inputs={"sample": sample}, outputs=outputs, files=("x",), key="0" * 64))


@pytest.mark.parametrize(("height", "quarter"), [(8, 2), (9, 3), (12, 3), (13, 4)])
def test_null_engines_halve_what_they_are_given(height: int, quarter: int) -> None:
    """Outputs that follow from an input's dimension do so at every size, in their own dtype."""
    made = null_engine(SAMPLE).run({"sample": torch.zeros(2, 4, height, 8, dtype=torch.float16)})
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        "half": (2, 32, quarter, 4),
        "whole": (2, 4, height, 8),
    }
    assert {tensor.dtype for tensor in made.values()} == {torch.float16}


def test_null_engines_of_fixed_inputs() -> None:
    """A dimension that no input determines has its usual extent."""
    fixed = TensorSpec(dtype="float16", shape=(1, 4, 13, 8))
    made = null_engine(fixed).run({"sample": torch.zeros(1, 4, 13, 8, dtype=torch.float16)})
    assert tuple(made["half"].shape) == (1, 32, 3, 4)
