"""From drawings to calls of a pipeline."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Hashable, Sequence

from PIL import Image

from ..runtime import Pipeline
from ..runtime.control_images import fit, preprocess
from ..runtime.params import Params
from ..runtime.request import Request
from ..runtime.text import TruncationWarning
from .job_queue import Job
from .service_request import ServiceRequest


def request_params(service_request: ServiceRequest) -> Params:
    """The params of one image of a service_request, its seed and the fitting of its control images apart."""
    return Params(
        prompt=service_request.prompt,
        negative_prompt=service_request.negative_prompt,
        control_image=service_request.control or None,
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


def call_params(jobs: Sequence[Job]) -> Params:
    """The params of one call that generates the images of jobs with equal keys."""
    service_requests, names = [job.service_request for job in jobs], jobs[0].control
    return dataclasses.replace(
        request_params(service_requests[0]),
        prompt=[service_request.prompt for service_request in service_requests],
        negative_prompt=None
        if service_requests[0].negative_prompt is None
        else [service_request.negative_prompt or "" for service_request in service_requests],
        seed=[job.seed for job in jobs],
        control_image={name: [job.control[name] for job in jobs] for name in names} or None,
    )


def warm_up(pipe: Pipeline) -> None:
    """Draw until a call costs what later ones cost: on a GPU the third call of a kind is recorded."""
    for i in range(3 if pipe.device.type == "cuda" else 1):
        pipe.generate(Params(prompt="warm-up", seed=i))


def keep_prompts_out_of_the_log() -> None:
    """For a process that draws for others: Python would print of each long prompt a part, and keep it for ever."""
    warnings.simplefilter("ignore", TruncationWarning)
