#!/usr/bin/env python
"""Measure an export at full size: seconds and peak memory, with random weights in the real architecture.

    python scripts/measure_export.py --family sdxl --precision fp16 --folder /tmp/full
    python scripts/measure_export.py --family sd15 --controlnet --folder /tmp/full

The base (SDXL: 14 GB in float32) and the LoRA are written to the folder first, unless they are there, with the tiny
tokenizer of scripts/make_tiny_repos.py. Peak memory is the largest sum over the export's process of anonymous memory
(what it allocated) and of resident file pages (what it mapped, which the system may drop at any time), sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

from make_tiny_repos import kohya_lora, load_tokenizer

CHECKPOINTS = {"sd15": "Hyper-SD15-1step-lora", "sdxl": "Hyper-SDXL-1step-lora"}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def write_base(folder: Path, family: str) -> None:
    """A base of the real architecture in diffusers layout, float32, random weights."""
    import torch
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from real_layout import save_pipeline, scheduler
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    is_sdxl = family == "sdxl"
    parts = {
        "tokenizer": load_tokenizer(folder / "base/tokenizer"),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP, **CLIP_L, projection_dim=768)),
        "unet": UNet2DConditionModel(**(SDXL_UNET if is_sdxl else SD15_UNET)),
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=1024 if is_sdxl else 512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            force_upcast=False,  # as the fp16-fix VAE has it
        ),
        "scheduler": scheduler(family),
    }
    if is_sdxl:
        parts["tokenizer_2"] = load_tokenizer(folder / "base/tokenizer_2", pad_token="!")
        config = CLIPTextConfig(**CLIP, **CLIP_G, projection_dim=1280, hidden_act="gelu")
        parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **nothing)
    save_file(kohya_lora(pipe.unet, rank=64), folder / "lora.safetensors")
    save_pipeline(pipe, folder / "base")


def write_controlnet(folder: Path, family: str) -> None:
    """A ControlNet of the real architecture, float32, random weights."""
    import torch
    from diffusers import UNet2DConditionModel
    from make_tiny_repos import controlnet

    from hypersd.export.controlnets import EMBEDDING_CHANNELS

    torch.manual_seed(1)
    made = controlnet(UNet2DConditionModel(**(SDXL_UNET if family == "sdxl" else SD15_UNET)), EMBEDDING_CHANNELS)
    made.save_pretrained(folder / "controlnet")


def memory(pid: int) -> tuple[int, int]:
    """Bytes of anonymous memory and of resident file pages of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def run_measured(command: list[str]) -> dict[str, float]:
    """Run a command; its seconds and its peaks in gigabytes."""
    began = time.perf_counter()
    process = subprocess.Popen(command)
    peaks = {"anonymous": 0, "file pages": 0, "sum": 0}

    def watch() -> None:
        while process.poll() is None:
            try:
                anonymous, pages = memory(process.pid)
            except (OSError, KeyError):
                break
            peaks["anonymous"] = max(peaks["anonymous"], anonymous)
            peaks["file pages"] = max(peaks["file pages"], pages)
            peaks["sum"] = max(peaks["sum"], anonymous + pages)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        sys.exit(f"{command} ended with {code}")
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 1), **{f"peak {k} GB": round(v / 1e9, 2) for k, v in peaks.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=sorted(CHECKPOINTS), required=True)
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument("--folder", type=Path, required=True, help="for the base, the LoRA and the bundle")
    parser.add_argument("--controlnet", action="store_true", help="export a ControlNet, too")
    args = parser.parse_args()
    folder = args.folder / args.family
    if not (folder / "base/model_index.json").exists():
        _write("write_base", folder, args.family)
    if args.controlnet and not (folder / "controlnet/config.json").exists():
        _write("write_controlnet", folder, args.family)
    command = [sys.executable, "-m", "hypersd.cli", "export", "--ckpt", CHECKPOINTS[args.family], "--replace"]
    command += ["--engine", "none"]
    command += ["--base", str(folder / "base"), "--lora", str(folder / "lora.safetensors")]
    command += ["--vae", str(folder / "base"), "--precision", args.precision]
    command += ["--out", str(folder / (f"{args.precision}-controlnet" if args.controlnet else args.precision))]
    command += ["--controlnet", str(folder / "controlnet")] if args.controlnet else []
    result = run_measured(command)
    machine = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    print(json.dumps({"family": args.family, "precision": args.precision, **result, **machine}, indent=2))


def _write(what: str, folder: Path, family: str) -> None:
    """In a process of its own, whose memory is gone before the measured one starts."""
    command = f"from pathlib import Path; import measure_export as m; m.{what}(Path({str(folder)!r}), {family!r})"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(__file__).parent)


if __name__ == "__main__":
    main()
