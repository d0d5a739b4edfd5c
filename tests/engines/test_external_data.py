"""Places of weights that an ONNX file names, as the `onnx` library reads them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import onnx
import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from hypersd.engines import Bundle
from hypersd.engines.external_data import FIELDS, check_external_data, external_locations
from hypersd.errors import BundleError


def tensor(location: str, name: str = "w") -> TensorProto:
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    made.external_data.add(key="location", value=location)
    made.external_data.add(key="length", value="4")
    return made


def leads_to_external_data(message: Descriptor, seen: frozenset[str] = frozenset()) -> bool:
    if message.name == "TensorProto":
        return True
    kinds = [field.message_type for field in message.fields if field.message_type]
    inner = [kind for kind in kinds if kind.name not in seen]
    return any(leads_to_external_data(each, seen | {message.name}) for each in inner)


@pytest.mark.parametrize("kind", sorted(FIELDS))
def test_no_way_to_external_data_is_left_out(kind: str) -> None:
    """A field that a newer onnx adds is one to follow too."""
    message = getattr(onnx, kind).DESCRIPTOR
    followed = {
        field.number: field.message_type.name
        for field in message.fields
        if field.message_type and (field.name == "external_data" or leads_to_external_data(field.message_type))
    }
    assert followed == FIELDS[kind]


@given(st.text(), st.text(), st.text(), st.text())
def test_places_are_found_wherever_a_tensor_can_be(a: str, b: str, c: str, d: str) -> None:
    """Weights, attributes of nodes, graphs within nodes, and sparse weights; keys and values in any order."""
    branch = helper.make_graph([], "branch", [], [], [tensor(a)])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, value=tensor(b))
    graph = helper.make_graph([node], "graph", [], [], [tensor(c)])
    graph.sparse_initializer.add(values=tensor(d))
    assert external_locations(helper.make_model(graph).SerializeToString()) == {a, b, c, d}


def test_an_entry_with_its_value_first() -> None:
    """Fields of a message come in any order."""
    entry = b"\x12\x03../\x0a\x08location"
    inside = b"\x6a" + bytes([len(entry)]) + entry
    graph = b"\x2a" + bytes([len(inside)]) + inside
    assert external_locations(b"\x3a" + bytes([len(graph)]) + graph) == {"../"}


@given(st.binary(max_size=64))
def test_other_files_are_rejected_or_have_no_places(content: bytes) -> None:
    """Nothing but a ValueError comes of them."""
    with contextlib.suppress(ValueError):
        external_locations(content)


def test_a_graph_reads_its_own_files_alone(sd15_bundle: Path, tmp_path: Path) -> None:
    """Also where the library that runs it would follow any place: ONNX Runtime before 1.24 does."""
    bundle = Bundle.load(sd15_bundle)
    component = bundle.manifest.components["text_encoder"]
    check_external_data(bundle.path(component.onnx), component)
    model = onnx.load(bundle.path(component.onnx), load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = "../unet/model.onnx_data"
    strange = tmp_path / "model.onnx"
    strange.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="expected a file of its own component"):
        check_external_data(strange, component)
