"""TensorRT engines from the command line: built, told of, chosen, damaged, interrupted. All real, on TensorRT-RTX."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import preloaded
import pytest

from hypersd.cli import main, make_parser
from hypersd.engines import Bundle
from hypersd.engines.files import sha256_file
from hypersd.engines.image_shapes import choose_shapes
from hypersd.engines.specs import ImageShapes, Range
from hypersd.errors import RequestError

if os.environ.get("CI") == "true":  # there it is installed, and must not hide the whole file if it is not
    importlib.import_module("tensorrt_rtx")
else:
    pytest.importorskip("tensorrt_rtx")
NETWORKS = {"text_encoder", "unet", "vae_encoder", "vae_decoder"}


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """``copy(bundle)``: a copy that may be written to, with no other bundle beside it."""

    def make(bundle: Path) -> Path:
        return Path(shutil.copytree(bundle, tmp_path / "bundle"))

    return make


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No TensorRT can be imported."""
    from hypersd.engines.tensorrt.api import load_api

    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    load_api.cache_clear()
    yield
    load_api.cache_clear()


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> tuple[str, str]:
    """The output and error output of a command, which go to no terminal and so have no progress bars."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    captured = capsys.readouterr()
    assert not {"\x1b", "\r"} & {*captured.out, *captured.err}
    return captured.out, captured.err


def target_of(bundle: Path) -> str:
    """The name of the only target."""
    (name,) = Bundle.load(bundle).manifest.engines
    return name


def change_manifest(bundle: Path, change: Callable[[dict], None]) -> None:
    """Write a bundle's manifest anew, changed."""
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def shorten(bundle: Path, network: str) -> Path:
    """Cut a byte off an engine."""
    path = bundle / "engines" / target_of(bundle) / f"{network}.engine"
    path.write_bytes(path.read_bytes()[:-1])
    return path


# build


def test_only_a_shortened_engine_is_built_again(rtx_bundle: Path, copy, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what it took, what it built and what to do next; the second time there is nothing to do."""
    bundle = copy(rtx_bundle)
    path = shorten(bundle, "text_encoder")
    others = {other: other.stat().st_mtime_ns for other in path.parent.glob("*.engine") if other != path}
    out, err = run(capsys, "build", bundle, "--backend", "tensorrt-rtx")
    assert [line.split(":")[0] for line in err.splitlines() if "build engine" in line] == ["text_encoder"]
    assert others == {other: other.stat().st_mtime_ns for other in others}
    built, next_command = out.splitlines()
    assert built.startswith(f"engines {target_of(bundle)}: ")
    assert " MB, in " in built
    assert next_command == f'generate with: hypersd generate {bundle} "a photo of a cat"'
    Bundle.load(bundle, hashes=True)
    assert "are there already" in run(capsys, "build", bundle, "--backend", "tensorrt-rtx")[1]


def test_engines_can_be_deleted(rtx_bundle: Path, copy, capsys: pytest.CaptureFixture[str]) -> None:
    """Engines of an older TensorRT take gigabytes. The bundle is whole without them; a wrong name deletes none."""
    bundle = copy(rtx_bundle)
    name = target_of(bundle)
    _, err = run(capsys, "build", bundle, "--remove", "other", code=2)
    assert "'other'" in err
    assert name in err
    out, _ = run(capsys, "build", bundle, "--remove", name)
    assert out == f"engines {name} are deleted\n"
    assert not list(bundle.rglob("*.engine"))
    manifest = Bundle.load(bundle, hashes=True).manifest
    assert not manifest.engines
    assert not [file for file in manifest.files if file.startswith("engines/")]


def test_what_is_printed_can_be_pasted(
    rtx_bundle: Path, sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shell makes the same path of any bundle's name, and a name like an emoji's stays as it is."""
    bundle = Path(shutil.copytree(rtx_bundle, tmp_path / "bü ndle [red] :cat: 'a'"))
    line = run(capsys, "build", bundle, "--backend", "tensorrt-rtx")[0].splitlines()[-1]
    words = shlex.split(line.removeprefix("generate with: hypersd "))
    assert make_parser().parse_args(words).bundle == bundle
    bare = Path(shutil.copytree(sd15_bundle, tmp_path / "no engines"))
    (line,) = [line for line in run(capsys, "info", bare)[0].splitlines() if "hypersd build" in line]
    assert make_parser().parse_args(shlex.split(line.partition("hypersd ")[2])).bundle == bare


def test_a_name_that_looks_like_an_option(
    sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is printed as a path."""
    shutil.copytree(sd15_bundle, tmp_path / "-b")
    monkeypatch.chdir(tmp_path)
    assert "hypersd build ./-b\n" in run(capsys, "info", "./-b")[0]


def test_the_machine_is_looked_at_once(
    rtx_bundle: Path, copy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, that is; the library looks for itself."""
    from hypersd.engines.tensorrt import machine

    looks, look = [], machine.this_machine
    monkeypatch.setattr(machine, "this_machine", lambda *words: looks.append(words) or look(*words))
    run(capsys, "build", copy(rtx_bundle), "--backend", "tensorrt-rtx")
    assert len(looks) == 1


def test_auto_says_what_it_took(rtx_bundle: Path, copy, capsys: pytest.CaptureFixture[str], without_gpu: None) -> None:
    """Without a GPU that is TensorRT-RTX, and what it built will not run here."""
    out, err = run(capsys, "build", copy(rtx_bundle))
    assert err.startswith("engines: TensorRT-RTX ")
    assert "cannot run on this machine (" in err
    assert "ONNX Runtime" in err
    assert len(out.splitlines()) == 2


@pytest.fixture
def without_gpu() -> None:
    """The tests' usual machine; scripts/gpu_check.sh shows a GPU to them."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")


def test_engines_for_named_gpus(sd15_bundle: Path, copy, capsys: pytest.CaptureFixture[str]) -> None:
    """--compute-capability and --optimization-level are in the target, and `info` tells them."""
    bundle = copy(sd15_bundle)
    words = ["--backend", "tensorrt-rtx", "--compute-capability", "8.9", "8.6", "--optimization-level", "1"]
    run(capsys, "build", bundle, *words)
    target = Bundle.load(bundle).manifest.engines[target_of(bundle)]
    assert target.compute_capabilities == ("8.6", "8.9")
    assert target.optimization_level == 1
    assert target.plans.keys() == NETWORKS
    out, _ = run(capsys, "info", bundle)
    assert "8.6, 8.9" in out
    assert "optimization level 1" in out


def test_engines_for_a_part_of_the_images(sd15_tiny_vae_bundle: Path, copy, capsys: pytest.CaptureFixture[str]) -> None:
    """A fixed width and a narrower height; the batch keeps the bundle's range."""
    bundle = copy(sd15_tiny_vae_bundle)
    words = ["--backend", "tensorrt-rtx", "--dynamic", "height=64:72:80", "width=64:64:64"]
    run(capsys, "build", bundle, *words)
    shapes = Bundle.load(bundle).manifest.engines[target_of(bundle)].shapes
    assert [(r.min, r.opt, r.max) for r in (shapes.batch, shapes.height, shapes.width)] == [
        (1, 1, 2),
        (64, 72, 80),
        (64, 64, 64),
    ]
    assert "1..2 of 64 x 64..80" in run(capsys, "info", bundle)[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--backend", "openvino"], "tensorrt-rtx"),
        (["--compute-capability", "8.9", "89"], "e.g. 8.9"),
        (["--compute-capability", "9.9"], "8.9"),
        (["--optimization-level", "6"], "5"),
        (["--optimization-level", "-1"], "0"),
        (["--timing-cache", "."], "folder"),
        (["--timing-cache", "new"], "timing cache"),
        (["--batch", "2"], "outside this bundle's 1"),
        (["--size", "64x72"], "outside this bundle's 64"),
        (["--size", "0x64"], "outside this bundle's 64"),
        (["--dynamic"], "at least one"),
        (["--dynamic", "depth=1:2:3"], "MIN:OPT:MAX"),
        (["--dynamic", "height=64:64:128"], "height 128 is outside this bundle's 64"),
        (["--size", "64x64", "--dynamic", "height=64:64:64"], "one of the two"),
        (["--remove", "some"], "--remove builds nothing: leave --backend out"),
    ],
)
def test_bad_arguments_of_build(
    arguments: list[str], expected: str, sd15_bundle: Path, fails: Callable[..., str]
) -> None:
    """Each ends with one line, and nothing is built."""
    assert expected in fails("build", sd15_bundle, "--backend", "tensorrt-rtx", *arguments)
    assert not (sd15_bundle / "engines").exists()


@pytest.mark.parametrize(
    "option",
    [
        ["--size", "64x64"],
        ["--dynamic", "height=64:64:64"],
        ["--optimization-level", "0"],
        ["--compute-capability", "8.9"],
        ["--strip-weights"],
    ],
)
def test_remove_takes_no_option_of_a_build(option: list[str], rtx_bundle: Path, fails: Callable[..., str]) -> None:
    """Nobody is to believe that it deletes engines of one height."""
    name = target_of(rtx_bundle)
    assert f"leave {option[0]} out" in fails("build", rtx_bundle, "--remove", name, *option)
    assert target_of(rtx_bundle) == name


@pytest.mark.parametrize(
    "option", [["--dynamic", "height=64:64:64"], ["--dynamic", "height=64"], ["--compute-capability", "8.9"]]
)
def test_a_bundle_after_an_option_of_several_values(option: list[str], fails: Callable[..., str]) -> None:
    """The option takes it for a value; the line says where it belongs."""
    assert "BUNDLE before the option" in fails("build", *option, "bundle")


def test_a_bad_word_is_answered_at_once() -> None:
    """Before torch is loaded, as everywhere on the command line."""
    program = """if True:
        import sys
        from hypersd.cli import main
        for words in (["--optimization-level", "9"], ["--timing-cache", "/"], ["--dynamic", "a=1"], []):
            assert main(["build", "nowhere", *words]) == 2
        assert main(["export", "--ckpt", "Hyper-SD15-1step-lora", "--backend", "none", "--strip-weights"]) == 2
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 5
    assert "nowhere is not a bundle" in done.stderr


def test_build_with_nothing_installed(sd15_bundle: Path, nothing_installed: None, fails: Callable[..., str]) -> None:
    """It says what to install."""
    assert "[tensorrt-rtx]" in fails("build", sd15_bundle)
    assert "[tensorrt]" in fails("build", sd15_bundle, "--backend", "tensorrt")


# shapes


@pytest.fixture(scope="module")
def wide_manifest(sd15_bundle: Path):
    """A manifest of 1 to 4 images, 64 to 128 high and 64 wide."""
    shapes = ImageShapes(
        batch=Range(name="batch", min=1, opt=1, max=4),
        height=Range(name="height", min=64, opt=96, max=128),
        width=Range(name="width", min=64, opt=64, max=64),
    )
    return msgspec.structs.replace(Bundle.load(sd15_bundle).manifest, shapes=shapes)


def test_shapes_keep_what_is_not_named(wide_manifest) -> None:
    """Nothing named is the whole bundle; one span replaces one range, its ends included."""
    assert choose_shapes(wide_manifest, {}) == wide_manifest.shapes
    assert choose_shapes(wide_manifest, {"height": (64, 96, 128)}) == wide_manifest.shapes
    shapes = choose_shapes(wide_manifest, {"batch": (4, 4, 4)})
    assert (shapes.batch.min, shapes.batch.opt, shapes.batch.max) == (4, 4, 4)
    assert (shapes.height, shapes.width) == (wide_manifest.shapes.height, wide_manifest.shapes.width)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ({"batch": (1, 1, 5)}, "batch 5 is outside this bundle's 1..4"),
        ({"batch": (0, 1, 1)}, "batch 0 is outside this bundle's 1..4"),
        ({"height": (56, 64, 64)}, "height 56 is outside this bundle's 64..128"),
        ({"height": (64, 100, 128)}, "height 100 is not a multiple of 8: take 96"),
        ({"height": (96, 64, 128)}, "96:64:128: expected MIN <= OPT <= MAX"),
        ({"depth": (1, 1, 1)}, "expected batch, height, width"),
    ],
)
def test_shapes_that_the_bundle_has_not(spans, expected: str, wide_manifest) -> None:
    """Both values are named."""
    with pytest.raises(RequestError, match=re.escape(expected)):
        choose_shapes(wide_manifest, spans)


# Ctrl-C


@pytest.mark.parametrize("command", ["build", "export"])
def test_ctrl_c_while_building(command: str, export_arguments: list[str], sd15_bundle: Path, copy) -> None:
    """It ends with 130 and one line that says what is kept; the next run continues from there."""
    bundle = copy(sd15_bundle)
    words = {
        "build": ["build", str(bundle), "--backend", "tensorrt-rtx"],
        "export": [*export_arguments, "--precision", "fp32", "--backend", "tensorrt-rtx", "--out", str(bundle)],
    }[command]
    argv = ["-m", "hypersd.cli", *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if command == "build":  # export begins in a fresh process in test_export_from_hub.py
        process: Any = subprocess.Popen([sys.executable, *argv], text=True, **streams)
    else:
        process = preloaded.start(*argv, **streams)
    while process.poll() is None and b"text_encoder.engine" not in (bundle / "bundle.json").read_bytes():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    last = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 130
    assert last.startswith("hypersd: interrupted; ")
    assert "are kept" in last
    left = {path.name for path in (bundle / "engines").rglob("*") if path.is_file()}
    assert left == {"text_encoder.engine"}, "no unfinished engine stays"

    done = preloaded.run(*argv, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "text_encoder: build engine" not in done.stderr
    assert Bundle.load(bundle, hashes=True).manifest.engines[target_of(bundle)].plans.keys() == NETWORKS


# export


@pytest.fixture
def exported(export_arguments: list[str], sd15_bundle: Path, copy) -> list[object]:
    """The words that export a bundle which is there already, ONNX only: what comes next is its engines."""
    return [*export_arguments, "--precision", "fp32", "--out", copy(sd15_bundle)]


def test_export_with_engines(
    export_arguments: list[str], sd15_bundle: Path, copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command from weights to engines for every network. Done, it says so; of what is lost it builds that alone."""
    copy(sd15_bundle)  # beside the new one, whose networks it has: nothing needs tracing again
    bundle = tmp_path / "new"
    words = [*export_arguments, "--precision", "fp32", "--out", bundle, "--backend", "tensorrt-rtx"]
    out, _ = run(capsys, *words)
    assert [line.split()[0] for line in out.splitlines()] == ["bundle", "engines", "generate"]
    target = Bundle.load(bundle, hashes=True).manifest.engines[target_of(bundle)]
    assert target.plans.keys() == NETWORKS
    shorten(bundle, "text_encoder")
    _, err = run(capsys, *words)
    assert "done already" in err
    assert [line.split(":")[0] for line in err.splitlines() if "build engine" in line] == ["text_encoder"]


def test_export_takes_what_is_installed(
    exported: list[object], capsys: pytest.CaptureFixture[str], without_gpu: None
) -> None:
    """The default builds, and says with what."""
    _, err = run(capsys, *exported)
    assert "engines: TensorRT-RTX " in err
    assert target_of(Path(str(exported[-1]))).startswith("tensorrt-rtx-")


def test_export_with_nothing_installed(
    exported: list[object], nothing_installed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle is ONNX only, which one line says, with the way to engines; that is no error."""
    out, err = run(capsys, *exported)
    (line,) = [line for line in err.splitlines() if "ONNX only" in line]
    assert "[tensorrt-rtx]" in line
    assert line.endswith(f"hypersd build {exported[-1]}")
    assert [line.split()[0] for line in out.splitlines()] == ["bundle", "generate"]


def test_export_without_engines(exported: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    """--backend none asks for ONNX alone, so nothing is said of it."""
    out, err = run(capsys, *exported, "--backend", "none")
    assert "ONNX only" not in err
    assert [line.split()[0] for line in out.splitlines()] == ["bundle", "generate"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--backend", "tensorrt"], "[tensorrt]"),
        (["--backend", "tensorrt-rtx"], "[tensorrt-rtx]"),
    ],
)
def test_export_rejects_impossible_engines(
    arguments: list[str],
    expected: str,
    export_arguments: list[str],
    tmp_path: Path,
    nothing_installed: None,
    fails: Callable[..., str],
) -> None:
    """Before the export takes minutes: nothing is written."""
    assert expected in fails(*export_arguments, "--out", tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--backend", "openvino"], "tensorrt-rtx"),
        (["--backend", "none", "--strip-weights"], "--strip-weights"),
        (["--backend", "none", "--optimization-level", "0"], "--optimization-level"),
        (["--backend", "tensorrt-rtx", "--compute-capability", "9.9"], "8.9"),
        (["--backend", "tensorrt-rtx", "--timing-cache", "new"], "timing cache"),
    ],
)
def test_bad_engine_options_of_export(
    arguments: list[str], expected: str, export_arguments: list[str], tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Likewise."""
    assert expected in fails(*export_arguments, "--out", tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_build_that_fails_after_the_export(exported: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    """The error says that the bundle itself is there, and how to go on."""
    bundle = Path(str(exported[-1]))
    graph, manifest = bundle / "unet/model.onnx", bundle / "bundle.json"
    known = sha256_file(graph)
    graph.write_bytes(graph.read_bytes().replace(b"\x04Conv", b"\x04Conx"))  # no parser takes it
    options = ["--compute-capability", "8.9", "12.0", "--optimization-level", "0"]
    damaged = [*exported, "--backend", "tensorrt-rtx", *options]
    assert "altered" in run(capsys, *damaged, code=2)[1], (
        "that is the bundle's fault, and no build is to be gone on with"
    )
    manifest.write_text(manifest.read_text().replace(known, sha256_file(graph)))
    out, err = run(capsys, *damaged, code=1)
    last = err.splitlines()[-1]
    assert last.startswith("hypersd: error: unet: ")
    assert f"{bundle} is complete without engines, and finished engines are kept; continue with: " in last
    words = shlex.split(last.partition("continue with: hypersd ")[2])
    assert words == ["build", str(bundle), "--backend", "tensorrt-rtx", *options]
    assert [line.split()[0] for line in out.splitlines()] == ["bundle"]


# info


def test_info_tells_of_targets(rtx_bundle: Path, capsys: pytest.CaptureFixture[str], without_gpu: None) -> None:
    """Name in full, backend and version, GPUs, images, sizes, seconds, and why it does not run here."""
    out, _ = run(capsys, "info", rtx_bundle, "--hashes")
    name = target_of(rtx_bundle)
    target = Bundle.load(rtx_bundle).manifest.engines[name]
    assert name in out.split()
    facts = dict(re.findall(r"^ +(\S.*?) {2,}(\S.*?) *$", out, re.MULTILINE))
    assert facts["built for"] == f"TensorRT-RTX {target.version}"
    assert facts["GPUs"] == "portable"
    assert facts["images"] == "1 of 64 x 64"
    assert facts["components"] == "4 of 4"
    plans = target.plans.values()
    assert facts["weights"] == f"{sum(plan.weights_memory or 0 for plan in plans) / 1e6:,.1f} MB"
    assert facts["activations"] == f"{max(plan.activation_memory or 0 for plan in plans) / 1e6:,.1f} MB"
    assert facts["built in"] == f"{sum(plan.seconds for plan in target.plans.values()):.1f} s"
    assert facts["runs here"] == "no"
    assert "does not run here: " in out
    assert f"ONNX Runtime, TensorRT-RTX {target.version}" in out
    assert "SHA-256 of all files match the manifest" in out


def test_info_of_a_bundle_without_engines(sd15_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says how to get some."""
    assert f"hypersd build {sd15_bundle}" in run(capsys, "info", sd15_bundle)[0]


def test_info_with_nothing_installed(
    rtx_bundle: Path, nothing_installed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The targets are told of all the same."""
    out, _ = run(capsys, "info", rtx_bundle)
    (line,) = [line for line in out.splitlines() if "does not run here: TensorRT-RTX is not installed" in line]
    assert "[tensorrt-rtx]" in line


def test_info_of_damaged_engines(
    rtx_bundle: Path, copy, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    """A shortened engine is told beside what else speaks against its target; --hashes finds an altered one."""
    bundle = copy(rtx_bundle)
    path = shorten(bundle, "unet")
    out, _ = run(capsys, "info", bundle)
    assert f"{path.relative_to(bundle)} is missing or shortened: build it again" in out
    assert "all files but 1 engine match the manifest" in out
    path.unlink()
    assert "is missing or shortened" in run(capsys, "info", bundle, "--hashes")[0]
    other = path.with_name("vae_decoder.engine")
    content = bytearray(other.read_bytes())
    content[1000] ^= 1
    other.write_bytes(content)
    assert "altered" in fails("info", bundle, "--hashes")


def test_info_of_an_unfinished_target(rtx_bundle: Path, copy, capsys: pytest.CaptureFixture[str]) -> None:
    """The remains of an interrupted build are counted; values that TensorRT did not report are unknown."""
    bundle = copy(rtx_bundle)
    name = target_of(bundle)
    change_manifest(bundle, lambda m: m["engines"][name]["plans"]["unet"].update(weights_memory=None))
    out, _ = run(capsys, "info", bundle)
    assert re.search(r"weights +unknown", out)
    assert re.search(r"activations +\d.* MB", out)
    change_manifest(bundle, lambda m: m["engines"][name]["plans"].pop("unet"))
    assert "3 of 4" in run(capsys, "info", bundle)[0]


def test_info_names_attentions_in_plain_kernels(rtx_bundle: Path, copy, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each network that has some, with the first names."""
    bundle = copy(rtx_bundle)

    def change(manifest: dict) -> None:
        plans = manifest["engines"][target_of(bundle)]["plans"]
        plans["text_encoder"]["decomposed_attention"] = [f"node_{i}" for i in range(8)]
        plans["unet"]["decomposed_attention"] = ["alone"]
        plans["vae_decoder"]["decomposed_attention"] = []

    change_manifest(bundle, change)
    lines = [line.strip() for line in run(capsys, "info", bundle)[0].splitlines() if "plain kernels" in line]
    lack = "in plain kernels, for which TensorRT-RTX has no fused one"
    assert sorted(lines) == [
        f"text_encoder: 8 attentions {lack}: node_0, node_1, node_2 and 5 more",
        f"unet: 1 attention {lack}: alone",
    ]


# generate


def test_generate_passes_over_engines_that_cannot_run(
    rtx_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_gpu: None
) -> None:
    """Another backend generates the image; one line gives the reason, another the backend, its precision and device."""
    out, err = run(capsys, "generate", rtx_bundle, "a cat", "-o", tmp_path / "cat.png", "--seed", "1")
    passed_over, loaded = err.splitlines()
    assert passed_over.startswith("TensorRT engines passed over: ")
    assert re.match(r"Hyper-SD15-1step-lora on cpu with (ONNX Runtime|OpenVINO \S+) in \w+, loaded in ", loaded)
    assert len(out.splitlines()) == 1


def test_generate_tells_each_reason_once(
    rtx_bundle: Path, copy, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_gpu: None
) -> None:
    """Of three targets: what holds for all of them, and what holds for one with its name, in one line."""
    bundle = copy(rtx_bundle)
    name = target_of(bundle)

    def add(manifest: dict) -> None:
        for other in ("second", "third"):
            shutil.copytree(bundle / "engines" / name, bundle / "engines" / other)
            target = json.loads(json.dumps(manifest["engines"][name]).replace(f"engines/{name}/", f"engines/{other}/"))
            manifest["engines"][other] = target
            for plan in target["plans"].values():
                manifest["files"][plan["file"]] = manifest["files"][plan["file"].replace(other, name)]

    change_manifest(bundle, add)
    (bundle / "engines/third/unet.engine").unlink()
    _, err = run(capsys, "generate", bundle, "a cat", "-o", tmp_path / "cat.png")
    (line,) = [line for line in err.splitlines() if "passed over" in line]
    of_all, *_, of_one = line.removeprefix("TensorRT engines passed over: ").split("; ")
    assert line.count(of_all) == 1
    assert name not in of_all
    assert of_one.startswith("third: engines/third/unet.engine is missing")


def test_generate_with_engines_that_cannot_run(
    rtx_bundle: Path, sd15_bundle: Path, fails: Callable[..., str], without_gpu: None
) -> None:
    """Asked for by name, they are an error."""
    name = target_of(rtx_bundle)
    assert "cannot run here" in fails("generate", rtx_bundle, "a cat", "--backend", "tensorrt-rtx")
    assert "cannot run here" in fails("generate", rtx_bundle, "a cat", "--target", name)
    assert "cannot run here" in fails("generate", rtx_bundle, "a cat", "--target", "portable")
    assert name in fails("generate", rtx_bundle, "a cat", "--target", "nonsense")
    assert "--device cpu" in fails("generate", rtx_bundle, "a cat", "--target", name, "--device", "cpu")
    assert "--backend onnxruntime" in fails("generate", rtx_bundle, "a", "--target", name, "--backend", "onnxruntime")
    assert f"hypersd build {sd15_bundle}" in fails("generate", sd15_bundle, "a cat", "--backend", "tensorrt-rtx")


@pytest.mark.gpu
def test_generate_on_a_gpu(rtx_bundle: Path, copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what runs where, and of a first load that the next one has its kernels."""
    from hypersd.engines.tensorrt.machine import this_machine, why_not_backend

    if reason := why_not_backend("tensorrt-rtx", this_machine()):
        pytest.skip(reason)
    words = ["generate", copy(rtx_bundle), "a cat", "--backend", "tensorrt-rtx", "-o", tmp_path / "cat.png"]
    (first,) = run(capsys, *words)[1].splitlines()
    assert first.startswith("Hyper-SD15-1step-lora on cuda:0 (")
    assert " with TensorRT-RTX " in first
    assert first.endswith("; kernels compiled for this GPU: the next load is quicker")
    (second,) = run(capsys, *words)[1].splitlines()
    assert "compiled" not in second


def test_help_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option of the issue is there."""
    shapes, engines = (
        ["--batch", "--size", "--dynamic"],
        [
            "--compute-capability",
            "--optimization-level",
            "--strip-weights",
            "--timing-cache",
        ],
    )
    for command, options in {
        "build": ["--backend", *shapes, *engines],
        "export": ["--backend", *engines],
        "generate": ["--backend", "--target", "tensorrt-rtx"],
    }.items():
        out, _ = run(capsys, command, "--help")
        assert [option for option in options if option not in out] == []
