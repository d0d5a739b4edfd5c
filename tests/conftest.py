"""Shared by all tests: tiny repositories, and bundles exported from them once a session."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # nothing here may reach for the network; tests of the Hub start processes of their own
)
if os.environ.get("CI") == "true":
    import tensorrt_rtx  # noqa: F401  # elsewhere its tests are skipped; here they are what "built without a GPU" means
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def tiny_repos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random repositories under their real names (see scripts/make_tiny_repos.py). Do not write there."""
    from make_tiny_repos import write_all

    root = tmp_path_factory.mktemp("hub")
    write_all(root)
    return root


@pytest.fixture(scope="session")
def source_options(tiny_repos: Path) -> Callable[..., object]:
    """``source_options(name)``: the tiny base and Hyper-SD file of a checkpoint as export's source options."""
    from hypersd.export.checkpoints import HYPER_SD_REPO, find_checkpoint
    from hypersd.export.sources import SourceOptions

    def options(name: str, **changes: str | None) -> SourceOptions:
        checkpoint = find_checkpoint(name)
        lora = tiny_repos / HYPER_SD_REPO / checkpoint.filename
        return SourceOptions(**{"base": str(tiny_repos / checkpoint.base), "lora": str(lora), **changes})

    return options


@pytest.fixture(scope="session")
def export_tiny(tmp_path_factory: pytest.TempPathFactory, source_options) -> Callable[..., Path]:
    """``export_tiny(name)``: the folder of a tiny checkpoint's fp32 bundle, made once a session. Do not write to it."""
    from hypersd.export import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("bundles")

    @functools.cache
    def export(name: str) -> Path:
        options = ExportOptions(sources=source_options(name), precision="fp32")
        return export_bundle(name, folder / name, options).root

    return export


@pytest.fixture(scope="session")
def sd15_bundle(export_tiny: Callable[[str], Path]) -> Path:
    return export_tiny("Hyper-SD15-1step-lora")


@pytest.fixture(scope="session")
def sdxl_bundle(export_tiny: Callable[[str], Path]) -> Path:
    return export_tiny("Hyper-SDXL-1step-lora")


@pytest.fixture(scope="session")
def rtx_bundle(tmp_path_factory: pytest.TempPathFactory, source_options) -> Path:
    """An fp16 SD1.5 bundle with portable TensorRT-RTX engines for every network. Do not write to it."""
    pytest.importorskip("tensorrt_rtx")
    from hypersd.engines import build_engines
    from hypersd.export import ExportOptions, export_bundle

    name = "Hyper-SD15-1step-lora"
    options = ExportOptions(sources=source_options(name), precision="fp16")
    bundle = export_bundle(name, tmp_path_factory.mktemp("rtx") / name, options)
    return build_engines(bundle, "tensorrt-rtx").root


@pytest.fixture(scope="session")
def sdxl_dynamic_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_repos: Path, source_options) -> Path:
    """An fp16 SDXL bundle with ranges of batch (1 to 2), height and width (64 to 104 and 96), and the fp16-fix VAE."""
    from hypersd.export import ExportOptions, export_bundle
    from hypersd.export.shapes import ShapeOptions

    name = "Hyper-SDXL-8steps-CFG-lora"
    options = ExportOptions(
        sources=source_options(name, vae=str(tiny_repos / "madebyollin/sdxl-vae-fp16-fix")),
        shapes=ShapeOptions(dynamic={"batch": (1, 1, 2), "height": (64, 64, 104), "width": (64, 64, 96)}),
        precision="fp16",
    )
    return export_bundle(name, tmp_path_factory.mktemp("dynamic") / name, options).root


@pytest.fixture(scope="session")
def reference(tiny_repos: Path) -> Callable[[str], Any]:
    """``reference(name)``: diffusers' own pipeline of a tiny checkpoint in fp32, set up as the model card does it.

    It shares no code with the package: diffusers loads the base, fuses the LoRA and makes the scheduler.
    """
    from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, TCDScheduler, UNet2DConditionModel
    from safetensors.torch import load_file

    @functools.cache
    def load(name: str) -> Any:
        is_sdxl = "SDXL" in name
        base = "stabilityai/stable-diffusion-xl-base-1.0" if is_sdxl else "stable-diffusion-v1-5/stable-diffusion-v1-5"
        hyper_sd = tiny_repos / "ByteDance/Hyper-SD"
        pipe = DiffusionPipeline.from_pretrained(str(tiny_repos / base))
        if name.endswith("-Unet"):
            pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config)
            pipe.unet.load_state_dict(load_file(hyper_sd / f"{name}.safetensors"))
            pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        else:
            pipe.load_lora_weights(str(hyper_sd), weight_name=f"{name}.safetensors")
            pipe.fuse_lora()
            if "1step" in name:
                pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
            else:
                pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``mount_disk("64k")``: a folder that is a file system of that size, of its own."""
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
        )
        if mounted.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.decode().strip()}")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)
