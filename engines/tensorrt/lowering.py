"""ONNX for parsers that do not know every operator of opset 23."""

from __future__ import annotations

from pathlib import Path


def without_attention(path: Path) -> bytes:
    """The graph with every ``Attention`` node spelt out in plain operators, as ONNX itself defines it.

    TensorRT before 10.14 cannot import ``Attention``. The weights stay where they are: parse the result under the
    path of the file that it was made from.
    """
    import onnx
    import onnx.inliner

    model = onnx.load(str(path), load_external_data=False)
    model = onnx.inliner.inline_selected_functions(model, [("", "Attention")], inline_schema_functions=True)
    return model.SerializeToString()
