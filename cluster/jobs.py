"""A file of prompts: its images, their names, and which of them exist already."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image
from pydantic import ValidationError

from ..engines import Manifest
from ..engines.files import sha256_file
from ..engines.manifest import encode
from ..errors import RequestError, validation_in_words
from ..runtime.metadata import METADATA_KEY
from ..runtime.params import LARGEST_SEED
from ..serve.lora_folder import ENDING
from ..serve.schemas import GenerationRequest
from .job_images import FIELDS, with_digests, with_paths

JSON_LINES = (".jsonl", ".ndjson")
KEY_NAME = "batch_key"  # in an image's metadata
#: fields of a request that change no image
WITHOUT_EFFECT = {"model", "user", "quality", "style", "background", "moderation", "stream", "partial_images", "n"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptJob:
    """One image of a line.

    Attributes:
        line: from 1, as editors count.
        body: the request for this image alone, with its seed.
        key: changes with everything that changes the image, the bundle included; not with TensorRT engines.
    """

    line: int
    body: GenerationRequest
    key: str

    @property
    def seed(self) -> int:
        return self.body.seed or 0

    @property
    def file(self) -> str:
        """The name of the image file."""
        return f"{self.line:06d}-{self.seed}.png"

    @property
    def settings(self) -> str:
        """Equal for images that one call may generate."""
        return self.body.model_dump_json(exclude={"prompt", "negative_prompt", "seed", *FIELDS})

    def is_generated(self, folder: Path) -> bool:
        """Whether a folder has the image with the present settings."""
        return image_key(folder / self.file) == self.key


def read_jobs(
    path: Path, manifest: Manifest, first_seed: int, defaults: Mapping[str, Any], lora_folder: Path | None = None
) -> list[PromptJob]:
    """Read the images of a file of prompts.

    Args:
        path: one prompt per line; or, if its name ends in .jsonl, one object per line with the fields of a request of
            the HTTP service, in which an image may be the path of a file relative to this one. Empty lines are counted
            and skipped.
        manifest: the bundle's.
        first_seed: the seed of line 1; each following line adds 1, unless it names its own.
        defaults: fields of requests, for lines without them.
        lora_folder: of the LoRAs that lines may use.

    Raises:
        RequestError: the file cannot be read or is empty; or a line or ``defaults`` is not a valid request.
    """
    _checked("the options", {"prompt": "", **defaults})  # once, not as an error of the first line
    bundle, loras = _bundle_key(manifest), _Loras(lora_folder)
    jobs = []
    for line, text in _lines(path):
        body = _read_body(path, line, text, {"seed": first_seed + line - 1, **defaults})
        used = loras.digests(f"{path} line {line}", body.adapters or {})
        jobs.extend(PromptJob(line=line, body=one, key=_key(bundle, one, used)) for one in _singles(path, line, body))
    if not jobs:
        raise RequestError(f"{path} has no prompts in it: expected one per line")
    return jobs


def image_key(path: Path) -> str | None:
    """The key in an image's metadata; None without image or key."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return json.loads(image.info.get(METADATA_KEY, "{}")).get(KEY_NAME)
    except (OSError, ValueError, AttributeError):
        return None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read ({error}): expected a text file in UTF-8") from error
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            yield line, content.strip()


def _read_body(path: Path, line: int, text: str, defaults: Mapping[str, Any]) -> GenerationRequest:
    fields: Any = {"prompt": text}
    if path.suffix.lower() in JSON_LINES:
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            example = '{"prompt": "a cat", "seed": 7}'
            raise RequestError(f"{path} line {line} is not a request: expected an object such as {example}")
    body = _checked(f"{path} line {line}", {**defaults, **fields})
    if body.output_format != "png":
        raise RequestError(f"{path} line {line}: output_format {body.output_format}: expected png, or none")
    try:
        return with_paths(body, path.parent)
    except RequestError as error:
        raise RequestError(f"{path} line {line}: {error}") from error


def _checked(where: str, fields: Mapping[str, Any]) -> GenerationRequest:
    """Validate the fields of a request; ``where`` names their place in the error."""
    try:
        return GenerationRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestError(f"{where}: {validation_in_words(error)[0]}") from None


def _singles(path: Path, line: int, body: GenerationRequest) -> Iterator[GenerationRequest]:
    """A request for n images as n requests."""
    seed = body.seed or 0
    if seed + body.n - 1 > LARGEST_SEED:
        raise RequestError(f"{path} line {line}: seed {seed} with n {body.n}: the last seed is above {LARGEST_SEED}")
    for i in range(body.n):
        yield body.model_copy(update={"n": 1, "seed": seed + i})


class _Loras:
    """The LoRA files that lines may use."""

    def __init__(self, folder: Path | None) -> None:
        self._files = {file.stem: file for file in sorted(folder.glob(f"*{ENDING}"))} if folder else {}
        self._hash = functools.cache(sha256_file)

    def digests(self, where: str, adapters: Mapping[str, float]) -> dict[str, str]:
        """The hashes of the files that a line names.

        Raises:
            RequestError: there is none of that name.
        """
        if unknown := sorted(adapters.keys() - self._files.keys()):
            has = ", ".join(self._files) or "none"
            raise RequestError(f"{where}: adapter {unknown[0]!r} is not in --lora-folder: expected some of: {has}")
        return {name: self._hash(self._files[name]) for name in adapters}


def _bundle_key(manifest: Manifest) -> str:
    return hashlib.sha256(encode(msgspec.structs.replace(manifest, engines={}))).hexdigest()


def _key(bundle: str, body: GenerationRequest, loras: Mapping[str, str]) -> str:
    fields = with_digests(body).model_dump(exclude_none=True, exclude=WITHOUT_EFFECT)
    if loras:
        fields["loras"] = loras
    return hashlib.sha256(json.dumps([bundle, fields], sort_keys=True).encode()).hexdigest()[:32]
