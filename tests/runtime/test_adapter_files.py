"""LoRA files for a bundle's slot: what is accepted, what is said, and what is rejected in words."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_stand_in import Capturable, StandInCapture
from counting import load_engines
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_writers import Random, kohya, random_lora
from safetensors.torch import save_file
from torch import Tensor

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.cuda.turns import Turns
from hypersd.errors import RequestError, WeightsError
from hypersd.runtime.adapter import AdapterWarning
from hypersd.runtime.adapters import Adapters, fair_shares
from hypersd.runtime.text import load_tokenizers

NAME = "Hyper-SD15-1step-lora"
PROMPT = "a photo of a cat"
pytestmark = pytest.mark.filterwarnings("error::hypersd.runtime.adapter.AdapterWarning")


@pytest.fixture(scope="module")
def bundle(export_slotted: Callable[[str], Path]) -> Path:
    return export_slotted(NAME)


@pytest.fixture
def pipe(bundle: Path) -> Pipeline:
    return Pipeline.load(bundle)


@pytest.fixture
def lora(pipe: Pipeline) -> Random:
    """Factors for every layer that has a place in the UNet, of ranks 2 to 4."""
    return random_lora({"unet": shapes_of(pipe, "unet", placed=True)}, alpha=1.5)


def shapes_of(pipe: Pipeline, component: str, placed: bool) -> dict[str, tuple[int, ...]]:
    slot = pipe.manifest.lora_slot
    assert slot is not None
    return {path: layer.weight for path, layer in slot.layers[component].items() if layer.has_place or not placed}


def write(folder: Path, lora: Random | dict[str, Tensor], name: str = "style") -> Path:
    tensors = lora if all(isinstance(key, str) for key in lora) else kohya(lora)  # type: ignore[arg-type]
    path = folder / f"{name}.safetensors"
    save_file({str(key): tensor.contiguous() for key, tensor in tensors.items()}, path)  # type: ignore[union-attr]
    return path


def with_rank(lora: Random, rank: int) -> Random:
    generator = torch.Generator().manual_seed(2)
    return {
        place: (
            torch.randn(rank, *down.shape[1:], generator=generator),
            torch.randn(up.shape[0], rank, *up.shape[2:], generator=generator) * 0.02,
            float(rank),
        )
        for place, (down, up, _) in lora.items()
    }


def image(pipe: Pipeline, adapters: dict[str, float] | None = None) -> np.ndarray:
    return pipe(PROMPT, seed=0, adapters=adapters, output_type="np").images


def test_an_adapter_acts_only_where_it_is_named(pipe: Pipeline, lora: Random, tmp_path: Path) -> None:
    """Loading a file changes no image; unloading it does not take it from the others."""
    plain = image(pipe)
    adapter = pipe.load_lora_weights(write(tmp_path, lora))
    assert (adapter.name, adapter.rank, adapter.notes) == ("style", 4, ())
    assert np.array_equal(image(pipe), plain)
    styled = image(pipe, {"style": 1.0})
    assert np.abs(styled - plain).max() > 0.02
    pipe.load_lora_weights(write(tmp_path, lora, "other"), adapter_name="Another name: 2")
    pipe.unload_lora_weights("style")
    assert [adapter.name for adapter in pipe.adapters] == ["Another name: 2"]
    assert np.array_equal(image(pipe, {"Another name: 2": 1.0}), styled)
    pipe.unload_lora_weights()
    assert pipe.adapters == []


def test_a_request_knows_its_adapters(pipe: Pipeline, lora: Random, tmp_path: Path) -> None:
    """Names come in one order, so that equal calls are equal requests."""
    for name in ("b", "a"):
        pipe.load_lora_weights(write(tmp_path, lora, name))
    first, second = (pipe(PROMPT, seed=0, adapters=given).request for given in ({"b": 1, "a": 2.0}, {"a": 2, "b": 1.0}))
    assert first == second
    assert [(chosen.name, chosen.strength) for chosen in first.adapters] == [("a", 2.0), ("b", 1.0)]


def test_threads_may_use_different_adapters_at_once(pipe: Pipeline, lora: Random, tmp_path: Path) -> None:
    """The slot's tensor belongs to the call."""
    from concurrent.futures import ThreadPoolExecutor

    pipe.load_lora_weights(write(tmp_path, lora))
    strengths = [0.0, 0.5, -1.0, 2.0]
    expected = [image(pipe, {"style": strength}) for strength in strengths]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(lambda s: image(pipe, {"style": s}), strengths), expected, strict=True):
                assert np.array_equal(found, wanted)


def test_a_higher_rank_is_reduced_and_said(pipe: Pipeline, lora: Random, tmp_path: Path) -> None:
    """The tiny layers lose something at rank 12 of 20; the image stays near."""
    big = with_rank(lora, 20)
    file = write(tmp_path, big)
    with pytest.warns(AdapterWarning, match=r"rank 20 is reduced to the slot's 12 \(relative error \d+\.\d%\)"):
        adapter = pipe.load_lora_weights(file)
    assert adapter.rank == 12
    with pytest.raises(WeightsError, match=r"rank 20 is reduced .*nothing may be left out \(strict\).*--add-lora"):
        pipe.load_lora_weights(file, "again", strict=True)


def test_a_rank_that_is_not_used_is_no_loss(pipe: Pipeline, lora: Random, tmp_path: Path) -> None:
    """A file of rank 20 whose factors span 4 dimensions fits as it is."""
    padded = {
        place: (
            torch.cat([down, down.new_zeros(20 - len(down), *down.shape[1:])]),
            torch.cat([up, up.new_zeros(up.shape[0], 20 - up.shape[1], *up.shape[2:])], dim=1),
            alpha * 20 / len(down),
        )
        for place, (down, up, alpha) in lora.items()
    }
    pipe.load_lora_weights(write(tmp_path, lora), strict=True)
    pipe.load_lora_weights(write(tmp_path, padded, "padded"), strict=True)
    assert np.abs(image(pipe, {"padded": 1.0}) - image(pipe, {"style": 1.0})).max() < 1e-4


def test_ranks_beyond_the_slots_get_fair_shares(pipe: Pipeline, lora: Random, tmp_path: Path) -> None:
    """Three sliders at once must work; the loss is said once, and strict files refuse it."""
    for name, rank in (("small", 3), ("large", 8), ("strict", 8)):
        pipe.load_lora_weights(write(tmp_path, with_rank(lora, rank), name), strict=name == "strict")
    together = {"small": 1.0, "large": 1.0}
    whole = image(pipe, together)
    with (
        pytest.warns(AdapterWarning, match=r"'large' has rank 8, and 4 of the LoRA slot's 12 are free"),
        pytest.raises(RequestError, match=r"'strict' has rank 8, and 5 .*larger --lora-slot"),
    ):
        image(pipe, {**together, "strict": 1.0})
    pipe.load_lora_weights(write(tmp_path, with_rank(lora, 8), "third"))
    with pytest.warns(AdapterWarning, match=r"relative error \d+\.\d%"):
        shared = image(pipe, {**together, "third": 1e-6})
    assert np.abs(shared - whole).mean() < np.abs(image(pipe) - whole).mean() * 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(image(pipe, {**together, "third": 1e-6}), shared)


@settings(deadline=None)
@given(ranks=st.lists(st.integers(1, 64), min_size=1, max_size=8), room=st.integers(1, 64))
def test_fair_shares_use_the_room(ranks: list[int], room: int) -> None:
    shares = fair_shares(ranks, room)
    assert sum(shares) == min(room, sum(ranks))
    assert all(0 <= share <= rank for share, rank in zip(shares, ranks, strict=True))
    cut = [share for share, rank in zip(shares, ranks, strict=True) if share < rank]
    assert not cut or max(cut) - min(cut) <= 1
    assert not cut or all(share <= max(cut) + 1 for share in shares)


def test_layers_without_a_place_are_left_out_and_said(pipe: Pipeline, lora: Random, tmp_path: Path) -> None:
    """Convolutions cannot be in the slot: their share of the change decides whether the user minds."""
    every = shapes_of(pipe, "unet", placed=False)
    convolutions = random_lora(
        {"unet": {path: shape for path, shape in every.items() if len(shape) == 4 and shape[2] > 1}}
    )
    file = write(tmp_path, {**lora, **convolutions})
    with pytest.warns(AdapterWarning, match=rf"no place for {len(convolutions)} layers of unet.* left out \(\d+% of"):
        pipe.load_lora_weights(file)
    pipe.load_lora_weights(write(tmp_path, lora, "without"))
    assert np.array_equal(image(pipe, {"style": 1.0}), image(pipe, {"without": 1.0}))
    with pytest.raises(WeightsError, match=r"no place for .*strict.*--add-lora"):
        pipe.load_lora_weights(file, "again", strict=True)
    with pytest.raises(WeightsError, match="nothing is left"):
        pipe.load_lora_weights(write(tmp_path, convolutions, "convolutions"))


def test_a_text_encoders_layers_need_a_text_slot(
    lora: Random, tmp_path: Path, source_options: Any, bundles_folder: Path
) -> None:
    """Without one they are left out with a word, and the UNet's layers act."""
    from hypersd.export import ExportOptions, export_bundle
    from hypersd.export.lora_slot import SlotOptions

    options = ExportOptions(sources=source_options(NAME), precision="fp32", lora_slot=SlotOptions(rank=12))
    pipe = Pipeline.load(export_bundle(NAME, bundles_folder / f"{NAME}-slotted-unet", options))
    text = random_lora({"text_encoder": shapes_of(pipe, "text_encoder", placed=False)})
    with pytest.warns(AdapterWarning, match=r"no place for \d+ layers of text_encoder, which are left out"):
        pipe.load_lora_weights(write(tmp_path, {**lora, **text}))
    pipe.load_lora_weights(write(tmp_path, lora, "without"))
    assert np.array_equal(image(pipe, {"style": 1.0}), image(pipe, {"without": 1.0}))


def test_bad_files_are_rejected_by_name(pipe: Pipeline, lora: Random, tmp_path: Path) -> None:
    """Each message names the file and says what to do."""
    place = next(iter(lora))
    down, up, alpha = lora[place]
    bad = {
        "nan": ({**lora, place: (down * float("nan"), up, alpha)}, "NaN"),
        "shape": ({**lora, place: (down[:, :-1].contiguous(), up, alpha)}, "another base"),
        "nothing": ({"some.weight": torch.zeros(3)}, "no LoRA"),
        "sdxl": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(1, 8)}, "LoRA for SDXL"),
        "dora": (kohya(lora) | {f"lora_unet_{place[1].replace('.', '_')}.dora_scale": torch.ones(len(up), 1)}, "DoRA"),
    }
    for name, (tensors, said) in bad.items():
        file = write(tmp_path, tensors, name)
        with pytest.raises(WeightsError, match=said) as caught:
            pipe.load_lora_weights(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    torn = write(tmp_path, lora, "torn")
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        pipe.load_lora_weights(torn)
    with pytest.raises(WeightsError, match="is not a file"):
        pipe.load_lora_weights(tmp_path / "none.safetensors")
    assert pipe.adapters == []


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 10.1, -11, "1", None, True])
def test_bad_strengths_are_rejected(pipe: Pipeline, lora: Random, tmp_path: Path, strength: Any) -> None:
    pipe.load_lora_weights(write(tmp_path, lora))
    with pytest.raises(RequestError, match=r"adapters 'style'.*-10 to 10"):
        image(pipe, {"style": strength})


def test_bad_names_are_rejected(pipe: Pipeline, lora: Random, tmp_path: Path) -> None:
    file = write(tmp_path, lora)
    pipe.load_lora_weights(file)
    with pytest.raises(RequestError, match=r"'style' is loaded already: give another name, or unload it"):
        pipe.load_lora_weights(file)
    with pytest.raises(RequestError, match=r"'other' is not loaded: expected some of: style"):
        image(pipe, {"style": 1.0, "other": 1.0})
    with pytest.raises(RequestError, match=r"'other' is not loaded"):
        pipe.unload_lora_weights("other")
    for name in ("", "a\nb", "x" * 101):
        with pytest.raises(RequestError, match="printable"):
            pipe.load_lora_weights(file, name)
    for given_ in (["style"], {1: 1.0}, "style"):
        with pytest.raises(RequestError, match="strengths by name"):
            image(pipe, given_)  # type: ignore[arg-type]


def test_a_bundle_without_a_slot_names_the_option(sd15_bundle: Path, lora: Random, tmp_path: Path) -> None:
    pipe = Pipeline.load(sd15_bundle)
    for attempt in (lambda: pipe.load_lora_weights(write(tmp_path, lora)), lambda: image(pipe, {"style": 1.0})):
        with pytest.raises(RequestError, match="no LoRA slot: export it with --lora-slot RANK"):
            attempt()


def test_the_images_settings_name_file_and_hash(bundle: Path, lora: Random, tmp_path: Path) -> None:
    """`hypersd generate` writes them into the PNG: the image can be made again."""
    import hashlib

    from PIL import Image

    from hypersd.cli import main

    file, output = write(tmp_path, lora), tmp_path / "image.png"
    assert main(["generate", str(bundle), PROMPT, "--seed", "0", "-o", str(output), "--use-lora", f"{file}:0.5"]) == 0
    settings_ = json.loads(Image.open(output).info["hypersd"])
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert settings_["adapters"] == {"style": {"strength": 0.5, "file": "style.safetensors", "sha256": sha256}}
    pipe = Pipeline.load(bundle)
    pipe.load_lora_weights(file)
    expected = pipe(PROMPT, seed=0, adapters={"style": 0.5}).images[0]
    assert np.array_equal(np.asarray(Image.open(output)), np.asarray(expected))


def test_on_a_gpu_the_slot_is_filled_in_a_turn(
    bundle: Path, lora: Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read on the stream of the turns, by other threads' calls too, which find it cached: so it is made there.

    The engines of the CPU say that they can be recorded, and take turns as they do on a GPU.
    """
    opened, turns, filled = Bundle.load(bundle), [0], []
    turn, pack = Turns.turn, Adapters.pack

    @contextmanager
    def counted(self: Turns) -> Iterator[Any]:
        with turn(self) as caller:
            turns[0] += 1
            yield caller
            turns[0] -= 1

    def noted(self: Adapters, chosen: Any) -> Any:
        if chosen:
            filled.append(turns[0])
        return pack(self, chosen)

    monkeypatch.setattr(Turns, "turn", counted)
    monkeypatch.setattr(Adapters, "pack", noted)
    engines = {name: Capturable(engine) for name, engine in load_engines(opened, "null").items()}
    pipe = Pipeline(opened.manifest, engines, load_tokenizers(opened), capture=StandInCapture())
    pipe.load_lora_weights(write(tmp_path, lora))
    pipe(PROMPT, adapters={"style": 0.5})
    assert filled == [1]
