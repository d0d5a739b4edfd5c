"""OpenVINO's models of a folder of ONNX graphs, as its export tools make them: weights in float16, float32 outside.

It runs in a contender's interpreter, in a process before the contender's own: its memory is not the contender's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import openvino as ov

GRAPH, MODEL, HIDDEN = "model.onnx", "openvino_model.xml", "hidden_states"
UNUSED = ("vae_encoder", "controlnet", "controlnet_cond_embedding")  # from text to image


def prepare(folder: str, **_: Any) -> None:
    """Write the models beside the graphs, and for GenAI the tokenizers, which are models there too."""
    root = Path(folder)
    for graph in sorted(root.glob(f"*/{GRAPH}")):
        if graph.parent.name not in UNUSED:
            model = ov.Core().read_model(graph.resolve())  # OpenVINO follows no link to the weights
            if graph.parent.name.startswith("text_encoder"):
                model = _with_usual_outputs(model)
            ov.save_model(_with_usual_types(model), graph.with_name(MODEL), compress_to_fp16=True)
    if importlib.util.find_spec("openvino_genai") is not None:
        _write_tokenizers(root)


def _with_usual_outputs(encoder: ov.Model) -> ov.Model:
    """The same text encoder with the pooled output first, if it has one, and the hidden states second."""
    made = {port.get_any_name(): _in_float32(port.get_node().input_value(0)) for port in encoder.outputs}
    results = [ov.opset13.result(made.get("text_embeds", made[HIDDEN])), ov.opset13.result(made[HIDDEN])]
    return ov.Model(results, encoder.get_parameters(), encoder.friendly_name)  # pyright: ignore[reportGeneralTypeIssues]


def _in_float32(value: ov.Output) -> ov.Output:
    """The same value, with its name."""
    if value.element_type != ov.Type.f16:
        return value
    converted = ov.opset13.convert(value, "f32").output(0)
    converted.get_tensor().set_names(value.get_names())
    value.get_tensor().set_names(set())
    return converted


def _with_usual_types(model: ov.Model) -> ov.Model:
    """The same model with float32 outside in place of float16, and the timestep as a whole number."""
    outside = ov.preprocess.PrePostProcessor(model)
    for i, port in enumerate(model.inputs):
        if "timestep" in port.names:
            outside.input(i).tensor().set_element_type(ov.Type.i64)
        elif port.element_type == ov.Type.f16:
            outside.input(i).tensor().set_element_type(ov.Type.f32)
    for i, port in enumerate(model.outputs):
        if port.element_type == ov.Type.f16:
            outside.output(i).tensor().set_element_type(ov.Type.f32)
    return outside.build()


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
