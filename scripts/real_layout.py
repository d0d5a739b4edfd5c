"""Parts that small repositories share with the published ones of SD1.5 and SDXL, whatever the networks' size."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffusers import DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler
from transformers import CLIPTextConfig, CLIPTokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def text_config(tokenizer: CLIPTokenizer, **sizes: object) -> CLIPTextConfig:
    # eos_token_id=2 is in the published files; it makes CLIP pool at the largest id, which is the end token's.
    return CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=77, bos_token_id=0, eos_token_id=2, pad_token_id=1, **sizes
    )


def scheduler(family: str) -> PNDMScheduler | EulerDiscreteScheduler:
    """The scheduler of the published base; a sampler takes its betas and offsets."""
    if family == "sd15":
        made = PNDMScheduler(**BETAS, set_alpha_to_one=False, skip_prk_steps=True)
        made.register_to_config(clip_sample=False)  # stands in the real file, and matters to DDIM
    else:
        made = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
        made.register_to_config(clip_sample=False, set_alpha_to_one=False)
    return made


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline, its tokenizers in the files that they were loaded from: the real ones have no tokenizer.json."""
    tokenizers = {name: Path(part.name_or_path) for name, part in pipe.components.items() if "tokenizer" in name}
    kept = {name: {file.name: file.read_bytes() for file in path.iterdir()} for name, path in tokenizers.items()}
    pipe.save_pretrained(folder)
    for name, files in kept.items():
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
        for filename, content in files.items():
            (folder / name / filename).write_bytes(content)
