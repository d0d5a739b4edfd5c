"""Random weights in the published architectures: what is written, that it is always the same, and that it is marked."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preloaded
import pytest
import small_architectures
import torch

from hypersd.engines import Bundle
from hypersd.errors import DiskFullError, RequestError, WeightsError
from hypersd.export import ExportOptions, export_bundle
from hypersd.export.architectures import PUBLISHED, empty_networks
from hypersd.export.random_weights import LORA, RandomWeights, random_base
from hypersd.export.sources import SourceOptions
from hypersd.runtime import Pipeline
from hypersd.tools.reference import load_reference
from hypersd.tools.verification import check_thresholds, compare, find_threshold
from hypersd.tools.verify_cases import Case
from hypersd.weights.safetensors_file import SafetensorsFile

NAME = "Hyper-SD15-1step-lora"
PUBLISHED_PARAMETERS = {
    "sd15": {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863, "tiny_vae": 2_445_063},
    "sdxl": {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "tiny_vae": 2_445_063,
    },
}


class Recorder:
    """An export's progress, kept."""

    downloads = None

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def start(self, stage: str) -> None:
        self.stages.append(stage)

    def update(self, fraction: float, detail: str) -> None:
        pass

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def small(folder: Path, **changes: Any) -> RandomWeights:
    """Random weights of small architectures, kept in ``folder``."""
    return RandomWeights(folder=folder, architectures=small_architectures.SMALL, **changes)


def hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file, by its name under ``root``."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this file's random weights."""
    return tmp_path_factory.mktemp("random-weights")


@pytest.fixture(scope="module")
def export_random(folder: Path, bundles_folder: Path) -> Callable[..., Bundle]:
    """``export_random(name)``: the small fp32 bundle of a checkpoint with random weights, made once."""

    @functools.cache
    def export(name: str, **changes: Any) -> Bundle:
        sources = SourceOptions(**changes)
        options = ExportOptions(sources=sources, precision="fp32", random_weights=small(folder))
        return export_bundle(name, bundles_folder / "-".join([name, *changes.values(), "random-weights"]), options)

    return export


@pytest.mark.parametrize("family", sorted(PUBLISHED))
def test_the_architectures_are_the_published_ones(family: str) -> None:
    """Measurements need a model of the real size: the counts are those of the published weight files."""
    networks = empty_networks(PUBLISHED[family])
    found = {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}
    assert found == PUBLISHED_PARAMETERS[family]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_seed_makes_the_same_files(family: Any, folder: Path, tmp_path: Path) -> None:
    """A figure can be measured again elsewhere; torch's own random state neither decides nor is touched."""
    first = random_base(family, small(folder), Recorder())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = random_base(family, small(tmp_path), Recorder())
    other = random_base(family, small(tmp_path, seed=1), Recorder())
    assert torch.equal(before, torch.get_rng_state())
    assert hashes(first) == hashes(again)
    changed = {name for name, digest in hashes(other).items() if hashes(again)[name] != digest}
    assert changed == {name for name in hashes(other) if name.endswith(".safetensors")}


def test_weights_of_a_file_are_alive_and_in_half_precision(folder: Path) -> None:
    """Nothing is constant that a real model has not constant, and no two layers of a shape are the same."""
    root = random_base("sd15", small(folder), Recorder())
    file = SafetensorsFile(root / "base/unet/diffusion_pytorch_model.safetensors")
    weights = {name: tensor.clone() for name, tensor in file.tensors() if tensor.dim() > 1}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    for name, tensor in weights.items():
        expected = (3 * tensor[0].numel()) ** -0.5  # torch's initialisation of linear layers and convolutions
        assert 0.8 * expected < tensor.float().std() < 1.2 * expected, name
    assert len({tensor.flatten()[:8].numpy().tobytes() for tensor in weights.values()}) == len(weights)


def test_the_lora_changes_weights_a_little(folder: Path) -> None:
    """Fusion is measured on numbers of a real LoRA's kind: neither nothing nor more than the weights themselves."""
    root = random_base("sd15", small(folder), Recorder())
    lora = SafetensorsFile(root / LORA)
    base = SafetensorsFile(root / "base/unet/diffusion_pytorch_model.safetensors")
    key, name = "lora_unet_mid_block_resnets_0_conv1", "mid_block.resnets.0.conv1.weight"
    down, up, alpha = (lora.read(f"{key}.{part}").float() for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    delta = up.flatten(1) @ down.flatten(1) * alpha / down.shape[0]
    assert 0.05 < delta.std() / base.read(name).float().std() < 0.5


def test_diffusers_opens_the_base(folder: Path) -> None:
    """The folder is what its name says: a base in diffusers layout, nothing missing in it."""
    from diffusers import StableDiffusionXLPipeline

    root = random_base("sdxl", small(folder), Recorder())
    pipe = StableDiffusionXLPipeline.from_pretrained(root / "base", torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a cat", num_inference_steps=1, output_type="np", height=64, width=64).images[0]
    assert image.std() > 0.01


def test_weights_are_written_once(tmp_path: Path) -> None:
    """The first export says what it writes, where and how large; the next one writes nothing."""
    progress = Recorder()
    root = random_base("sd15", small(tmp_path), progress)
    assert len(progress.stages) == 5
    megabytes = sum(path.stat().st_size for path in root.rglob("*.safetensors")) / 1e6
    (note,) = progress.notes
    assert str(root) in note
    assert abs(float(note.rpartition(": ")[2].split()[0]) - megabytes) <= 1
    before = hashes(root)
    again = Recorder()
    assert random_base("sd15", small(tmp_path), again) == root
    assert again.stages == []
    assert str(root) in again.notes[0]
    assert hashes(root) == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [root.name]


def test_a_killed_run_is_resumed(folder: Path, tmp_path: Path) -> None:
    """A kill in the middle of a file leaves no weights that are taken for whole; what was whole is not made again."""
    program = f"""if True:
        import os, signal, sys
        sys.path.insert(0, {str(Path(small_architectures.__file__).parent)!r})
        from pathlib import Path
        import small_architectures
        from hypersd.engines.progress import Silent
        from hypersd.export.random_weights import RandomWeights, random_base

        class Killer(Silent):
            def start(self, stage):
                self.stage = stage

            def update(self, fraction, detail):
                if "unet" in self.stage and fraction > 0.5:
                    os.kill(os.getpid(), signal.SIGKILL)

        random = RandomWeights(folder=Path({str(tmp_path)!r}), architectures=small_architectures.SMALL)
        random_base("sd15", random, Killer())
    """
    done = preloaded.run("-c", program, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    random = small(tmp_path)
    root = random.place("sd15")
    assert not root.exists()
    partial = next(path for path in tmp_path.iterdir() if path.is_dir())
    kept = {path.relative_to(partial): os.stat(path).st_ino for path in partial.rglob("*.safetensors")}
    assert kept
    assert list(partial.rglob(".*.partial"))
    progress = Recorder()
    assert random_base("sd15", random, progress) == root
    assert hashes(root) == hashes(random_base("sd15", small(folder), Recorder()))
    assert len(progress.stages) == 5 - len(kept)
    assert {name: os.stat(root / name).st_ino for name in kept} == kept


def test_too_small_a_disk_is_refused_before_anything_is_written(mount_disk: Callable[[str], Path]) -> None:
    """Gigabytes are not begun that cannot be ended, and the message names what moves them."""
    disk = mount_disk("256k")
    with pytest.raises(DiskFullError, match=r"random weights need about .* XDG_CACHE_HOME"):
        random_base("sd15", small(disk), Recorder())
    assert [path.name for path in disk.iterdir() if not path.name.endswith(".lock")] == []


def test_the_bundle_is_marked_and_keeps_the_checkpoint(export_random) -> None:
    """Nobody takes such a bundle for a real one, and it is sampled as the checkpoint is."""
    bundle = export_random(NAME)
    assert b'"random_weights": true' in (bundle.root / "bundle.json").read_bytes()
    assert bundle.manifest.checkpoint == NAME
    assert bundle.manifest.sampler.kind == "tcd"
    assert not bundle.manifest.vae.tiny


def test_the_same_export_is_done_already(export_random, folder: Path) -> None:
    """Bundle and weights of the same inputs are taken again."""
    bundle, progress = export_random(NAME), Recorder()
    options = ExportOptions(precision="fp32", random_weights=small(folder))
    export_bundle(NAME, bundle.root, options, progress)
    assert progress.notes[-1] == f"{bundle.root} is done already, made from the same inputs"


def test_the_default_folder_is_not_a_real_bundles(
    export_random, folder: Path, bundles_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real bundle is never shadowed or replaced."""
    export_random(NAME)  # its components are reused
    monkeypatch.chdir(bundles_folder.parent)
    bundle = export_bundle(NAME, options=ExportOptions(precision="fp32", random_weights=small(folder)))
    assert bundle.root == Path(f"bundles/{NAME}-random")
    assert Pipeline.load(bundle.root)("a cat", seed=1, output_type="np").images[0].std() > 0.01


@pytest.mark.parametrize(
    ("name", "changes"),
    [(NAME, {}), (NAME, {"vae": "tiny"}), ("Hyper-SDXL-1step-Unet", {})],
)
def test_diffusers_generates_the_same_images(name: str, changes: dict[str, str], export_random) -> None:
    """Verifying finds the weights that were exported, also TAESD's and those of a whole UNet."""
    bundle = export_random(name, **changes)
    pipe = Pipeline.load(bundle.root)
    assert pipe.manifest.vae.tiny == ("vae" in changes)
    comparison = compare(pipe, load_reference(pipe.manifest), Case(prompt="a photo of a cat", seed=0))
    check_thresholds([comparison], find_threshold(pipe))


def test_missing_weights_are_reported(export_random, tmp_path: Path) -> None:
    """Emptying a folder of caches is allowed: who verifies learns what writes the same weights again."""
    import msgspec

    manifest = export_random(NAME).manifest
    origin = msgspec.structs.replace(manifest.origin, base=str(tmp_path / "gone"))
    with pytest.raises(WeightsError, match=f"gone are gone: .*--ckpt {NAME} --random-weights"):
        load_reference(msgspec.structs.replace(manifest, origin=origin))


@pytest.mark.parametrize(
    ("name", "sources", "more", "expected"),
    [
        (NAME, {"base": "a/b"}, {}, "combined with --base 'a/b'"),
        (NAME, {"revision": "main"}, {}, "combined with --revision"),
        (NAME, {"variant": "fp16"}, {}, "combined with --variant"),
        (NAME, {"checkpoint_file": "x.safetensors"}, {}, "cannot be combined with --lora"),
        (NAME, {}, {"lora_scale": 0.5}, "combined with --lora-scale 0.5"),
        (NAME, {"vae": "a/b"}, {}, "no --vae but tiny"),
        ("Hyper-Demo15-1step-lora", {}, {}, "has weights, small ones in the clone: leave --random-weights out"),
    ],
)
def test_clashes_are_refused_before_anything_is_written(
    name: str, sources: dict[str, str], more: dict[str, float], expected: str, tmp_path: Path
) -> None:
    """An option that would have no effect is not passed over in silence."""
    options = ExportOptions(sources=SourceOptions(**sources), random_weights=small(tmp_path / "weights"), **more)
    with pytest.raises(RequestError, match=expected):
        export_bundle(name, tmp_path / "bundle", options)
    assert list(tmp_path.iterdir()) == []


def test_another_architecture_or_seed_has_its_own_folder(tmp_path: Path) -> None:
    """A later version of this package never takes weights of another shape from the folder of caches."""
    random = small(tmp_path)
    wider = dataclasses.replace(random.architectures["sd15"], lora_rank=8)
    others = [small(tmp_path, seed=1), dataclasses.replace(random, architectures={"sd15": wider})]
    assert len({one.place("sd15") for one in (random, *others)}) == 3


def test_the_cache_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME moves it, as the freedesktop rules say."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert RandomWeights().place("sd15").parent == tmp_path / "hypersd/random-weights"
