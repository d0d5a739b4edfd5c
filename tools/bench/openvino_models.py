"""OpenVINO's models of a folder of ONNX graphs, as its export tools make them: weights in float16, float32 outside.

It runs in a contender's interpreter, in a process before the contender's own: its memory is not the contender's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import openvino as ov

GRAPH, MODEL, HIDDEN = "model.onnx", "openvino_model.xml", "hidden_states"
UNUSED = ("vae_encoder", "controlnet", "controlnet_cond_embedding")  # from text to image
STORED = "/stored"  # ends the name of a weight's conversion from float16


def prepare(folder: str, **_: Any) -> None:
    """Write the models beside the graphs, and for GenAI the tokenizers, which are models there too."""
    root = Path(folder)
    for graph in sorted(root.glob(f"*/{GRAPH}")):
        if graph.parent.name not in UNUSED:
            _write_model(graph, graph.with_name(MODEL))
    if importlib.util.find_spec("openvino_genai") is not None:
        _write_tokenizers(root)


def _write_model(graph: Path, file: Path) -> None:
    model = ov.Core().read_model(graph.resolve())  # OpenVINO follows no link to the weights
    _to_float32(model)
    if graph.parent.name.startswith("text_encoder"):
        model = _with_usual_outputs(model)
    outside = ov.preprocess.PrePostProcessor(model)
    for i, port in enumerate(model.inputs):
        if "timestep" in port.names:
            outside.input(i).tensor().set_element_type(ov.Type.i64)
    ov.save_model(outside.build(), file, compress_to_fp16=True)
    _mark_stored(file)


def _to_float32(model: ov.Model) -> None:
    """Let a graph of float16 compute in float32, as that of a float32 checkpoint does; its weights stay in float16."""
    for node in model.get_ordered_ops():
        kind, is_half = node.get_type_name(), node.get_output_element_type(0) == ov.Type.f16
        if kind == "Parameter" and is_half:
            node.set_element_type(ov.Type.f32)
        elif kind in ("Constant", "Convert") and is_half:
            source = node.output(0) if kind == "Constant" else node.input_value(0)
            readers = list(node.output(0).get_target_inputs())
            single = ov.opset13.convert(source, "f32", name=node.get_friendly_name() + STORED)
            for reader in readers:
                reader.replace_source_output(single.output(0))
    model.validate_nodes_and_infer_types()


def _mark_stored(file: Path) -> None:
    """Mark the conversions of weights as OpenVINO does, which Python cannot: without it they are float32 in memory."""
    document = ElementTree.parse(file)
    for layer in document.iter("layer"):
        if layer.get("type") == "Convert" and layer.get("name", "").endswith(STORED):
            info = ElementTree.Element("rt_info")
            ElementTree.SubElement(info, "attribute", name="decompression", version="0")
            layer.insert(1, info)  # after its data
    document.write(file)


def _with_usual_outputs(encoder: ov.Model) -> ov.Model:
    """The same text encoder with the pooled output first, if it has one, and the hidden states second."""
    made = {port.get_any_name(): port.get_node().input_value(0) for port in encoder.outputs}
    results = [ov.opset13.result(made.get("text_embeds", made[HIDDEN])), ov.opset13.result(made[HIDDEN])]
    return ov.Model(results, encoder.get_parameters(), encoder.friendly_name)  # pyright: ignore[reportGeneralTypeIssues]


def _write_tokenizers(root: Path) -> None:
    """Write each tokenizer as a model."""
    from openvino_tokenizers import convert_tokenizer  # pyright: ignore[reportMissingImports]  # it comes with GenAI
    from transformers import AutoTokenizer

    for folder in sorted(root.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        ov.save_model(convert_tokenizer(tokenizer), folder / "openvino_tokenizer.xml")


def cpu_precision() -> str:
    """The precision in which OpenVINO computes on this processor unless it is told another."""
    names = {ov.Type.bf16: "bf16", ov.Type.f16: "fp16", ov.Type.f32: "fp32"}
    return names[ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")]
