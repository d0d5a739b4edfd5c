"""Tokenizers and text encoders, and their training on what the captions say before any image is seen."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from hypersd.export.tokenizer import write_byte_tokenizer

from . import networks
from .data import SCENES, load_captions, scene_of
from .loop import Plan, device, fill, half, keep, train
from .scenes import COLOURS, PATTERNS, PLACES, RADII, SHAPES, TINTS, Scene, words

LENGTH = 77
BATCH = 64
PAD_TOKENS = {"sd15": ("<|endoftext|>",), "sdxl": ("<|endoftext|>", "!")}
PLANS = {
    "sd15": Plan(name="text15", steps=1000, learning_rate=2e-3, seed=3),
    "sdxl": Plan(name="textxl", steps=1000, learning_rate=2e-3, seed=4),
}
QUESTIONS = tuple(map(tuple, (SHAPES, COLOURS, RADII, PLACES)))  # asked of each of two things


def tokenizers(family: str, work: Path) -> list[CLIPTokenizer]:
    """The family's one or two tokenizers, written into the work folder the first time."""
    found = []
    for number, pad_token in enumerate(PAD_TOKENS[family]):
        folder = work / f"{family}-tokenizer-{number}"
        if not folder.exists():
            shutil.rmtree(partial := folder.with_suffix(".partial"), ignore_errors=True)
            write_byte_tokenizer(partial, words(), pad_token)
            partial.rename(folder)
        found.append(CLIPTokenizer.from_pretrained(folder))
    return found


def tokenize(some: list[CLIPTokenizer], captions: list[str]) -> Tensor:
    """One row of tokens a caption and tokenizer: int64 [N, tokenizers, 77]."""
    rows = [
        t(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
        for t in some
    ]
    return torch.stack(rows, 1)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A UNet's conditioning for prompts: ``hidden`` [N, 77, C], and for SDXL ``pooled`` [N, P]."""

    hidden: Tensor
    pooled: Tensor | None = None

    def __getitem__(self, which: Tensor | slice) -> Encoded:
        return Encoded(self.hidden[which], None if self.pooled is None else self.pooled[which])

    def to(self, dtype: torch.dtype) -> Encoded:
        return Encoded(self.hidden.to(dtype), None if self.pooled is None else self.pooled.to(dtype))

    def __len__(self) -> int:
        return len(self.hidden)

    def dropped(self, where: Tensor, empty: Encoded) -> Encoded:
        """With ``empty`` [1, ...] in the place of some prompts: ``where`` is bool [N]."""
        hidden = torch.where(where[:, None, None], empty.hidden, self.hidden)
        pooled = None if self.pooled is None else torch.where(where[:, None], empty.pooled, self.pooled)
        return Encoded(hidden, pooled)


def encode(encoders: nn.ModuleList, ids: Tensor) -> Encoded:
    """Tokens int64 [N, encoders, 77] to what the UNet reads, as diffusers' two pipelines take it."""
    if len(encoders) == 1:
        return Encoded(encoders[0](ids[:, 0]).last_hidden_state)
    made = [encoder(ids[:, i], output_hidden_states=True) for i, encoder in enumerate(encoders)]
    return Encoded(torch.cat([m.hidden_states[-2] for m in made], -1), made[1].text_embeds)


@torch.no_grad()
def empty_prompt(encoders: nn.ModuleList, ids_of_empty: Tensor) -> Encoded:
    """The conditioning for no prompt: SD1.5 encodes "", SDXL takes zeros (``force_zeros_for_empty_prompt``)."""
    encoded = encode(encoders, ids_of_empty)
    if len(encoders) == 1:
        return encoded
    return Encoded(torch.zeros_like(encoded.hidden), torch.zeros_like(encoded.pooled))


@torch.no_grad()
def encode_all(encoders: nn.ModuleList, ids: Tensor) -> Encoded:
    """The conditioning of many prompts, in bfloat16: the text encoders are not trained any more."""
    encoders.to(device()).eval()
    with half():
        parts = [encode(encoders, batch.to(device())).to(torch.bfloat16) for batch in ids.split(256)]
    pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
    return Encoded(torch.cat([part.hidden for part in parts]), pooled)


# Before any image: can what the UNet reads at the end token tell the whole scene?


def answers(scene: Scene) -> list[int]:
    """The scene as numbers: shape, colour, size and place of each of two things (0 for no thing), the background."""
    numbers = []
    for index in range(2):
        thing = scene.things[index] if index < len(scene.things) else None
        told = dataclasses.astuple(thing) if thing else (None,) * 4
        numbers += [options.index(value) + 1 if value else 0 for options, value in zip(QUESTIONS, told, strict=True)]
    return [*numbers, PATTERNS.index(scene.background.pattern), list(TINTS).index(scene.background.tint)]


class Reader(nn.Module):
    """Text encoders, and a linear layer on the end token that answers what the scene is."""

    def __init__(self, encoders: list[nn.Module], width: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.sizes = [len(options) + 1 for options in QUESTIONS] * 2 + [len(PATTERNS), len(TINTS)]
        self.answer = nn.Linear(width, sum(self.sizes))

    def forward(self, ids: Tensor) -> list[Tensor]:
        encoded = encode(self.encoders, ids)
        end = ids[:, 0].argmax(-1)
        read = encoded.hidden[torch.arange(len(ids)), end]
        if encoded.pooled is not None:
            read = torch.cat([read, encoded.pooled], -1)
        return list(self.answer(read).split(self.sizes, -1))


def train_text(family: str, work: Path) -> None:
    """Train the family's text encoders to know the scene: ``NAME.pt``."""
    plan = PLANS[family]
    torch.manual_seed(plan.seed)
    some = tokenizers(family, work)
    widths = networks.TEXT_WIDTHS[family]
    reader = Reader(networks.text_encoders(family, some), sum(widths) + (widths[1] if len(widths) > 1 else 0))
    ids = tokenize(some, load_captions(work))
    wanted = torch.tensor([answers(scene_of(i)) for i in range(SCENES)])

    def loss(generator: torch.Generator) -> Tensor:
        batch = torch.randint(SCENES, (BATCH,), generator=generator)
        with half():
            read = reader(ids[batch].to(device()))
        target = wanted[batch].to(device())
        return sum(nn.functional.cross_entropy(logits.float(), target[:, i]) for i, logits in enumerate(read))

    trained = train(plan, reader, loss, work)
    keep(trained.encoders, work / f"{plan.name}.pt")


def load_encoders(family: str, work: Path) -> nn.ModuleList:
    encoders = nn.ModuleList(networks.text_encoders(family, tokenizers(family, work)))
    fill(encoders, work / f"{PLANS[family].name}.pt")
    return encoders
