"""Bases for inpainting: UNets that take nine channels are exported as any other, and everything else stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_writers import kohya, random_lora
from safetensors.torch import save_file

from hypersd.engines import Bundle
from hypersd.errors import RequestError, WeightsError
from hypersd.export import ExportOptions, export_bundle
from hypersd.export.checkpoints import find_checkpoint
from hypersd.export.component_exports import component_exports
from hypersd.export.controlnet_sources import ControlNetSource
from hypersd.export.lora_sources import LoraSource
from hypersd.export.models import check_sources, load_controlnet
from hypersd.export.shapes import ShapeOptions, image_shapes
from hypersd.export.sources import SourceOptions, find_sources
from hypersd.runtime.params import Params
from hypersd.tools.one_graph import add_one_graph

from .tiny_sources import find, one_line

NAMES = pytest.mark.parametrize("name", ["Hyper-SD15-1step-lora", "Hyper-SDXL-1step-lora"])
Options = Callable[..., SourceOptions]


@NAMES
def test_only_the_unet_differs(
    name: str, export_tiny: Callable[[str], Path], export_inpainting: Callable[[str], Path]
) -> None:
    """Nine channels in, four out. The manifest says no more than that: the VAE's latents have four channels."""
    plain, bundle = (Bundle.load(export(name)).manifest for export in (export_tiny, export_inpainting))
    assert (plain.is_inpainting, bundle.is_inpainting) == (False, True)
    unet = bundle.components["unet"]
    assert unet.inputs["sample"].shape == (1, 9, 8, 8)
    assert unet.outputs["out_sample"].shape == (1, 4, 8, 8)
    assert bundle.vae == plain.vae
    assert {n for n in plain.components if plain.components[n].key != bundle.components[n].key} == {"unet"}
    assert bundle.components.keys() == plain.components.keys()


@NAMES
def test_controlnets_keep_four_channels(name: str, inpainting_options: Options, controlnet_sources: Any) -> None:
    """diffusers gives a ControlNet the latents alone, and so does the graph; the residuals fit as ever."""
    options = inpainting_options(name, controlnets=controlnet_sources(name, "canny"))
    checkpoint = find_checkpoint(name)
    sources = find_sources(checkpoint, options, "fp32")
    loras = check_sources(sources, checkpoint.family).loras
    records = {part: tuple(file.record() for file in files) for part, files in sources.weights.items()}
    shapes = image_shapes(ShapeOptions(height=64, width=64), 64)
    exports = component_exports(checkpoint, sources, records, shapes, "fp32", loras)
    loaded = {export.name: export.load() for export in exports if export.name in ("controlnet/canny", "unet")}
    assert loaded["controlnet/canny"].inputs["sample"].shape == (1, 4, 8, 8)
    assert loaded["unet"].inputs["sample"].shape == (1, 9, 8, 8)
    assert loaded["unet"].outputs["out_sample"].shape == (1, 4, 8, 8)
    for component in loaded.values():
        component.module(*component.random_inputs({}, 0))


def test_a_controlnet_in_a_file(tiny_repos: Path, inpainting_options: Options) -> None:
    """Its configuration is made from the UNet's, but for the channels."""
    file = tiny_repos / "lllyasviel/control_v11p_sd15_canny/diffusion_pytorch_model.safetensors"
    options = inpainting_options(
        "Hyper-SD15-1step-lora", controlnets=(ControlNetSource(location=str(file), name="canny"),)
    )
    sources = find_sources(find_checkpoint("Hyper-SD15-1step-lora"), options, "fp32")
    net: Any = load_controlnet(sources.parts["controlnet/canny"], torch.float32)
    assert net.config.in_channels == 4


@pytest.mark.parametrize("channels", [4, 9])
def test_loras_that_change_the_first_layer(channels: int, inpainting_options: Options, tmp_path: Path) -> None:
    """A LoRA for four channels is rejected, as diffusers rejects it: the message names the layer and both numbers."""
    save_file(kohya(random_lora({"unet": {"conv_in": (32, channels, 3, 3)}}, 1.0)), tmp_path / "lora.safetensors")
    name = "Hyper-SD15-1step-lora"
    options = inpainting_options(name, added_loras=(LoraSource(location=str(tmp_path / "lora.safetensors")),))
    sources = find_sources(find_checkpoint(name), options, "fp32")
    if channels == 9:
        assert check_sources(sources, "sd15").loras.keys() == {"lora", "added_lora/1"}
        return
    with pytest.raises(WeightsError) as error:
        check_sources(sources, "sd15")
    one_line(error, "lora.safetensors", "conv_in", "takes 4 channels", "takes 9")


def test_a_lora_for_inpainting_on_another_base(tiny_repos: Path, source_options: Options, tmp_path: Path) -> None:
    """The other way round it is the same error."""
    save_file(kohya(random_lora({"unet": {"conv_in": (32, 9, 3, 3)}}, 1.0)), tmp_path / "lora.safetensors")
    options = source_options(
        "Hyper-SD15-1step-lora", added_loras=(LoraSource(location=str(tmp_path / "lora.safetensors")),)
    )
    with pytest.raises(WeightsError) as error:
        check_sources(find_sources(find_checkpoint("Hyper-SD15-1step-lora"), options, "fp32"), "sd15")
    one_line(error, "conv_in", "takes 9 channels", "takes 4")


def test_a_whole_unet_would_replace_the_bases(tiny_repos: Path) -> None:
    """Hyper-SDXL-1step-Unet takes four channels: the base would lose what it was chosen for."""
    from make_tiny_repos import SDXL_INPAINT_REPO

    file = str(tiny_repos / "ByteDance/Hyper-SD/Hyper-SDXL-1step-Unet.safetensors")
    options = SourceOptions(base=str(tiny_repos / SDXL_INPAINT_REPO), checkpoint_file=file)
    with pytest.raises(WeightsError) as error:
        find_sources(find_checkpoint("Hyper-SDXL-1step-Unet"), options, "fp32")
    one_line(error, "is for inpainting", "Hyper-SDXL-1step-Unet is a whole UNet", "a LoRA")


def test_the_family_still_counts(tiny_repos: Path) -> None:
    """A base for inpainting of the other family is told by its pipeline."""
    from make_tiny_repos import SDXL_INPAINT_REPO

    with pytest.raises(WeightsError) as error:
        find("sd15", tiny_repos, base=str(tiny_repos / SDXL_INPAINT_REPO))
    one_line(error, "holds a SDXL model", "needs SD1.5")


def test_text_alone_is_not_for_inpainting(inpainting_options: Options, tmp_path: Path) -> None:
    """The UNet takes an image's latents in every call."""
    options = ExportOptions(sources=inpainting_options("Hyper-SD15-1step-lora"), text_only=True)
    with pytest.raises(RequestError, match=r"stable-diffusion-inpainting is for inpainting, .*leave --text-only out"):
        export_bundle("Hyper-SD15-1step-lora", tmp_path / "out", options)


def test_no_one_graph(export_inpainting: Callable[[str], Path]) -> None:
    """Its inputs are tokens and noise."""
    with pytest.raises(RequestError, match=r"for inpainting, .*stable-diffusion-inpainting, which a one-graph"):
        add_one_graph(export_inpainting("Hyper-SD15-1step-lora"), Params(prompt=""))
