"""The manifest: what is written is read back, and everything else is rejected in one line."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from small_manifests import HASH, shapes, small_manifest

from hypersd.engines.manifest import SCHEMA_VERSION, Manifest, check_relative, decode, encode
from hypersd.engines.specs import Range, TensorSpec, dim_range
from hypersd.errors import BundleError, UserError
from hypersd.runtime.params import Params, decide
from hypersd.runtime.request import make_plan, make_settings
from hypersd.samplers import make_sampler
from hypersd.samplers.schedule import SchedulerConfig

WHERE = "some/bundle.json"
MANIFEST: dict[str, Any] = small_manifest(
    shapes(batch=(1, 1, 2), height=(64, 64, 128), width=(64, 64, 64)),
    scheduler={"beta_start": 0.00085, "trained_betas": None},
    vae={"scaling_factor": 0.18215, "spatial": 8, "latent_channels": 4, "tiny": False},
    controlnets={},
    components={
        "unet": {
            "inputs": {
                "sample": {
                    "dtype": "float32",
                    "shape": [{"name": "batch", "min": 1, "opt": 1, "max": 2}, 4, 8, 8],
                    "rows_per_image": 1,
                },
                "lora": {"dtype": "float32", "shape": [2 * (3 + 5 + 7 + 4)], "rows_per_image": 1},
            },
            "outputs": {"out_sample": {"dtype": "float32", "shape": [1, 4, 8, 8], "rows_per_image": 1}},
            "files": ["unet/model.onnx", "unet/model.onnx_data"],
            "key": HASH,
            "graph": HASH,
        }
    },
    lora_slot={
        "rank": 2,
        "layers": {
            "unet": {
                "attentions.0.to_q": {"weight": [5, 3], "down": 0, "up": 0},
                "resnets.0.conv1": {"weight": [8, 8, 3, 3], "down": None, "up": None},
                "attentions.0.proj_out": {"weight": [4, 7, 1, 1], "down": 3, "up": 5},
            }
        },
    },
    files={
        "unet/model.onnx": {"size": 3, "sha256": HASH},
        "unet/model.onnx_data": {"size": 0, "sha256": HASH},
    },
    origin={
        "base": "a/b",
        "revision": None,
        "variant": None,
        "vae": None,
        "vae_revision": None,
        "lora_scale": 1.0,
        "added_lora_scales": [],
        "controlnets": {},
        "weights": {
            "unet": [
                {"filename": "x.safetensors", "size": 9, "sha256": HASH, "repo": "a/b", "revision": None, "path": None}
            ]
        },
    },
    versions={"hypersd": "0.1.0"},
)
PLAN = "engines/some-target/unet.engine"
TARGET: dict[str, Any] = {
    "backend": "tensorrt-rtx",
    "version": "1.7.1.116",
    "compute_capabilities": ["8.9"],
    "platform": "linux-x86_64",
    "precision": "fp32",
    "shapes": MANIFEST["shapes"],
    "optimization_level": None,
    "stripped": False,
    "plans": {
        "unet": {
            "file": PLAN,
            "onnx": HASH,
            "key": HASH,
            "seconds": 77.5,
            "host_memory": 17_000_000_000,
            "weights_memory": None,
            "activation_memory": 0,
            "decomposed_attention": ["attention_1"],
            "error": 0.001,
        }
    },
}
MANIFEST["files"][PLAN] = {"size": 7, "sha256": HASH}
MANIFEST["engines"] = {"some-target": TARGET}
ONE_GRAPH: dict[str, Any] = {
    "network": {
        "inputs": {"latents": {"dtype": "float32", "shape": [1, 4, 8, 8], "rows_per_image": 1}},
        "outputs": {"images": {"dtype": "uint8", "shape": [1, 64, 64, 3], "rows_per_image": 1}},
        "files": ["one-graph-2steps.onnx", "unet/model.onnx_data"],
        "key": HASH,
        "graph": None,
    },
    "num_inference_steps": 2,
    "timesteps": None,
    "eta": 0.5,
    "batch": 1,
    "height": 64,
    "width": 64,
}
MANIFEST["files"]["one-graph-2steps.onnx"] = {"size": 5, "sha256": HASH}
MANIFEST["one_graphs"] = {"one-graph-2steps": ONE_GRAPH}
MANIFEST["random_weights"] = True
DELETE = object()


def text(manifest: Any) -> bytes:
    return json.dumps(manifest).encode()


def changed(*keys: str | int, to: Any) -> dict[str, Any]:
    """A copy of the good manifest with one value replaced, added or (``DELETE``) removed."""
    manifest = copy.deepcopy(MANIFEST)
    place: Any = manifest
    for key in keys[:-1]:
        place = place[key]
    if to is DELETE:
        del place[keys[-1]]
    else:
        place[keys[-1]] = to
    return manifest


def refusal(raw: bytes) -> str:
    """The message with which ``decode`` rejects a manifest."""
    with pytest.raises(BundleError) as caught:
        decode(raw, WHERE)
    message = str(caught.value)
    assert "\n" not in message
    assert "\r" not in message
    assert message.startswith(WHERE)
    return message


def test_what_is_written_is_read_back() -> None:
    """Protects the format: nothing is lost or changed on the way to the disk and back."""
    manifest = decode(text(MANIFEST), WHERE)
    assert json.loads(encode(manifest)) == MANIFEST
    assert decode(encode(manifest), WHERE) == manifest
    assert encode(decode(encode(manifest), WHERE)) == encode(manifest)


def test_optional_fields_may_be_absent() -> None:
    """Protects what the schema calls optional: an absent key is its default, not an error."""
    assert decode(text(changed("sampler", "timesteps", to=DELETE)), WHERE).sampler.timesteps is None
    assert decode(text(changed("origin", "lora_scale", to=DELETE)), WHERE).origin.lora_scale is None


def test_added_loras_are_described_as_add_lora_takes_them() -> None:
    """Of local files the name alone: image metadata holds it too."""
    file = MANIFEST["origin"]["weights"]["unet"][0]
    local = file | {"repo": None, "path": "/home/me/style.safetensors", "filename": "style.safetensors"}
    weights = {"added_lora/1": [file], "added_lora/2": [local]}
    fields = changed("origin", to=MANIFEST["origin"] | {"weights": weights, "added_lora_scales": [0.5, 1]})
    assert decode(text(fields), WHERE).origin.described_loras == ["a/b/x.safetensors:0.5", "style.safetensors:1"]


def test_a_scale_without_its_lora_is_rejected() -> None:
    assert "a scale without its LoRA: added_lora/1" in refusal(text(changed("origin", "added_lora_scales", to=[0.5])))


def test_bundles_from_before_there_were_engines_are_read() -> None:
    """Older bundles have no ``engines``, and are bundles without any."""
    older = decode(text(changed("engines", to=DELETE)), WHERE)
    assert older.engines == {}
    assert older == decode(text(changed("engines", to={})), WHERE)


def test_bundles_from_before_there_were_one_graphs_are_read() -> None:
    """Older bundles have no ``one_graphs``, and are bundles without any."""
    older = decode(text(changed("one_graphs", to=DELETE)), WHERE)
    assert older.one_graphs == {}
    assert older == decode(text(changed("one_graphs", to={})), WHERE)


def test_bundles_from_before_there_were_random_weights_have_real_ones() -> None:
    """Older bundles lack the field, and still work."""
    assert not decode(text(changed("random_weights", to=DELETE)), WHERE).random_weights


BAD_SLOTS = {
    "rank": (("rank",), 4, "are not those of the LoRA slot"),
    "rank zero": (("rank",), 0, "rank"),
    "gap": (("layers", "unet", "attentions.0.proj_out", "down"), 4, "the place of attentions.0.proj_out"),
    "overlap": (("layers", "unet", "attentions.0.proj_out", "up"), 4, "the place of attentions.0.proj_out"),
    "half a place": (("layers", "unet", "resnets.0.conv1", "up"), 9, "the place of resnets.0.conv1"),
    "no matrix": (("layers", "unet", "attentions.0.to_q", "weight"), [5], "the place of attentions.0.to_q"),
    "another component": (("layers",), {"vae": {"x": {"weight": [1, 1], "down": 0, "up": 0}}}, "not those of"),
}


@pytest.mark.parametrize(("place", "value", "said"), BAD_SLOTS.values(), ids=BAD_SLOTS)
def test_slots_whose_places_are_not_those_of_the_graph_are_rejected(
    place: tuple[str, ...], value: Any, said: str
) -> None:
    """A LoRA in the wrong place would be a wrong image without a word."""
    assert said in refusal(text(changed("lora_slot", *place, to=value)))


def test_a_slot_without_its_input_and_an_input_without_its_slot_are_rejected() -> None:
    assert "not those of the LoRA slot" in refusal(text(changed("lora_slot", to=None)))
    assert "not those of the LoRA slot" in refusal(text(changed("components", "unet", "inputs", "lora", to=DELETE)))


BAD_ONE_GRAPHS = {
    "another's file": (
        {"network": {**ONE_GRAPH["network"], "files": ["unet/model.onnx"]}},
        "expected one-graph-",
    ),
    "weights of nobody": (
        {"network": {**ONE_GRAPH["network"], "files": ["one-graph-2steps.onnx", "vae/model.onnx_data"]}},
        "files of no component: vae/model.onnx_data",
    ),
    "no steps": ({"num_inference_steps": None}, "either num_inference_steps or timesteps"),
    "no timesteps": ({"num_inference_steps": None, "timesteps": []}, "either num_inference_steps or timesteps"),
    "both": ({"timesteps": [999, 499]}, "either num_inference_steps or timesteps"),
    "eta": ({"eta": 1.5}, "eta"),
    "height": ({"height": 256}, "height 256 is outside the bundle's 64..128"),
    "batch": ({"batch": 3}, "batch 3 is outside"),
}


@pytest.mark.parametrize(("changes", "said"), BAD_ONE_GRAPHS.values(), ids=BAD_ONE_GRAPHS)
def test_one_graphs_that_cannot_be_are_rejected(changes: dict[str, Any], said: str) -> None:
    """A one-graph is a file of its own that reads the components' weights, for settings that the bundle has."""
    assert said in refusal(text(changed("one_graphs", "one-graph-2steps", to={**ONE_GRAPH, **changes})))


@pytest.mark.parametrize("name", ["", "unet", "one-graph-", "one-graph-../unet", "one-graph-a b", "one-graph-a\n"])
def test_a_one_graph_is_named_as_its_file(name: str) -> None:
    """Its name goes into a path and to terminals."""
    rejected = refusal(text(changed("one_graphs", to={name: ONE_GRAPH})))
    assert "one-graph name" in rejected


def test_a_one_graph_without_a_record_is_rejected() -> None:
    """Without a size and a digest nobody sees that it was shortened or altered."""
    rejected = refusal(text(changed("files", "one-graph-2steps.onnx", to=DELETE)))
    assert "without a record of its file" in rejected


def test_plans_without_a_record_are_rejected() -> None:
    """A plan is machine code: there must be a size and a digest to hold it to."""
    rejected = refusal(text(changed("files", PLAN, to=DELETE)))
    assert PLAN in rejected
    assert "without a record" in rejected


def test_plans_of_networks_that_are_not_there_are_rejected() -> None:
    """Nothing says which inputs such a plan has."""
    file = PLAN.replace("unet", "controlnet")
    manifest = changed("engines", "some-target", "plans", "controlnet", to={**TARGET["plans"]["unet"], "file": file})
    manifest["files"][file] = MANIFEST["files"][PLAN]
    rejected = refusal(text(manifest))
    assert "controlnet" in rejected
    assert "not there" in rejected


PLACES = ["../unet.engine", "/unet.engine", "engines\\unet.engine", "engines/a\nb.engine", "unet/model.onnx"]


@pytest.mark.parametrize("name", [*PLACES, "engines/other/unet.engine"])
def test_a_plan_lies_in_its_targets_folder(name: str) -> None:
    """Record or not: a target is deleted as a whole, and no file of another is to be taken for a plan."""
    manifest = changed("engines", "some-target", "plans", "unet", "file", to=name)
    manifest["files"].setdefault(name, MANIFEST["files"][PLAN])
    rejected = refusal(text(manifest))
    assert "file name" in rejected or f"expected {PLAN}" in rejected


@pytest.mark.parametrize("name", ["", ".", "..", "../unet", "a/b", "a\\b", "a\nb", "a\x1b[31m", "ä b"])
def test_a_target_is_one_folder(name: str) -> None:
    """Its name is what ``hypersd build --remove`` deletes and what terminals are shown."""
    assert "target name" in refusal(text(changed("engines", to={name: {**TARGET, "plans": {}}})))


def test_a_target_shows_nothing_but_text() -> None:
    """Versions go to the terminal."""
    assert "cannot be shown" in refusal(text(changed("engines", "some-target", "version", to="1\x1b[31m")))


def test_a_target_is_a_part_of_its_bundle() -> None:
    """Wider plans than networks were never built: the manifest was changed by hand."""
    wide = {"name": "batch", "min": 1, "opt": 1, "max": 63}
    rejected = refusal(text(changed("engines", "some-target", "shapes", to={**MANIFEST["shapes"], "batch": wide})))
    assert "batch 1..63 is outside the bundle's" in rejected


@given(low=st.integers(1, 10**6), more=st.integers(0, 10**6), most=st.integers(0, 10**6), factor=st.integers(1, 64))
def test_ranges_keep_their_order(low: int, more: int, most: int, factor: int) -> None:
    """Protects every shape: ordered extents make a range, also divided, and disordered ones are rejected."""
    dim = Range(name="height", min=low, opt=low + more, max=low + more + most)
    pixels = Range(name="pixels", min=dim.min * factor, opt=dim.opt * factor, max=dim.max * factor)
    assert pixels.divided(factor, "height") == dim
    assert dim_range(low) == Range(name="fixed", min=low, opt=low, max=low)
    if more or most:
        with pytest.raises(ValueError, match="min <= opt <= max"):
            Range(name="height", min=dim.max, opt=dim.opt, max=dim.min)


def test_tensor_specs_accept_what_lies_in_range() -> None:
    """Protects the input check of every engine: rank, fixed extents and both ends of a range."""
    spec = TensorSpec(dtype="float32", shape=(Range(name="batch", min=2, opt=2, max=4), 3))
    assert [spec.accepts((n, 3)) for n in range(1, 6)] == [False, True, True, True, False]
    assert not spec.accepts((2, 4))
    assert not spec.accepts((2,))
    assert not spec.accepts((2, 3, 1))
    assert str(spec) == "float32[2..4, 3]"


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 1000, 10**30])
def test_a_newer_schema_version_asks_for_an_upgrade(version: int) -> None:
    """A bundle of tomorrow says so, whatever else it holds: its other keys are not even looked at."""
    message = refusal(text({"schema_version": version, "of": "tomorrow"}))
    assert str(version) in message
    assert f"reads {SCHEMA_VERSION}" in message
    assert "upgrade hypersd" in message


@pytest.mark.parametrize("version", [0, 1, True, -1, "2", 0.5, None, [2], {}, "a\nb"])
def test_other_schema_versions_ask_for_an_export(version: Any) -> None:
    """An older version, or one of a strange type, cannot be mended by an upgrade."""
    message = refusal(text(changed("schema_version", to=version)))
    assert repr(version) in message
    assert "export it again" in message


@pytest.mark.parametrize("version", [float(SCHEMA_VERSION)])
def test_what_only_equals_the_version_is_rejected(version: Any) -> None:
    """3 == 3.0 in Python: a version is a whole number all the same."""
    assert "schema_version" in refusal(text(changed("schema_version", to=version)))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b'"schema_version"',
        b"{}",
        b'{"schema": 1}',
        b"\x00\xff\xfe\x80binary",
        b"\x7fELF" * 100,
        b"[" * 200_000,
        text(MANIFEST)[:-1],
        text(MANIFEST) + b"}",
        text(MANIFEST).replace(b"0.18215", b"NaN"),
        text(MANIFEST).replace(b"0.18215", b"-Infinity"),
        text(MANIFEST).replace(b"0.18215", b"1e999"),
        text(MANIFEST).replace(b'"a/b"', b'"\\ud800"'),
        text(MANIFEST).replace(b'"a/b"', b'"\xff"'),
        text(MANIFEST).replace(b"23", b"9" * 5000),
        text(MANIFEST).replace(b"0.00085", b"[" * 20_000 + b"]" * 20_000),
        text(MANIFEST).decode().encode("utf-16"),
        b"\xef\xbb\xbf" + text(MANIFEST),
    ],
    ids=lambda raw: repr(raw[:12]) + str(len(raw)),
)
def test_what_is_not_strict_json_is_rejected(raw: bytes) -> None:
    """Garbage, half a file, Python's own JSON dialect and JSON bombs all end as a refusal."""
    refusal(raw)


@pytest.mark.parametrize(
    "place",
    [
        (),
        ("shapes",),
        ("shapes", "batch"),
        ("sampler",),
        ("vae",),
        ("components", "unet"),
        ("origin",),
        ("engines", "some-target"),
        ("engines", "some-target", "plans", "unet"),
    ],
)
def test_unknown_keys_are_rejected_by_name(place: tuple[str, ...]) -> None:
    """A setting that this version does not know must not be ignored: it would silently generate another image."""
    assert "`surprise`" in refusal(text(changed(*place, "surprise", to=1)))


def test_an_unknown_key_with_a_line_break_stays_on_one_line() -> None:
    """The message quotes the file: what the file holds must not break the line."""
    assert "surprise" in refusal(text(changed("surprise\nsecond line\r\n", to=1)))


@pytest.mark.parametrize(
    "keys",
    [
        ("checkpoint",),
        ("shapes",),
        ("shapes", "batch", "opt"),
        ("sampler", "kind"),
        ("vae", "scaling_factor"),
        ("force_zeros_for_empty_prompt",),
        ("components", "unet", "files"),
        ("components", "unet", "inputs", "sample", "dtype"),
        ("files", "unet/model.onnx", "sha256"),
        ("origin", "base"),
        ("origin", "weights", "unet", 0, "size"),
        ("engines", "some-target", "version"),
        ("engines", "some-target", "compute_capabilities"),
        ("engines", "some-target", "plans", "unet", "onnx"),
    ],
    ids=str,
)
def test_missing_keys_are_rejected_by_name(keys: tuple[str | int, ...]) -> None:
    """Nothing that the runtime needs has a silent default."""
    assert f"`{keys[-1]}`" in refusal(text(changed(*keys, to=DELETE)))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("opset",), True),
        (("opset",), "23"),
        (("opset",), 23.5),
        (("opset",), 0),
        (("files", "unet/model.onnx", "size"), -1),
        (("files", "unet/model.onnx", "size"), True),
        (("files", "unet/model.onnx", "size"), None),
        (("files", "unet/model.onnx", "sha256"), HASH.upper()),
        (("files", "unet/model.onnx", "sha256"), HASH + "\n"),
        (("files", "unet/model.onnx", "sha256"), HASH[1:]),
        (("files",), []),
        (("precision",), "int4"),
        (("sampler", "kind"), 7),
        (("sampler", "eta"), "1"),
        (("sampler", "eta"), True),
        (("sampler", "allowed_steps"), [0]),
        (("sampler", "allowed_steps"), 1),
        (("sampler", "timesteps"), [-1]),
        (("force_zeros_for_empty_prompt",), 0),
        (("vae", "spatial"), 0),
        (("components", "unet", "inputs", "sample", "dtype"), "bfloat16"),
        (("components", "unet", "inputs", "sample", "shape"), [0]),
        (("components", "unet", "inputs", "sample", "shape"), [True]),
        (("components", "unet", "inputs", "sample", "shape"), ["batch"]),
        (("components", "unet", "key"), ""),
        (("components", "unet", "graph"), HASH[1:]),
        (("origin", "weights"), None),
        (("versions", "hypersd"), 1),
        (("engines",), []),
        (("engines", "some-target", "backend"), "onnxruntime"),
        (("engines", "some-target", "compute_capabilities"), "8.9"),
        (("engines", "some-target", "compute_capabilities"), [8.9]),
        (("engines", "some-target", "optimization_level"), 6),
        (("engines", "some-target", "optimization_level"), -1),
        (("engines", "some-target", "stripped"), 0),
        (("engines", "some-target", "plans", "unet", "key"), HASH[1:]),
        (("engines", "some-target", "plans", "unet", "host_memory"), -1),
        (("engines", "some-target", "plans", "unet", "error"), "small"),
    ],
    ids=str,
)
def test_wrong_values_are_rejected(keys: tuple[str | int, ...], value: Any) -> None:
    """No value is coerced: a bool is no number, a number no string, a size not negative, a digest 64 hex digits."""
    refusal(text(changed(*keys, to=value)))


@pytest.mark.parametrize("extents", [(3, 2, 4), (2, 5, 4), (4, 3, 2), (2, 1, 2)])
def test_disordered_ranges_are_rejected(extents: tuple[int, int, int]) -> None:
    """A range must hold its own usual extent, in the image's shapes, in a plan's and in a tensor's alike."""
    wrong = dict(zip(("min", "opt", "max"), extents, strict=True), name="batch\nx")
    assert "min <= opt <= max" in refusal(text(changed("shapes", "batch", to=wrong)))
    assert "min <= opt <= max" in refusal(text(changed("engines", "some-target", "shapes", "batch", to=wrong)))
    assert "min <= opt <= max" in refusal(text(changed("components", "unet", "inputs", "sample", "shape", 0, to=wrong)))


@pytest.mark.parametrize("files", [["unet/other.onnx"], ["unet/model.onnx", "unet/other\n.bin"]])
def test_component_files_without_a_record_are_rejected(files: list[str]) -> None:
    """Every file that is loaded has a size and a digest to hold it to."""
    assert "other" in refusal(text(changed("components", "unet", "files", to=files)))


@pytest.mark.parametrize("files", [[], ["unet/model.onnx", "unet/model.onnx"]], ids=["none", "twice"])
def test_a_component_has_one_onnx_file_and_names_each_file_once(files: list[str]) -> None:
    """A component without an ONNX file cannot be loaded, and one file is not two: both are mistakes of the writer."""
    refusal(text(changed("components", "unet", "files", to=files)))


def with_file(name: str) -> bytes:
    return text(changed("files", to={**MANIFEST["files"], name: {"size": 1, "sha256": HASH}}))


visible = st.characters(categories=("L", "M", "N", "P", "S"), exclude_characters="/\\:")
parts = st.text(visible, min_size=1, max_size=8)
folders = st.lists(parts.filter(lambda part: part != ".."), max_size=3)


@given(before=folders, after=folders)
def test_parent_folders_are_rejected(before: list[str], after: list[str]) -> None:
    """Protects everything outside the bundle: no '..', however deep in the name."""
    assert "leads out" in refusal(with_file("/".join([*before, "..", *after])))


@given(names=folders, prefix=st.sampled_from(["/", "//", "///", "C:", "c:/", "C:\\", "\\", "\\\\host\\", "file:///"]))
def test_absolute_paths_are_rejected_on_any_system(names: list[str], prefix: str) -> None:
    """A bundle written on one system is read on another: roots, drive letters and shares are rejected."""
    assert "leads out" in refusal(with_file(prefix + "/".join(names)))


@given(before=st.text(max_size=5), after=st.text(max_size=5), bad=st.sampled_from(["\\", "\0", ":"]))
def test_separators_of_other_systems_are_rejected(before: str, after: str, bad: str) -> None:
    """Backslash, NUL and colon (drives, alternate data streams) have no place in a bundle's names."""
    assert "leads out" in refusal(with_file(before + bad + after))


def test_the_empty_name_is_rejected() -> None:
    """The empty name would be the bundle's folder itself."""
    assert "leads out" in refusal(with_file(""))


@given(names=folders.filter(bool))
def test_plain_names_pass(names: list[str]) -> None:
    """The check rejects what leads out and not what is merely unusual."""
    check_relative("/".join(names))


# Fuzzing

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["..", "/etc/passwd", "a\nb", "\ud800", HASH, "float32", "sd15"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of every value inside a JSON value."""
    if not isinstance(value, dict | list):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


PLACES = [place for place in places(MANIFEST) if place]


def value_at(place: tuple[str | int, ...]) -> Any:
    value: Any = MANIFEST
    for key in place:
        value = value[key]
    return None if isinstance(value, bool) else value


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """The good manifest with one to three values replaced, removed or renamed, then perhaps a few bytes changed."""
    manifest = copy.deepcopy(MANIFEST)
    for _ in range(draw(st.integers(1, 3))):
        *inside, last = draw(st.sampled_from(PLACES))
        place: Any = manifest
        try:
            for key in inside:
                place = place[key]
            kind = draw(st.sampled_from(["replace", "delete", "add", "rename"]))
            if kind == "replace":
                place[last] = draw(junk)
            elif kind == "delete":
                del place[last]
            elif kind == "add":
                place[draw(st.text(max_size=8))] = draw(junk)
            else:
                place[draw(st.text(max_size=8))] = place.pop(last)
        except (LookupError, TypeError, AttributeError):
            continue  # an earlier change took this place away
    raw = bytearray(text(manifest))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(raw) - 1))
        raw[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(raw)


def read_or_refuse(raw: bytes) -> None:
    """Fails unless the bytes are a manifest that can be written again, or are rejected in one line."""
    rejected = ""
    try:
        manifest = decode(raw, WHERE)
    except BundleError as error:
        rejected = str(error)
    else:
        assert isinstance(manifest, Manifest)
        assert decode(encode(manifest), WHERE) == manifest
        for component in manifest.components.values():
            assert component.onnx in manifest.files
        for target in manifest.engines.values():
            assert all(plan.file in manifest.files for plan in target.plans.values())
    assert "\n" not in rejected
    assert "\r" not in rejected


@given(raw=mutated())
@example(raw=text(changed("scheduler", "x", to=float("nan"))))
@example(raw=text(changed("components", "unet", "files", to=[])))
def test_mutations_are_read_or_rejected(raw: bytes) -> None:
    """Any change to a manifest's bytes gives a manifest or a BundleError of one line, nothing else."""
    read_or_refuse(raw)


@given(raw=st.binary(max_size=200) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_noise_is_read_or_rejected(raw: bytes) -> None:
    """The same for bytes that were never a manifest."""
    read_or_refuse(raw)


# Everything that reads a manifest before an engine runs

NUMBERS = [place for place in PLACES if isinstance(value_at(place), int | float)]
extreme = st.sampled_from([-1, 0, 2**31, 2**53 + 1, 2**62, 2**70, -(2**70), 10**400, 1e-300, 1e300, -0.5, 1.5])
constants = st.dictionaries(
    st.sampled_from([*(field.name for field in dataclasses.fields(SchedulerConfig)), "kind", "self", "thresholding"]),
    extreme | junk | st.text(min_size=5000, max_size=5000) | st.lists(extreme, max_size=3),
    max_size=2,
)


def use(raw: bytes) -> None:
    """All that is decided before the first run: sampler, request, steps; or a UserError of readable length."""
    try:
        manifest = decode(raw, WHERE)
        sampler = make_sampler(manifest.sampler.kind, **manifest.scheduler)
        request = decide(manifest, Params(prompt="a cat"))
        plan = make_plan(sampler, request)
        make_settings(manifest, request, plan, "pil")
        assert len(plan) == request.steps
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000


@given(place=st.sampled_from(NUMBERS), number=extreme)
def test_numbers_beyond_reason(place: tuple[str | int, ...], number: float) -> None:
    """Any number of the manifest, far outside of its range: read, or rejected with what was expected."""
    use(text(changed(*place, to=number)))


@given(place=st.sampled_from([place for place in PLACES if isinstance(value_at(place), str)]))
def test_long_values_are_not_repeated(place: tuple[str | int, ...]) -> None:
    """A value of 5,000 characters in the place of any other text: a message shows its beginning."""
    use(text(changed(*place, to="x" * 5000)))


@given(constants=constants)
@example(constants={"num_train_timesteps": 2**70})
@example(constants={"num_train_timesteps": 2**40})
@example(constants={"kind": "tcd"})
@example(constants={"trained_betas": [10**400]})
def test_scheduler_constants_beyond_reason(constants: dict[str, Any]) -> None:
    """Constants of any name and value make a sampler or an error."""
    use(text(changed("scheduler", to=constants)))


EXTENTS = [place for place in PLACES if place[-1] in ("min", "opt", "max", "height", "size")]


@pytest.mark.parametrize("place", EXTENTS, ids=str)
def test_integers_without_bound_are_rejected(place: tuple[str | int, ...]) -> None:
    """2**70 fits no tensor and no file."""
    with pytest.raises(BundleError):
        decode(text(changed(*place, to=2**70)), WHERE)
