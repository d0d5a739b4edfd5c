"""Turns requests into jobs, and jobs into calls of a pipeline."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Hashable, Sequence

from PIL import Image

from ..engines.cuda.graphs import WARM_UPS
from ..errors import DeviceMemoryError, one_line
from ..runtime import Pipeline
from ..runtime.control_images import preprocess
from ..runtime.image_files import blurred, fit, to_rgb
from ..runtime.init_images import check_aspects
from ..runtime.params import Params
from ..runtime.request import Request
from ..runtime.text import TruncationWarning
from .job_queue import Job
from .service_request import ServiceRequest

LOG = logging.getLogger(__name__)


def make_jobs(pipe: Pipeline, service_request: ServiceRequest) -> list[Job]:
    """Check a request and make one job for each of its images; takes milliseconds, more with images to fit.

    Raises:
        RequestError: the params are out of range for this pipeline.
    """
    params = dataclasses.replace(service_request.params, seed=None, num_images_per_prompt=1)
    request = pipe.decide(params)
    control = _control_images(pipe, service_request, request)
    params, image, mask = _init_image(params, request)
    key = call_key(service_request.model, request, mask is not None)
    return [
        Job(
            model=service_request.model,
            seed=seed,
            params=params,
            request=request,
            control=control,
            image=image,
            mask=mask,
            key=key if params.padding_mask_crop is None else object(),  # a call repaints a part of one image
        )
        for seed in service_request.seeds
    ]


def call_key(model: str, request: Request, has_mask: bool = False) -> Hashable:
    """A value that is equal for images that one call can generate."""
    settings = (request.num_inference_steps, request.timesteps, request.eta, request.guidance_scale)
    start = (request.starts_from, request.strength, request.keep_steps, has_mask)
    sizes = (request.height, request.width)
    adapters = tuple(each for each in request.adapters if each.strength != 0)  # of equal files, not of equal names
    return (model, *settings, *start, *sizes, request.controls, adapters, request.negative_prompts is None)


def call_params(jobs: Sequence[Job]) -> Params:
    """The params of one call that generates the images of jobs with equal keys."""
    first, requests = jobs[0], [job.request for job in jobs]
    is_alone = first.params.padding_mask_crop is not None
    images, masks = [job.image for job in jobs], [job.mask for job in jobs]
    return dataclasses.replace(
        first.params,
        prompt=[request.prompts[0] for request in requests],
        negative_prompt=[request.negative_prompts[0] for request in requests if request.negative_prompts] or None,
        seed=[job.seed for job in jobs],
        control_image={name: [job.control[name] for job in jobs] for name in first.control} or None,
        image=None if first.image is None else first.image if is_alone else images,
        mask_image=None if first.mask is None else first.mask if is_alone else masks,
        adapters=first.request.adapters,  # with the files that the request was accepted with
    )


def images_at_once(pipe: Pipeline) -> int:
    """The most images of a call at which none depends on its neighbours.

    On a CPU the kernels depend on the number of rows and round differently with another number. There a call
    generates as many images as one run of the components needs in any case.
    """
    batch = pipe.manifest.shapes.batch
    return batch.min if pipe.device.type == "cpu" else batch.max


def warm_up(pipe: Pipeline, max_batch: int | None = None) -> None:
    """Generate until calls of up to ``max_batch`` images, or all that one can make, cost as much as later ones.

    On a GPU every batch that the images of the default settings can run at gets its CUDA graph, up to the first that
    the device's memory is too small for. Calls that fail for that reason are repeated image by image.

    Raises:
        EngineError: an engine failed, or the device's memory is too small for one image.
    """
    most = images_at_once(pipe) if max_batch is None else min(max_batch, images_at_once(pipe))
    batches, fitting = pipe.graph_batches(most), 0
    for images in batches or [1]:
        try:
            for i in range(WARM_UPS + 1 if batches else 1):
                pipe.generate(Params(prompt="warm-up", num_images_per_prompt=images, seed=i))
        except DeviceMemoryError as error:
            if images == 1:
                raise
            LOG.warning(
                "no memory for %s images at once, which will be tried and then generated one by one: --max-batch %s "
                "(Triton: max_batch_size) avoids that (%s)",
                images,
                fitting,
                one_line(error),
            )
            return
        fitting = images


def keep_prompts_out_of_the_log() -> None:
    """Silence the warning that quotes long prompts, which Python prints and keeps: clients' prompts are private."""
    warnings.simplefilter("ignore", TruncationWarning)


def _init_image(params: Params, request: Request) -> tuple[Params, Image.Image | None, Image.Image | None]:
    """The init image and the mask in the output size, and the params for them.

    Fitting takes time that the thread of the device does not have; what is fitted is not changed by fitting it again.
    """
    image, mask = params.image, params.mask_image
    rest = dataclasses.replace(params, image=None, mask_image=None)
    if image is not None and mask is not None:
        check_aspects(params)
    if image is None or params.padding_mask_crop is not None:  # which cuts the part out of the whole
        return rest, image, mask
    fitting = (request.width, request.height, params.resize_mode)
    if mask is not None:
        mask = fit(blurred(to_rgb(mask), params.mask_blur), *fitting)
    return dataclasses.replace(rest, mask_blur=0), fit(image, *fitting), mask


def _control_images(pipe: Pipeline, service_request: ServiceRequest, request: Request) -> dict[str, Image.Image]:
    """The images that the ControlNets see, in the output size, by the ControlNets' names."""
    params = service_request.params
    return {
        name: preprocess(
            fit(image, request.width, request.height, params.resize_mode),
            service_request.preprocess or pipe.manifest.controlnets[name].preprocess,
        )
        for name, image in (params.control_image or {}).items()
    }
