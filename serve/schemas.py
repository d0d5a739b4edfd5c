"""Bodies of requests and answers: the OpenAI images API's fields, and fields of this service's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from ..engines.manifest import LARGEST_GUIDANCE
from ..engines.specs import LARGEST_SIDE
from ..engines.vocabulary import Preprocess
from ..runtime.adapter import LARGEST_STRENGTH, LONGEST_NAME
from ..runtime.init_images import LARGEST_BLUR
from ..runtime.params import LARGEST_SEED

OutputFormat = Literal["png", "jpeg", "webp"]
ProblemType = Literal["invalid_request_error", "authentication_error", "server_error"]


def _image_file(value: object) -> object:
    if not isinstance(value, (str, bytes)):
        raise ValueError("expected a PNG, JPEG or WebP file in base64")
    return value


#: a file in base64, as JSON carries it; or its bytes, as forms and binary messages do
ImageFile = Annotated[str | bytes, PlainValidator(_image_file), WithJsonSchema({"type": "string"})]

AdapterName = Annotated[str, Field(max_length=LONGEST_NAME)]
AdapterStrength = Annotated[float, Field(ge=-LARGEST_STRENGTH, le=LARGEST_STRENGTH)]


class GenerationRequest(BaseModel):
    """Asks for images. The bundle's own settings replace fields that are left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(description="the text to generate from")
    model: str | None = Field(None, description="one of GET /v1/models; the first of them if left out")
    n: int = Field(1, ge=1, le=1024, description="number of images; image i has seed + i")
    size: str | None = Field(None, pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="WIDTHxHEIGHT in pixels")
    response_format: Literal["b64_json"] | None = Field(None, description="images are not stored, so there is no url")
    output_format: OutputFormat = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of JPEG and WebP (default: 90)")

    steps: int | None = Field(
        None, ge=1, le=1000, description="one of the numbers that the checkpoint was distilled for"
    )
    eta: float | None = Field(None, ge=0, le=1, description="stochasticity")
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="of the first image; a random one if left out")
    guidance_scale: float | None = Field(None, ge=0, le=LARGEST_GUIDANCE, description="1 or less for none")
    negative_prompt: str | None = Field(None, description="text to keep away from; acts with guidance only")
    image: ImageFile | None = Field(
        None, description="the init image, which replaces noise: PNG, JPEG or WebP in base64, or as a data: URL"
    )
    mask: ImageFile | None = Field(
        None,
        description="the part of image to repaint: the transparent pixels, or the white ones if none is transparent; "
        "`alpha` for the transparent pixels of image itself",
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="how far image is turned into noise (default: 0.8, with a mask 1)"
    )
    keep_steps: bool | None = Field(
        None, description="false to run only the part of the steps that strength leaves (default: true, all of them)"
    )
    padding_mask_crop: int | None = Field(
        None,
        ge=0,
        le=LARGEST_SIDE,
        description="pixels around the mask: this part alone is repainted, at the full size",
    )
    mask_blur: int | None = Field(None, ge=0, le=LARGEST_BLUR, description="pixels by which the mask is blurred")
    control_image: ImageFile | dict[str, ImageFile] | None = Field(
        None,
        description="PNG, JPEG or WebP in base64, or as a data: URL; for several ControlNets an object by name",
    )
    control_scale: float | None = Field(None, ge=0, le=10, description="strength of the ControlNets")
    control_start: float | None = Field(
        None, ge=0, le=1, description="fraction of the steps before which they do not act"
    )
    control_end: float | None = Field(None, ge=0, le=1, description="fraction of the steps after which they do not act")
    preprocess: Preprocess | None = Field(
        None, description="preprocessing of control images; the ControlNet's own if left out"
    )
    resize_mode: Literal["crop", "stretch", "fill"] | None = Field(
        None, description="how images are fitted to the size (default: crop)"
    )
    adapters: dict[AdapterName, AdapterStrength] | None = Field(
        None, description="strengths of LoRAs by name, of those that GET /v1/models lists for the bundle"
    )

    # Fields that OpenAI's clients may send and that have no effect here.
    user: str | None = None
    quality: str | None = None
    style: str | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: str | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None


class EditRequest(GenerationRequest):
    """Asks for images that start from an image. Without a mask, the transparent pixels of the image are one."""

    image: ImageFile = Field(  # pyright: ignore[reportIncompatibleVariableOverride]  # required here
        description="PNG, JPEG or WebP: a file, or in base64, or as a data: URL"
    )
    input_fidelity: str | None = None  # OpenAI's, without effect


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
    waited: float = Field(description="the longest time of an image in the queue, in seconds")
    timings: dict[str, float] = Field(description="seconds by stage, of the call that generated the last image")


class Problem(BaseModel):
    """An error: what was wrong, what was expected, what to do."""

    message: str
    type: ProblemType
    param: str | None
    code: str


class Failure(BaseModel):
    """The body of every answer that is not a success."""

    error: Problem


class Steps(BaseModel):
    """Numbers of steps."""

    default: int
    allowed: list[int]


class Default(BaseModel):
    """A number that requests may change."""

    default: float


class Side(BaseModel):
    """The supported widths or heights, in pixels."""

    min: int
    default: int
    max: int
    multiple: int


class ControlNet(BaseModel):
    """A ControlNet of a bundle, with its recommended settings."""

    name: str
    preprocess: str
    control_scale: float


class LoadedAdapter(BaseModel):
    """A LoRA that requests may use."""

    name: str
    rank: int = Field(description="the part of the slot's rank that it takes")
    notes: list[str] = Field(description="parts of the file that are left out")


class ModelCard(BaseModel):
    """A served bundle, as the service describes it."""

    id: str = Field(description="the name that requests use")
    object: Literal["model"] = "model"
    created: int = Field(description="time of loading, in seconds since 1970")
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
    lora_rank: int | None = Field(description="of its LoRA slot, which the adapters of a request share; or null")
    adapters: list[LoadedAdapter]
    has_encoder: bool = Field(description="it can start from an image")
    changed_on_disk: bool = Field(description="another bundle lies in the folder by now; the loaded one is served")


class Model(ModelCard):
    """A served bundle with the limits of the HTTP side."""

    max_count: int


class Models(BaseModel):
    """The served bundles."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The state of the process."""

    status: Literal["ok", "ready"]


def json_of(model: BaseModel) -> Any:
    """A model as JSON values, for answers that FastAPI does not make."""
    return model.model_dump(mode="json")
