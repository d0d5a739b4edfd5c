"""The memory that `hypersd info` tells of: estimates from files' sizes, and what TensorRT reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypersd.cli import main
from hypersd.engines import Bundle
from hypersd.engines.bundle import write_manifest
from hypersd.engines.manifest import FileRecord
from hypersd.engines.memory_needs import Need, estimated_needs, need_of_all, need_of_largest_stage, target_needs

from .tensorrt.made_by_hand import manifest, target, with_plans

SIZES = {"text_encoder": 250, "unet": 1700, "vae_decoder": 100}  # bytes
GIB_MB = 2**30 / 1e6


def sized(sizes: dict[str, int] = SIZES) -> Any:
    files = {f"{name}/model.onnx": FileRecord(size=size, sha256="a" * 64) for name, size in sizes.items()}
    return msgspec.structs.replace(manifest(), files=files)


def test_weights_are_those_of_the_files_in_the_backends_precision() -> None:
    """A component that is float32 in a float16 bundle is not counted twice."""
    mixed = sized()
    decoder = mixed.components["vae_decoder"]
    outputs = {name: msgspec.structs.replace(spec, dtype="float32") for name, spec in decoder.outputs.items()}
    components = {**mixed.components, "vae_decoder": msgspec.structs.replace(decoder, outputs=outputs)}
    mixed = msgspec.structs.replace(mixed, components=components)
    for bytes_per_weight, expected in ((None, (250, 1700, 100)), (2, (250, 1700, 50)), (4, (500, 3400, 100))):
        needs = estimated_needs(mixed, bytes_per_weight)
        assert needs is not None
        assert tuple(needs[name].total for name in SIZES) == expected


def test_weights_in_8_bits_are_as_many_as_in_the_file_or_unknown() -> None:
    """How many of the UNet's weights a backend widens to float32 is not in the manifest."""
    packed = msgspec.structs.replace(sized(), precision="int8")
    for bytes_per_weight in (None, 2):
        needs = estimated_needs(packed, bytes_per_weight)
        assert needs is not None
        assert {name: need.total for name, need in needs.items()} == SIZES
    assert estimated_needs(packed, 4) is None


NEEDS = st.dictionaries(
    st.sampled_from(["text_encoder", "text_encoder_2", "unet", "controlnet/a", "vae_encoder", "vae_decoder"]),
    st.builds(Need, st.integers(0, 100), st.integers(0, 100)),
    min_size=1,
)


@given(needs=NEEDS)
def test_a_stage_needs_at_least_its_largest_component_and_no_more_than_all_apart(needs: dict[str, Need]) -> None:
    """All together share the memory of their activations; the components of a stage have their own."""
    totals = [need.total for need in needs.values()]
    stage = need_of_largest_stage(needs)
    assert max(totals) <= stage <= sum(totals)
    assert need_of_all(needs) == sum(need.weights for need in needs.values()) + max(
        need.activations for need in needs.values()
    )
    for together in ({"text_encoder", "text_encoder_2"}, {"unet", "controlnet/a"}):
        assert stage >= sum(need.total for name, need in needs.items() if name in together)
    if needs.keys() <= {"unet", "vae_encoder", "vae_decoder"}:
        assert stage == max(totals)


def test_a_target_without_figures_has_no_estimate() -> None:
    """Half of the figures would look like a sum."""
    whole = with_plans(target(), sized())
    needs = target_needs(whole)
    assert needs is not None
    assert set(needs) == set(SIZES)
    plans = {**whole.plans, "unet": msgspec.structs.replace(whole.plans["unet"], activation_memory=None)}
    assert target_needs(msgspec.structs.replace(whole, plans=plans)) is None


def test_info_shows_each_component_all_and_the_largest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the host, on a GPU, and of a target; an estimate is called one."""
    sizes = {"text_encoder": 250_000, "unet": 1_700_000, "vae_decoder": 100_000}
    made = sized(sizes)
    built = with_plans(target(), made)
    files = {plan.file: FileRecord(size=1, sha256="0" * 64) for plan in built.plans.values()}
    made = msgspec.structs.replace(made, engines={"made": built}, files={**made.files, **files})
    for file, record in made.files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"\0" * record.size)
    write_manifest(tmp_path, made)
    assert Bundle.load(tmp_path).manifest.components.keys() == sizes.keys()
    assert main(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.split("memory, MB")[1].splitlines() if line.strip()}
    target_of_one, of_all = f"{3 * GIB_MB:,.1f}", f"{5 * GIB_MB:,.1f}"
    assert rows["unet"] == ["3.4", "1.7", "1.7", target_of_one]
    assert rows["all"] == ["components", "4.1", "2.0", "2.0", of_all]
    assert rows["--low-memory"] == ["3.4", "1.7", "1.7", target_of_one]
    assert "estimated from the files' sizes" in text
