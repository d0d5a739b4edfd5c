"""``hypersd export`` and what follows as a person runs it: processes, a Hub on loopback, signals, a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import preloaded
import pytest
from loopback_hub import LoopbackHub
from PIL import Image

from hypersd.engines import Bundle
from hypersd.engines.manifest import ControlNetOrigin, ControlNetSettings

NAME = "Hyper-SDXL-1step-lora"
CANNY = "diffusers/controlnet-canny-sdxl-1.0"


@pytest.fixture
def hub(tiny_repos: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tiny_repos) as server:
        yield server


def fresh(*words: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh process, its output in pipes."""
    command = [sys.executable, "-m", "hypersd.cli", *map(str, words)]
    merged = {**os.environ, "HF_HUB_OFFLINE": "0", **env}
    return subprocess.run(command, cwd=cwd, env=merged, capture_output=True, text=True, timeout=300)


def hypersd(*words: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The same in a process that need not import torch."""
    merged = {**os.environ, "HF_HUB_OFFLINE": "0", **env}
    return preloaded.run("-m", "hypersd.cli", *words, cwd=cwd, env=merged, timeout=300)


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The single line that a failed command ended with."""
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.stderr.splitlines()[-1] == line
    assert "Traceback" not in done.stderr
    return line


def test_export_from_the_hub_and_generate_offline(hub: LoopbackHub, tmp_path: Path) -> None:
    """The real command, nothing changed but HF_ENDPOINT: download, resume, fuse, trace, bundle, image."""
    env = hub.environment(tmp_path / "cache")
    hub.cut_after("unet/diffusion_pytorch_model.safetensors", 100_000)
    words = ["--backend", "none", "--controlnet", f"canny={CANNY}"]
    done = fresh("export", "--ckpt", NAME, *words, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr + done.stdout, "no bar and no colour in a pipe"
    unet = "stable-diffusion-xl-base-1.0/unet/diffusion_pytorch_model.safetensors"
    downloads = [r for r in hub.requests if r.cdn and r.method == "GET" and r.path.endswith(unet)]
    assert len(downloads) == 2, "the download that was cut was taken up again (byte ranges: tests/export/test_hub.py)"

    bundle = Bundle.load(tmp_path / "bundles" / NAME, hashes=True)
    assert bundle.manifest.precision == "fp16"
    origin = bundle.manifest.origin
    assert origin.base == "stabilityai/stable-diffusion-xl-base-1.0"
    assert origin.revision == hub.commit("stabilityai/stable-diffusion-xl-base-1.0")
    assert origin.vae == "madebyollin/sdxl-vae-fp16-fix", "SDXL's own VAE overflows in fp16"
    assert origin.weights["lora"][0].repo == "ByteDance/Hyper-SD"
    assert origin.controlnets == {"canny": ControlNetOrigin(location=CANNY, revision=hub.commit(CANNY))}
    recommended = ControlNetSettings(conditioning_scale=0.5, preprocess="canny")
    assert bundle.manifest.controlnets == {"canny": recommended}, "what is known of it by its name"

    offline = {**env, "HF_HUB_OFFLINE": "1"}
    hub.forget_requests()
    again = hypersd("export", "--ckpt", f"{NAME}.safetensors", *words, cwd=tmp_path, env=offline)
    assert again.returncode == 0, again.stderr
    assert "done already" in again.stderr
    Image.effect_noise((80, 60), 90).save(tmp_path / "photo.jpg")
    words = ["--seed", 0, "-o", "cat.png", "--control-image", "photo.jpg"]
    generated = hypersd("generate", f"bundles/{NAME}", "a photo of a cat", *words, cwd=tmp_path, env=offline)
    assert generated.returncode == 0, generated.stderr
    settings = json.loads(Image.open(tmp_path / "cat.png").info["hypersd"])
    assert settings["controlnet_conditioning_scale"] == {"canny": 0.5}
    assert settings["preprocess"] == {"canny": "canny 100 200"}
    assert (tmp_path / "cat.png").read_bytes().startswith(b"\x89PNG")
    verified = fresh("verify", f"bundles/{NAME}", "--prompt", "a cat", cwd=tmp_path, env=offline)
    assert verified.returncode == 0, verified.stderr
    assert not hub.requests, "offline means offline"


def export_errors(*exports: list[str], cwd: Path, env: dict[str, str]) -> list[str]:
    """The lines with which these exports of NAME end, one after another in one process."""
    program = """if True:
        import json, sys
        from hypersd.cli import main
        for words in json.loads(sys.argv[1]):
            print(main(words))
    """
    commands = json.dumps([["export", "--ckpt", NAME, *words] for words in exports])
    merged = {**os.environ, "HF_HUB_OFFLINE": "0", **env}
    done = preloaded.run("-c", program, commands, cwd=cwd, env=merged, timeout=300)
    assert done.stdout.split() == ["2"] * len(exports), done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == len(exports), done.stderr
    return lines


def test_the_hub_says_no(hub: LoopbackHub, tiny_repos: Path, tmp_path: Path) -> None:
    """401, 404 of a repository and of a file, no network: each is one clear line."""
    env = hub.environment(tmp_path / "cache")
    hub.gated.add("stabilityai/stable-diffusion-xl-base-1.0")
    gated, unknown, incomplete = export_errors(
        [], ["--base", "nobody/nothing"], ["--base", "madebyollin/taesd"], cwd=tmp_path, env=env
    )
    assert "401" in gated
    assert "HF_TOKEN" in gated
    assert "nobody/nothing" in unknown
    assert "model_index.json" in incomplete
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = {**env, "HF_ENDPOINT": f"http://127.0.0.1:{unused.getsockname()[1]}"}
        line = one_line(hypersd("export", "--ckpt", NAME, cwd=tmp_path, env=closed), 1)
    assert "HF_ENDPOINT" in line
    assert not list(tmp_path.rglob("bundle.json"))


def local_export(tiny_repos: Path) -> list[str]:
    base = tiny_repos / "stable-diffusion-v1-5/stable-diffusion-v1-5"
    lora = tiny_repos / "ByteDance/Hyper-SD/Hyper-SD15-2steps-lora.safetensors"
    words = ["--ckpt", "Hyper-SD15-2steps-lora", "--base", str(base), "--lora", str(lora), "--out", "bundle"]
    return ["export", "--backend", "none", *words]


def test_ctrl_c_and_again(tiny_repos: Path, tmp_path: Path) -> None:
    """Ctrl-C ends with 130 and one line, leaves no bundle and no half component; the next run continues from there."""
    command = ["-m", "hypersd.cli", *local_export(tiny_repos)]
    process = preloaded.start(*command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("vae_encoder: load"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert rest.splitlines()[-1].startswith("hypersd: interrupted")
    assert "Traceback" not in rest
    assert not (tmp_path / "bundle").exists()
    unfinished = {path.parent.name for path in tmp_path.rglob("model.onnx")}
    assert unfinished == {"text_encoder"}, "only what is whole stays"

    done = hypersd(*local_export(tiny_repos), cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "text_encoder: trace" not in done.stderr
    assert "unet: trace" in done.stderr
    Bundle.load(tmp_path / "bundle", hashes=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    for _ in range(20):
        if subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0:
            break
        time.sleep(0.2)


def test_full_disk(tiny_repos: Path, tmp_path: Path, small_disk: Path) -> None:
    """A disk that is too small is said in one line, and nothing is left on it but an empty lock."""
    words = [*local_export(tiny_repos)[:-1], str(small_disk / "bundle")]
    line = one_line(hypersd(*words, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"}), 2)
    assert "free" in line
    assert not [path for path in small_disk.rglob("*") if path.is_file() and path.stat().st_size]
