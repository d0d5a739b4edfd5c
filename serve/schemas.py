"""Bodies of requests and answers: the OpenAI images API's fields, and ours beside them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..runtime.params import LARGEST_GUIDANCE, LARGEST_SEED

OutputFormat = Literal["png", "jpeg", "webp"]
ProblemType = Literal["invalid_request_error", "authentication_error", "server_error"]


class GenerationRequest(BaseModel):
    """What to draw. What is left out is the bundle's own setting."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(description="what to draw")
    model: str | None = Field(None, description="one of GET /v1/models; the first of them if left out")
    n: int = Field(1, ge=1, le=1024, description="number of images; image i has seed + i")
    size: str | None = Field(None, pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="WIDTHxHEIGHT in pixels")
    response_format: Literal["b64_json"] | None = Field(None, description="images are kept nowhere: there is no url")
    output_format: OutputFormat = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of JPEG and WebP (default: 90)")

    steps: int | None = Field(None, ge=1, le=1000, description="one of those that the checkpoint was distilled for")
    eta: float | None = Field(None, ge=0, le=1, description="stochasticity")
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="of the first image; a random one if left out")
    guidance_scale: float | None = Field(None, ge=0, le=LARGEST_GUIDANCE, description="1 or less for none")
    negative_prompt: str | None = Field(None, description="what to keep away from, with guidance")
    control_image: str | dict[str, str] | None = Field(
        None, description="PNG, JPEG or WebP in base64, or as a data: URL; of several ControlNets some by name"
    )
    control_scale: float | None = Field(None, ge=0, le=10, description="strength of the ControlNets")
    control_start: float | None = Field(None, ge=0, le=1, description="the part of the steps before which they rest")
    control_end: float | None = Field(None, ge=0, le=1, description="the part after which they rest")
    preprocess: Literal["canny", "scribble", "none"] | None = Field(
        None, description="what is made of control images; the ControlNet's own if left out"
    )
    resize_mode: Literal["crop", "stretch"] | None = Field(None, description="how they are fitted (default: crop)")

    # What OpenAI's clients may send and what has no meaning here.
    user: str | None = None
    quality: str | None = None
    style: str | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: str | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None


class LiveInput(GenerationRequest):
    """An input of the live page: the newest wins."""

    id: int = Field(ge=0, le=2**53 - 1)


class Image(BaseModel):
    """A finished image."""

    b64_json: str
    seed: int
    revised_prompt: None = None


class Generation(BaseModel):
    """The answer to a request for images."""

    created: int
    data: list[Image]
    model: str
    output_format: OutputFormat
    size: str
    background: Literal["opaque"] = "opaque"
    steps: int
    eta: float
    waited: float = Field(description="seconds in the queue, the longest of the images'")
    timings: dict[str, float] = Field(description="seconds by stage, of the call that drew the last image")


class Problem(BaseModel):
    """What was wrong, what was expected, what to do."""

    message: str
    type: ProblemType
    param: str | None
    code: str


class Failure(BaseModel):
    """Every answer that is not a success."""

    error: Problem


class Steps(BaseModel):
    default: int
    allowed: list[int]


class Default(BaseModel):
    default: float


class Side(BaseModel):
    min: int
    default: int
    max: int
    multiple: int


class ControlNet(BaseModel):
    name: str
    preprocess: str
    control_scale: float


class Model(BaseModel):
    """A bundle that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hypersd"
    checkpoint: str
    family: str
    device: str
    backend: str
    steps: Steps
    eta: Default
    guidance_scale: Default
    width: Side
    height: Side
    controlnets: list[ControlNet]
    max_count: int
    changed_on_disk: bool


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "ready"]


def json_of(model: BaseModel) -> Any:
    """For an answer that FastAPI does not make."""
    return model.model_dump(mode="json")
