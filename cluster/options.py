"""Arguments of ``serve run hypersd.cluster.application:app NAME=VALUE ...``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..engines import Bundle
from ..engines.vocabulary import Backend
from ..errors import RequestError, validation_in_words
from ..serve.lora_folder import LoraFolder
from ..serve.settings import ServeSettings, read_token

MEGABYTE = 1 << 20


class ClusterOptions(BaseModel):
    """Arguments of the application; shared ones have the names and defaults of ``hypersd serve``.

    Attributes:
        bundles: folders on the head node, separated by commas.
        num_gpus: GPUs of a replica; a fraction puts several on one GPU, 0 generates on the CPU.
        num_cpus: cores that Ray reserves for a replica.
        min_replicas: replicas that always run.
        max_replicas: the most replicas that a queue can start.
        target_ongoing_requests: requests per replica, running or waiting, above which Ray adds replicas.
        queue: requests that may wait for a replica; further ones are rejected.
        max_batch: images generated at once; a replica takes twice as many requests, so that the next ones wait there.
        lora_folder: the folder of LoRAs that requests may use, at this path on every machine.
        ingresses: processes that speak HTTP, read requests and encode images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    bundles: tuple[Path, ...] = Field(min_length=1)
    num_gpus: float = Field(1.0, ge=0, le=1)
    num_cpus: float = Field(1.0, gt=0, le=1024)
    min_replicas: int = Field(1, ge=1, le=10_000)
    max_replicas: int = Field(8, ge=1, le=10_000)
    target_ongoing_requests: float = Field(2.0, gt=0, le=2048)
    ingresses: int = Field(1, ge=1, le=1000)
    backend: Literal["auto", Backend] = "auto"
    precision: Literal["fp32", "bf16"] | None = None
    low_memory: bool = False
    queue: int = Field(64, ge=1, le=1_000_000)
    max_batch: int = Field(8, ge=1, le=1024)
    max_count: int = Field(8, ge=1, le=1024)
    max_prompt: int = Field(2000, ge=1, le=10**9)
    max_body_mb: float = Field(24.0, gt=0, le=1024)
    timeout: float = Field(60.0, gt=0, le=86_400)
    token_file: Path | None = None
    lora_folder: Path | None = None
    strict_loras: bool = False
    allow_random_weights: bool = False

    @field_validator("bundles", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part for part in str(value).split(",") if part] if isinstance(value, (str, Path)) else value

    @property
    def device(self) -> str:
        """A replica sees only the GPU that Ray gave it."""
        return "cuda" if self.num_gpus else "cpu"

    @property
    def max_ongoing_requests(self) -> int:
        return 2 * self.max_batch

    def loras(self) -> LoraFolder | None:
        """The folder of LoRAs.

        Raises:
            RequestError: there is no such folder.
        """
        return None if self.lora_folder is None else LoraFolder(self.lora_folder.absolute(), self.strict_loras)

    def settings(self) -> ServeSettings:
        """The limits of the HTTP side.

        Raises:
            RequestError: the token file cannot be read or is empty.
        """
        return ServeSettings(
            timeout=self.timeout,
            max_count=self.max_count,
            max_body=int(self.max_body_mb * MEGABYTE),
            max_prompt=self.max_prompt,
            token=None if self.token_file is None else read_token(self.token_file),
        )


def read_options(arguments: Mapping[str, Any]) -> ClusterOptions:
    """Check the arguments.

    Raises:
        RequestError: an argument is missing, not known or out of range; or two contradict each other.
        BundleError: a folder is not a bundle.
    """
    try:
        options = ClusterOptions.model_validate(dict(arguments))
    except ValidationError as error:
        raise RequestError(validation_in_words(error)[0]) from None
    if options.max_replicas < options.min_replicas:
        raise RequestError(
            f"max_replicas={options.max_replicas} is below min_replicas={options.min_replicas}: expected at least that"
        )
    if options.strict_loras and options.lora_folder is None:
        raise RequestError("strict_loras is about LoRAs: give lora_folder=FOLDER with it")
    for folder in options.bundles:
        Bundle.load(folder).check_weights(options.allow_random_weights, "allow_random_weights=true")
    return options
