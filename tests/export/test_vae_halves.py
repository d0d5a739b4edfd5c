"""The VAE's encoder and decoder: two components of one file, of which a bundle for text to image needs the second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from make_tiny_repos import SD15_REPO, SDXL_REPO
from safetensors.torch import save_file
from torch import Tensor

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.onnx_runtime import OnnxRuntimeEngine
from hypersd.engines.random_inputs import random_input
from hypersd.errors import WeightsError
from hypersd.export import ExportOptions, export_bundle
from hypersd.export.models import check_sources, load_vae
from hypersd.export.sources import SourceOptions, Sources
from hypersd.tools.reference import load_reference

from .ldm_checkpoints import ldm_vae
from .tiny_sources import find, load, one_line

NAME = "Hyper-SD15-1step-lora"


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_encoder_gives_diffusers_distribution(
    family: str, tiny_repos: Path, request: pytest.FixtureRequest
) -> None:
    """Means and log-variances before anything is drawn, in the channels where diffusers has them."""
    bundle = Bundle.load(request.getfixturevalue(f"{family}_bundle"))
    assert bundle.manifest.has_encoder
    component = bundle.component("vae_encoder")
    engine = OnnxRuntimeEngine("vae_encoder", bundle.path(component.onnx), component, torch.device("cpu"))
    image = random_input("sample", component.inputs["sample"], (1, 3, 64, 64), 1, torch.Generator().manual_seed(3))
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_repos / {"sd15": SD15_REPO, "sdxl": SDXL_REPO}[family] / "vae")
    expected: Any = vae.encode(image, return_dict=False)[0]
    mean, logvar = engine.run({"sample": image})["latent_parameters"].chunk(2, dim=1)
    for actual, wanted in ((mean, expected.mean), (logvar, expected.logvar)):
        assert wanted.std() > 0.01
        np.testing.assert_allclose(actual, wanted.detach(), atol=1e-5)


def test_random_images_look_like_images(sd15_bundle: Path) -> None:
    """The encoder is checked on colours in -1..1 that run into one another; the UNet's input has the same name."""
    components = Bundle.load(sd15_bundle).manifest.components
    generator = torch.Generator().manual_seed(0)
    image, latents = (
        random_input("sample", components[name].inputs["sample"], shape, 1, generator)
        for name, shape in (("vae_encoder", (1, 3, 64, 72)), ("unet", (1, 4, 64, 64)))
    )
    assert image.shape == (1, 3, 64, 72)
    assert -1 <= image.min() < -0.5 < 0.5 < image.max() <= 1
    assert image.diff(dim=3).abs().mean() < 0.15
    assert latents.abs().max() > 3


# --- a file without an encoder ---------------------------------------------------------------------------------------

Names = Callable[[Any], Mapping[str, Tensor]]
NAMES: dict[str, Names] = {"diffusers": lambda vae: vae.state_dict(), "original": ldm_vae}


def decoder_only(names: Names, tiny_repos: Path, path: Path) -> Sources:
    """The sources with a VAE whose file lacks the encoder."""
    vae = load(find("sd15", tiny_repos).parts["vae"], "sd15")
    kept = {key: tensor for key, tensor in names(vae).items() if not {"encoder", "quant_conv"} & {*key.split(".")}}
    save_file({key: tensor.contiguous() for key, tensor in kept.items()}, path)
    return find("sd15", tiny_repos, vae=str(path))


@pytest.mark.parametrize("naming", NAMES)
def test_a_decoder_alone_is_enough_for_text(naming: str, tiny_repos: Path, tmp_path: Path) -> None:
    """The error of a whole bundle names the option that makes one of text to image; nothing else may be missing."""
    path = tmp_path / "half.safetensors"
    sources = decoder_only(NAMES[naming], tiny_repos, path)
    with pytest.raises(WeightsError) as error:
        check_sources(sources, "sd15")
    one_line(error, str(path), "without its encoder", "--text-only")
    check_sources(sources, "sd15", text_only=True)
    decoder, whole = load_vae(sources.parts["vae"], torch.float32, "decoder"), find("sd15", tiny_repos).parts["vae"]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images: list[Tensor] = [vae.decode(latents).sample for vae in (decoder, load_vae(whole, torch.float32))]  # type: ignore[operator]
    assert torch.equal(*images)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_damaged_half_is_not_a_missing_one(half: str, tiny_repos: Path, tmp_path: Path) -> None:
    """A tensor too few in either half: the error lists it."""
    vae = load(find("sd15", tiny_repos).parts["vae"], "sd15")
    tensors = {key: tensor for key, tensor in vae.state_dict().items() if key != f"{half}.conv_in.bias"}
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError) as error:
        check_sources(find("sd15", tiny_repos, vae=str(tmp_path / "vae.safetensors")), "sd15")
    one_line(error, "does not fit", f"{half}.conv_in.bias")


def test_a_bundle_for_text_alone(
    tiny_repos: Path, bundles_folder: Path, source_options: Callable[..., SourceOptions], tmp_path: Path
) -> None:
    """It generates, diffusers loads its sources for comparison, and its other components are those of a whole one."""
    names = NAMES["diffusers"]
    decoder_only(names, tiny_repos, tmp_path / "half.safetensors")
    sources = source_options(NAME, vae=str(tmp_path / "half.safetensors"))
    options = ExportOptions(sources=sources, precision="fp32", text_only=True)
    bundle = export_bundle(NAME, bundles_folder / f"{NAME}-text-only", options)
    assert bundle.manifest.components.keys() == {"text_encoder", "vae_decoder", "unet"}
    assert not bundle.manifest.has_encoder
    assert Pipeline.load(bundle)("a cat", seed=0, output_type="np").images.shape == (1, 64, 64, 3)
    images = load_reference(bundle.manifest).plain("a cat", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
