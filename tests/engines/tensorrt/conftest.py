"""Shared by the tests of TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hypersd.engines import Bundle
from hypersd.engines.tensorrt.api import TensorRTApi
from hypersd.engines.tensorrt.build_process import BuildJob

from .bundle_jobs import component_job
from .surface import VERSIONS, StandIn


@pytest.fixture
def unet_job(sdxl_dynamic_bundle: Path, tmp_path: Path) -> BuildJob:
    """A UNet with ranges, as export writes it: seconds of work, so that there is time to do something to the build."""
    return component_job(Bundle.load(sdxl_dynamic_bundle), "unet", tmp_path / "unet.plan")


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stand_in(version: str) -> StandIn:
    return StandIn(VERSIONS[version])


@pytest.fixture
def api(stand_in: StandIn) -> TensorRTApi:
    return TensorRTApi("tensorrt-rtx" if stand_in.package == "tensorrt_rtx" else "tensorrt", stand_in.module)


@pytest.fixture
def builder(stand_in: StandIn, api: TensorRTApi) -> Any:
    return stand_in.module.Builder(api.make_logger(lambda severity, text: None))
