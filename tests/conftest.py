"""Shared by all tests: tiny repositories, and bundles exported from them once a session."""

from __future__ import annotations

import functools
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from preloading import read_torchlib_once

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # nothing here may reach for the network; tests of the Hub start processes of their own
)
if os.environ.get("CI") == "true":
    import tensorrt_rtx  # noqa: F401  # elsewhere its tests are skipped; here they are what "built without a GPU" means
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # "gw0": a core for each worker. Otherwise the threads of every library of each take turns on all cores.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; commands under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
gc.set_threshold(100_000)  # a trace makes millions of objects that last as long as it does
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")


EXPORTED = os.environ.get("HYPERSD_TEST_BUNDLES")  # a finished run's folder: no bundle is exported, its are taken
if EXPORTED:
    from hypersd.engines import Bundle
    from hypersd.export import exporter

    def take_exported(checkpoint: str, out: str | Path = "", *_: Any, **__: Any) -> Bundle:
        """Take the place of `export_bundle` where torch is older than it needs (scripts/test_floors.sh)."""
        if not (Path(out) / "bundle.json").exists():
            pytest.skip(f"{checkpoint} would be exported: {out} is not among the bundles of HYPERSD_TEST_BUNDLES")
        return Bundle.load(out)

    exporter.export_bundle = take_exported

frozen_modules = 0


def pytest_runtest_setup() -> None:
    """Keep the collector away from the libraries that the tests have imported: each full run would scan them all.

    An export makes a full run for each component.
    """
    global frozen_modules
    if len(sys.modules) > frozen_modules + 20:
        gc.collect()
        gc.freeze()
        frozen_modules = len(sys.modules)
    read_torchlib_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With two workers, begin the second one's share with the tests of the bundle that takes longest to export.

    Each worker begins with one half of the list. Else the first one would soon wait for that bundle, half a minute.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    half, tests_of_it, others = len(items) // 2, [], []
    for item in items:
        (tests_of_it if "sdxl_dynamic_bundle" in getattr(item, "fixturenames", ()) else others).append(item)
    items[:] = [*others[:half], *tests_of_it, *others[half:]]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all of a run's processes (pytest -n). Writers take a lock, as an export does itself."""
    if EXPORTED:
        return Path(EXPORTED)
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def tiny_repos(shared_folder: Path) -> Path:
    """Tiny random repositories under their real names (see scripts/make_tiny_repos.py). Do not write there."""
    from filelock import FileLock
    from make_tiny_repos import write_all

    root, unfinished = shared_folder / "hub", shared_folder / "hub-unfinished"
    with FileLock(shared_folder / "hub.lock"):
        if not root.exists():
            write_all(unfinished)
            unfinished.rename(root)
    return root


@pytest.fixture(scope="session")
def source_options(tiny_repos: Path) -> Callable[..., object]:
    """``source_options(name)``: the tiny base and Hyper-SD file of a checkpoint as export's source options."""
    from hypersd.export.checkpoints import HYPER_SD_REPO, find_checkpoint
    from hypersd.export.sources import SourceOptions

    def options(name: str, **changes: Any) -> SourceOptions:
        checkpoint = find_checkpoint(name)
        lora = tiny_repos / HYPER_SD_REPO / checkpoint.filename
        return SourceOptions(**{"base": str(tiny_repos / checkpoint.base), "checkpoint_file": str(lora), **changes})

    return options


@pytest.fixture(scope="session")
def controlnet_sources(tiny_repos: Path) -> Callable[..., tuple[Any, ...]]:
    """``controlnet_sources(name, *kinds)``: tiny ControlNets of a checkpoint's family, ``canny`` and ``scribble``."""
    from make_tiny_repos import CONTROLNETS

    from hypersd.export.controlnet_sources import ControlNetSource

    def sources(name: str, *kinds: str) -> tuple[ControlNetSource, ...]:
        repos = [repo for repo, family in CONTROLNETS.items() if family in name]
        by_kind = {kind: next(repo for repo in repos if kind in repo) for kind in kinds}
        return tuple(ControlNetSource(name=kind, location=str(tiny_repos / repo)) for kind, repo in by_kind.items())

    return sources


@pytest.fixture(scope="session")
def bundles_folder(shared_folder: Path) -> Path:
    """The folder of all bundles: exports there reuse finished components, and other processes whole bundles."""
    folder = shared_folder / "bundles"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def export_tiny(bundles_folder: Path, source_options) -> Callable[..., Path]:
    """``export_tiny(name)``: the folder of a tiny checkpoint's fp32 bundle, made once a session. Do not write to it."""
    from hypersd.export import ExportOptions, export_bundle

    @functools.cache
    def export(name: str) -> Path:
        options = ExportOptions(sources=source_options(name), precision="fp32")
        return export_bundle(name, bundles_folder / name, options).root

    return export


@pytest.fixture(scope="session")
def export_controlled(bundles_folder: Path, source_options, controlnet_sources) -> Callable[[str], Path]:
    """``export_controlled(name)``: the same with two ControlNets, ``canny`` and ``scribble``."""
    from hypersd.export import ExportOptions, export_bundle

    @functools.cache
    def export(name: str) -> Path:
        sources = source_options(name, controlnets=controlnet_sources(name, "canny", "scribble"))
        options = ExportOptions(sources=sources, precision="fp32")
        return export_bundle(name, bundles_folder / f"{name}-controlled", options).root

    return export


@pytest.fixture(scope="session")
def export_slotted(bundles_folder: Path, source_options) -> Callable[[str], Path]:
    """``export_slotted(name)``: the same with a LoRA slot of rank 12, of the text encoders too."""
    from hypersd.export import ExportOptions, export_bundle
    from hypersd.export.lora_slot import SlotOptions

    @functools.cache
    def export(name: str) -> Path:
        slot = SlotOptions(rank=12, with_text=True)
        options = ExportOptions(sources=source_options(name), precision="fp32", lora_slot=slot)
        return export_bundle(name, bundles_folder / f"{name}-slotted", options).root

    return export


@pytest.fixture(scope="session")
def inpainting_options(tiny_repos: Path, source_options) -> Callable[..., object]:
    """``inpainting_options(name)``: as ``source_options``, with a tiny base for inpainting (9 channels)."""
    from make_tiny_repos import SD15_INPAINT_REPO, SDXL_INPAINT_REPO

    def options(name: str, **changes: Any) -> object:
        base = SDXL_INPAINT_REPO if "SDXL" in name else SD15_INPAINT_REPO
        return source_options(name, **{"base": str(tiny_repos / base), **changes})

    return options


@pytest.fixture(scope="session")
def export_inpainting(bundles_folder: Path, inpainting_options) -> Callable[[str], Path]:
    """``export_inpainting(name)``: the fp32 bundle of such a base. Do not write to it."""
    from hypersd.export import ExportOptions, export_bundle

    @functools.cache
    def export(name: str) -> Path:
        options = ExportOptions(sources=inpainting_options(name), precision="fp32")
        return export_bundle(name, bundles_folder / f"{name}-inpainting", options).root

    return export


@pytest.fixture(scope="session")
def batch_of_three_bundle(bundles_folder: Path, source_options) -> Path:
    """A tiny SD1.5 in fp32 without image encoder, whose components take three images at a time. Do not write to it."""
    from hypersd.export import ExportOptions, ShapeOptions, export_bundle

    name = "Hyper-SD15-1step-lora"
    options = ExportOptions(
        sources=source_options(name), precision="fp32", shapes=ShapeOptions(batch=3), text_only=True
    )
    return export_bundle(name, bundles_folder / f"{name}-batch3", options).root


@pytest.fixture(scope="session")
def sd15_tiny_vae_bundle(bundles_folder: Path, tiny_repos: Path, source_options) -> Path:
    """SD1.5 in fp32 with TAESD's decoder and a LoRA slot, 1 or 2 images a run, 64 to 96 pixels high.

    Do not write to it.
    """
    from hypersd.export import ExportOptions, ShapeOptions, export_bundle
    from hypersd.export.lora_slot import SlotOptions

    name = "Hyper-SD15-1step-lora"
    options = ExportOptions(
        sources=source_options(name, vae=str(tiny_repos / "madebyollin/taesd")),
        shapes=ShapeOptions(dynamic={"batch": (1, 1, 2), "height": (64, 64, 96)}),
        precision="fp32",
        text_only=True,
        lora_slot=SlotOptions(rank=4, with_text=True),
    )
    return export_bundle(name, bundles_folder / f"{name}-dynamic", options).root


@pytest.fixture(scope="session")
def sd15_bundle(export_tiny: Callable[[str], Path]) -> Path:
    return export_tiny("Hyper-SD15-1step-lora")


@pytest.fixture(scope="session")
def sdxl_bundle(export_tiny: Callable[[str], Path]) -> Path:
    return export_tiny("Hyper-SDXL-1step-lora")


@pytest.fixture(scope="session")
def load_pipeline() -> Callable[..., Any]:
    """``load_pipeline(bundle, backend)``: a bundle's pipeline, loaded once a session. Load no adapters into it."""
    from hypersd import Pipeline

    return functools.cache(Pipeline.load)


@pytest.fixture(scope="session")
def sdxl_mixed_bundle(bundles_folder: Path, source_options: Callable[..., Any]) -> Path:
    """SDXL in fp16 with its own VAE, which stays in float32. Do not write to it."""
    from hypersd.export import ExportOptions, export_bundle

    name = "Hyper-SDXL-1step-lora"
    options = ExportOptions(sources=source_options(name, vae=source_options(name).base), precision="fp16")
    return export_bundle(name, bundles_folder / f"{name}-mixed", options).root


def _export_demo(shared_folder: Path, folder: str, *controlnets: str) -> Path:
    """A bundle of the demonstration checkpoint, whose images show their prompts; made once for all of a run."""
    from hypersd.export import ExportOptions, export_bundle
    from hypersd.export.controlnet_sources import ControlNetSource
    from hypersd.export.sources import SourceOptions

    sources = SourceOptions(controlnets=tuple(ControlNetSource(location=name) for name in controlnets))
    root = shared_folder / "demo" / folder  # beside those of test_demo.py, whose finished networks it takes
    return export_bundle("Hyper-Demo15-1step-lora", root, ExportOptions(sources=sources, precision="fp32")).root


@pytest.fixture(scope="session")
def demo_bundle(shared_folder: Path) -> Path:
    """The demonstration checkpoint, 96x96, fp32. Do not write to it."""
    return _export_demo(shared_folder, "demo15")


@pytest.fixture(scope="session")
def demo_canny_bundle(shared_folder: Path) -> Path:
    """The same with its ControlNet, ``canny``. Do not write to it."""
    return _export_demo(shared_folder, "demo15-canny", "controlnet-canny-Demo15")


@pytest.fixture(scope="session")
def demo_int8_bundle(shared_folder: Path) -> Path:
    """The demonstration checkpoint in int8. Do not write to it."""
    from hypersd.export import ExportOptions, export_bundle

    root = shared_folder / "demo" / "demo15-int8"
    return export_bundle("Hyper-Demo15-1step-lora", root, ExportOptions(precision="int8")).root


@pytest.fixture(scope="session")
def export_demo_slotted(shared_folder: Path) -> Callable[[str], Path]:
    """``export_demo_slotted(name)``: a demonstration checkpoint with room for both styles, fp32. Do not write to it."""
    from hypersd.export import ExportOptions, export_bundle
    from hypersd.export.lora_slot import SlotOptions

    @functools.cache
    def export(name: str) -> Path:
        options = ExportOptions(precision="fp32", lora_slot=SlotOptions(rank=16))
        return export_bundle(name, shared_folder / "demo" / f"{name}-slotted", options).root

    return export


@pytest.fixture
def copy_bundle(tmp_path: Path) -> Callable[..., Any]:
    """``copy_bundle(folder, name, **changes)``: a bundle of links to another's files, with changes in its manifest.

    Changes name fields of the manifest or of its sampler.
    """
    import shutil

    import msgspec

    from hypersd.engines import Bundle
    from hypersd.engines.bundle import write_manifest
    from hypersd.engines.files import link_or_copy
    from hypersd.engines.manifest import MANIFEST_NAME, SamplerSettings

    def copy(folder: Path, name: str = "copy", **changes: Any) -> Bundle:
        root, manifest = tmp_path / name, Bundle.load(folder).manifest
        shutil.copytree(folder, root, copy_function=link_or_copy, ignore=shutil.ignore_patterns(MANIFEST_NAME))
        sampler = {field: changes.pop(field) for field in SamplerSettings.__struct_fields__ if field in changes}
        sampler = msgspec.structs.replace(manifest.sampler, **sampler)
        write_manifest(root, msgspec.structs.replace(manifest, sampler=sampler, **changes))
        return Bundle.load(root)

    return copy


@pytest.fixture(scope="session")
def rtx_bundle(bundles_folder: Path, source_options) -> Path:
    """An fp16 SD1.5 bundle with portable TensorRT-RTX engines for every network. Do not write to it."""
    pytest.importorskip("tensorrt_rtx")
    from hypersd.engines import build_engines
    from hypersd.export import ExportOptions, export_bundle

    name = "Hyper-SD15-1step-lora"
    options = ExportOptions(sources=source_options(name), precision="fp16")
    bundle = export_bundle(name, bundles_folder / f"{name}-rtx", options)
    return build_engines(bundle, "tensorrt-rtx").root


@pytest.fixture(scope="session")
def sdxl_dynamic_bundle(bundles_folder: Path, tiny_repos: Path, source_options, controlnet_sources) -> Path:
    """An fp16 SDXL bundle with ranges of batch (1 to 2), height and width (64 to 104 and 96), and the fp16-fix VAE.

    It has a ControlNet, ``canny``.
    """
    from hypersd.export import ExportOptions, export_bundle
    from hypersd.export.shapes import ShapeOptions

    name = "Hyper-SDXL-8steps-CFG-lora"
    options = ExportOptions(
        sources=source_options(
            name,
            vae=str(tiny_repos / "madebyollin/sdxl-vae-fp16-fix"),
            controlnets=controlnet_sources(name, "canny"),
        ),
        shapes=ShapeOptions(dynamic={"batch": (1, 1, 2), "height": (64, 64, 104), "width": (64, 64, 96)}),
        precision="fp16",
    )
    return export_bundle(name, bundles_folder / f"{name}-dynamic", options).root


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


@pytest.fixture(scope="session")
def controlled_reference(tiny_repos: Path, reference) -> Callable[..., Any]:
    """``controlled_reference(name, *kinds)``: diffusers' own pipeline with the tiny ControlNets of these kinds."""
    from diffusers import ControlNetModel
    from diffusers_pipelines import make_pipeline
    from make_tiny_repos import CONTROLNETS

    @functools.cache
    def load(name: str, *kinds: str) -> Any:
        repos = [repo for repo, family in CONTROLNETS.items() if family in name]
        nets = [
            ControlNetModel.from_pretrained(str(tiny_repos / next(repo for repo in repos if kind in repo)))
            for kind in kinds
        ]
        parts = {**reference(name).components, "controlnet": nets if len(nets) > 1 else nets[0]}
        return make_pipeline(name, "ControlNet", parts)

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
