"""Builds of a bundle's components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypersd.engines import Bundle
from hypersd.engines.tensorrt.build_process import BuildJob


def component_job(bundle: Bundle, component: str, plan: Path, **changes: Any) -> BuildJob:
    """The job that TensorRT-RTX gets for a component with the bundle's own shapes."""
    specs = bundle.component(component)
    return BuildJob(
        backend="tensorrt-rtx",
        component=component,
        onnx=str(bundle.path(specs.onnx)),
        plan=str(plan),
        inputs=specs.inputs,
        outputs=specs.outputs,
        **changes,
    )
