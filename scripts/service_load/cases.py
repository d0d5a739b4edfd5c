"""The requests: a fixed set of images, each of which must look the same whenever it is generated."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("star", "ring", "square", "circle", "triangle")


@dataclasses.dataclass(frozen=True)
class Case:
    """A request."""

    prompt: str
    seed: int

    def body(self, model: str | None) -> dict[str, Any]:
        """As JSON."""
        return {"prompt": self.prompt, "seed": self.seed, **({"model": model} if model else {})}


def make_cases(count: int, first_seed: int = 1000) -> list[Case]:
    """Requests with a seed of their own each; prompts repeat after 30."""
    return [
        Case(f"a {COLOURS[i % len(COLOURS)]} {SHAPES[i % len(SHAPES)]}", first_seed + i)  # 6 and 5 share no factor
        for i in range(count)
    ]


class Images:
    """The expected images, learnt from the first answer to each case: later answers are compared with it."""

    def __init__(self) -> None:
        self._digests: dict[Case, str] = {}
        self._cases: dict[str, Case] = {}

    def fault(self, case: Case, answer: Mapping[str, Any]) -> str | None:
        """Why an answer is not the one to its case; None if it is."""
        try:
            (image,) = answer["data"]
            file = base64.b64decode(image["b64_json"], validate=True)
            size = f"{'x'.join(map(str, _size(file)))}"
        except Exception as error:  # a broken answer may fail anywhere
            return f"the answer holds no image ({type(error).__name__}: {error})"
        if image["seed"] != case.seed:
            return f"seed {image['seed']} instead of {case.seed}"
        if size != answer["size"]:
            return f"an image of {size} instead of {answer['size']}"
        return self._fault_of_bytes(case, hashlib.sha256(file).hexdigest())

    def _fault_of_bytes(self, case: Case, digest: str) -> str | None:
        if self._digests.setdefault(case, digest) != digest:
            return f"another image for seed {case.seed} than before"
        if self._cases.setdefault(digest, case) != case:
            return f"the image of seed {self._cases[digest].seed} for seed {case.seed}"
        return None


def _size(file: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(file)) as image:
        image.load()
        return image.size
