"""What our own small repositories share with the real ones of SD1.5 and SDXL, whatever the size of the networks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from diffusers import DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler
from transformers import CLIPTextConfig, CLIPTokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's byte-level BPE, in CLIP's vocabulary order ("!" is 0)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [256 + i for i in range(256 - len(printable))]
    return [chr(c) for c in printable + others]


def write_tokenizer(folder: Path, words: Iterable[str], pad_token: str = "<|endoftext|>") -> None:
    """A CLIP tokenizer with a small vocabulary: every byte, these whole words, the two special tokens."""
    alphabet = byte_alphabet()
    vocab = alphabet + [c + "</w>" for c in alphabet]
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (merge := f"{pieces[0]} {pieces[1]}") not in merges:
                merges.append(merge)
                vocab.append(pieces[0] + pieces[1])
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad_token
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "add_prefix_space": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def text_config(tokenizer: CLIPTokenizer, **sizes: object) -> CLIPTextConfig:
    # eos_token_id=2 is what the real files say; it makes CLIP pool at the largest id, which is the end token's.
    return CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=77, bos_token_id=0, eos_token_id=2, pad_token_id=1, **sizes
    )


def scheduler(family: str) -> PNDMScheduler | EulerDiscreteScheduler:
    """The scheduler of the real base's repository; what a sampler takes from it are the betas and the offsets."""
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
