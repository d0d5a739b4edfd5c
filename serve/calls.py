"""From drawings to calls of a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any

from PIL import Image

from ..runtime import Pipeline
from ..runtime.control_images import fit, preprocess
from ..runtime.request import Request
from ..runtime.text import TruncationWarning
from .job_queue import Job
from .service_request import ServiceRequest


def make_request(pipe: Pipeline, service_request: ServiceRequest) -> Request:
    """What the pipeline is going to draw for one image of a drawing.

    Raises:
        RequestError: the pipeline does not draw that.
    """
    return pipe.make_request(
        service_request.prompt,
        negative_prompt=service_request.negative_prompt,
        controlled_by=service_request.control,
        **service_request.settings.arguments(),
    )


def control_images(pipe: Pipeline, service_request: ServiceRequest, request: Request) -> dict[str, Image.Image]:
    """What the ControlNets are to see, of the size that is drawn."""
    settings = service_request.control_settings
    return {
        name: preprocess(
            fit(image, request.width, request.height, settings.resize_mode),
            settings.preprocess or pipe.manifest.controlnets[name].preprocess,
        )
        for name, image in service_request.control.items()
    }


def call_key(service_request: ServiceRequest, request: Request) -> Hashable:
    """Equal for images that one call can draw. What is left out counts as what it means."""
    settings = (request.num_inference_steps, request.timesteps, request.eta, request.guidance_scale)
    shape = (request.height, request.width, request.controls, service_request.negative_prompt is None)
    return (service_request.model, *settings, *shape)


def images_at_once(pipe: Pipeline) -> int:
    """How many images a call may draw so that none depends on the others.

    On a CPU a network's kernels go by the number of rows, and round differently with another: there a call draws as
    many images as one run of the networks takes in any case.
    """
    batch = pipe.manifest.shapes.batch
    return batch.min if pipe.device.type == "cpu" else batch.max


def call_arguments(jobs: Sequence[Job]) -> dict[str, Any]:
    """The pipeline's arguments for jobs of one key."""
    service_requests = [job.service_request for job in jobs]
    names = jobs[0].control
    return {
        "prompt": [service_request.prompt for service_request in service_requests],
        "negative_prompt": None
        if service_requests[0].negative_prompt is None
        else [service_request.negative_prompt for service_request in service_requests],
        "seed": [job.seed for job in jobs],
        "image": {name: [job.control[name] for job in jobs] for name in names} if names else None,
        **service_requests[0].settings.arguments(),
    }


def warm_up(pipe: Pipeline) -> None:
    """Draw until a call costs what later ones cost: on a GPU the third call of a kind is recorded."""
    for i in range(3 if pipe.device.type == "cuda" else 1):
        pipe("warm-up", seed=i)


def keep_prompts_out_of_the_log() -> None:
    """For a process that draws for others: Python would print of each long prompt a part, and keep it for ever."""
    warnings.simplefilter("ignore", TruncationWarning)
