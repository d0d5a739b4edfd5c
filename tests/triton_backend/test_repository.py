"""The output of `hypersd export --triton`, read with Triton's own protobuf."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypersd.engines import Bundle
from hypersd.errors import RequestError, UserError
from hypersd.triton_backend.repository import write_repository

pytest.importorskip("tritonclient")


def read_config(model: Path) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((model / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig())


def write(bundle: Path, folder: Path, replace: bool = False) -> Path:
    return write_repository(Bundle.load(bundle), folder, replace)


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_layout_and_configuration(sd15_bundle: Path, tmp_path: Path) -> None:
    before = contents(sd15_bundle)
    model = write(sd15_bundle, tmp_path / "models")
    assert model == tmp_path / "models" / sd15_bundle.name
    written = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert written == {"config.pbtxt", "1/model.py"}
    assert contents(sd15_bundle) == before, "nothing executable goes into a bundle"
    config = read_config(model)
    assert (config.name, config.backend, config.platform) == (model.name, "python", "")
    assert config.max_batch_size == 1
    required = [tensor.name for tensor in config.input if not tensor.optional]
    assert required == ["prompt"]
    assert {tensor.name for tensor in config.input} == {
        *("prompt", "negative_prompt", "seed", "steps", "eta", "guidance_scale", "width", "height"),
        *("image", "mask_image", "strength", "keep_steps", "padding_mask_crop", "mask_blur"),
    }
    kinds = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    types = {tensor.name: kinds[tensor.data_type].name for tensor in config.input}
    assert [types[name] for name in ("image", "strength", "keep_steps", "mask_blur")] == [
        *("TYPE_STRING", "TYPE_FP32", "TYPE_BOOL", "TYPE_INT32")
    ]
    outputs = {tensor.name: list(tensor.dims) for tensor in config.output}
    assert outputs == {"image": [-1, -1, 3], "seed": [1]}


def test_a_bundle_with_a_lora_slot(export_slotted: Callable[[str], Path], sd15_bundle: Path, tmp_path: Path) -> None:
    """It takes adapters, and has a parameter for the folder of LoRAs, which is empty at first."""
    config = read_config(write(export_slotted("Hyper-SD15-1step-lora"), tmp_path))
    (adapters,) = [tensor for tensor in config.input if tensor.name == "adapters"]
    assert (list(adapters.dims), adapters.optional) == ([1], True)
    assert config.parameters["lora_folder"].string_value == ""
    assert "lora_folder" not in read_config(write(sd15_bundle, tmp_path)).parameters


def test_batches_queue_and_instances(sdxl_dynamic_bundle: Path, tmp_path: Path) -> None:
    config = read_config(write(sdxl_dynamic_bundle, tmp_path))
    assert config.max_batch_size == 2
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0, "nothing waits while the model is idle"
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 64
    (group,) = config.instance_group
    assert (group.Kind.Name(group.kind), group.count) == ("KIND_AUTO", 1)
    types = {tensor.name: (tensor.data_type, list(tensor.dims), tensor.optional) for tensor in config.input}
    strings = types["prompt"][0]
    assert types["control_image"] == (strings, [1], True)
    assert {"control_scale", "control_start", "control_end"} <= types.keys()


def test_any_name_and_path_can_be_written(sd15_bundle: Path, copy_bundle, tmp_path: Path) -> None:
    r"""A folder may have nearly any name: the configuration is read back unchanged and leads to the bundle."""
    bundle = copy_bundle(sd15_bundle, 'a "b" \\n é {').root
    model = write(bundle, tmp_path / "models")
    config = read_config(model)
    assert config.name == bundle.name == model.name
    path = config.parameters["bundle"].string_value
    assert not Path(path).is_absolute()
    assert (model / path).resolve() == bundle.resolve()


def test_several_bundles_lie_in_one_repository(sd15_bundle: Path, sdxl_bundle: Path, tmp_path: Path) -> None:
    models = [write(bundle, tmp_path) for bundle in (sd15_bundle, sdxl_bundle)]
    assert sorted(tmp_path.iterdir()) == sorted(models)


def test_a_changed_configuration_is_kept(sd15_bundle: Path, tmp_path: Path) -> None:
    config = write(sd15_bundle, tmp_path) / "config.pbtxt"
    original = config.read_text()
    write(sd15_bundle, tmp_path)  # the same is no change
    config.write_text(original + "# mine\n")
    with pytest.raises(UserError, match=r"differs from the new configuration: .* --replace"):
        write(sd15_bundle, tmp_path)
    assert config.read_text().endswith("# mine\n")
    write(sd15_bundle, tmp_path, replace=True)
    assert config.read_text() == original


def test_a_bundle_is_no_repository(sd15_bundle: Path, copy_bundle, tmp_path: Path) -> None:
    """Neither in the bundle, nor beside it where the model would have the bundle's own folder."""
    bundle = copy_bundle(sd15_bundle, "mine").root
    before = contents(bundle)
    for folder in (bundle, bundle / "models", bundle.parent):
        with pytest.raises(RequestError, match="inside the bundle"):
            write(bundle, folder)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(RequestError, match="is a file"):
        write(bundle, file)
    assert contents(bundle) == before
