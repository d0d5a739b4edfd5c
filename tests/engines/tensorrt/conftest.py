"""Shared by the tests of TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypersd.engines import Bundle
from hypersd.engines.tensorrt.build_process import BuildJob


@pytest.fixture
def unet_job(sdxl_dynamic_bundle: Path, tmp_path: Path) -> BuildJob:
    """A UNet with ranges, as export writes it: seconds of work, so that there is time to do something to the build."""
    bundle = Bundle.load(sdxl_dynamic_bundle)
    specs = bundle.component("unet")
    return BuildJob(
        backend="tensorrt-rtx",
        component="unet",
        onnx=str(bundle.path(specs.onnx)),
        plan=str(tmp_path / "unet.plan"),
        inputs=specs.inputs,
        outputs=specs.outputs,
    )
