"""The Python model that Triton runs for a bundle. Triton does the queueing and batching."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import EngineError, HyperSDError, RequestError
from ..runtime import Pipeline
from ..runtime.adapter import slot_of
from ..serve.calls import call_params, images_at_once, keep_prompts_out_of_the_log, make_jobs, warm_up
from ..serve.job_queue import Job
from ..serve.lora_folder import LoraFolder
from .config import IMAGE, SEED
from .rows import read_requests


class CancelledRequestError(HyperSDError):
    """The client has cancelled the request."""


class Model:
    """One instance of a bundle on a device; Triton calls its three methods from one thread.

    Attributes:
        utils: Triton's module ``triton_python_backend_utils``, which exists only in its processes.
    """

    utils: ClassVar[Any]

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle and warm it up.

        Args:
            args: facts about the instance: ``model_config`` in JSON, ``model_repository`` (the model's folder),
                ``model_name``, ``model_instance_kind`` and ``model_instance_device_id``.

        Raises:
            HyperSDError: the bundle cannot be loaded, or has no slot for the LoRAs, or their folder is not there;
                Triton then reports the model as not ready.
        """
        parameters = _parameters(args["model_config"])
        if "bundle" not in parameters:
            raise RequestError("config.pbtxt has no parameter `bundle`: expected the bundle's path in it")
        self.name = args["model_name"]
        bundle = Path(args["model_repository"]) / parameters["bundle"]
        keep_prompts_out_of_the_log()
        self.pipe = Pipeline.load(bundle, parameters.get("backend", "auto"), _device(args))
        self._loras = _lora_folder(Path(args["model_repository"]), parameters.get("lora_folder"))
        if self._loras is not None:
            slot_of(self.pipe.manifest)
            self._loras.join({self.name: self.pipe})
            self._loras.watch()
        warm_up(self.pipe)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request with its images and seeds, or with its error."""
        readings = [self._read(request) for request in requests]
        self._generate([job for reading in readings if isinstance(reading, list) for job in reading])
        return [self._answer(reading) for reading in readings]

    def finalize(self) -> None:
        """Release the engines."""
        if self._loras is not None:
            self._loras.end()
        del self.pipe

    def _read(self, request: Any) -> list[Job] | Exception:
        """The images of a request, or the error that prevents them."""
        try:
            if request.is_cancelled():
                raise CancelledRequestError("cancelled before it was generated")
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            requests = read_requests(self.name, self.pipe.manifest, tensors)
            return [job for one in requests for job in make_jobs(self.pipe, one)]
        except Exception as error:  # must not fail the other requests
            return error

    def _generate(self, jobs: Sequence[Job]) -> None:
        """Generate all jobs; jobs with equal settings share a call."""
        most = images_at_once(self.pipe)
        alike: dict[Any, list[Job]] = {}
        for job in jobs:
            alike.setdefault(job.key, []).append(job)
        for group in alike.values():
            for first in range(0, len(group), most):
                self._generate_together(group[first : first + most])

    def _generate_together(self, jobs: Sequence[Job]) -> None:
        """Generate jobs in one call; if it fails each alone, because one must not fail the others."""
        try:
            images = self.pipe.generate(call_params(jobs)).images
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].result.set_exception(error)
                return
            for job in jobs:
                self._generate_together([job])
            return
        for job, image in zip(jobs, images, strict=True):
            job.result.set_result(image)

    def _answer(self, reading: list[Job] | Exception) -> Any:
        try:
            if isinstance(reading, Exception):
                raise reading
            images = _stack([np.asarray(job.result.result()) for job in reading])
        except Exception as error:
            return self.utils.InferenceResponse(output_tensors=[], error=self._error(error))
        seeds = np.array([[job.seed] for job in reading], np.int64)
        tensors = [self.utils.Tensor(IMAGE, images), self.utils.Tensor(SEED, seeds)]
        return self.utils.InferenceResponse(output_tensors=tensors)

    def _error(self, error: Exception) -> Any:
        kinds = self.utils.TritonError
        if isinstance(error, RequestError):
            return kinds(str(error), kinds.INVALID_ARG)
        if isinstance(error, CancelledRequestError):
            return kinds(str(error), kinds.CANCELLED)
        known = isinstance(error, EngineError)
        return kinds(str(error) if known else f"generation failed ({type(error).__name__}: {error})", kinds.INTERNAL)


def _parameters(model_config: str) -> dict[str, str]:
    """The parameters of ``config.pbtxt``."""
    return {name: value["string_value"] for name, value in json.loads(model_config).get("parameters", {}).items()}


def _lora_folder(model: Path, folder: str | None) -> LoraFolder | None:
    return LoraFolder(model / folder) if folder else None


def _device(args: Mapping[str, str]) -> str:
    if args["model_instance_kind"] == "GPU":
        return f"cuda:{args['model_instance_device_id']}"
    return "cpu"


def _stack(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images [H, W, 3] as rows of one tensor [N, H, W, 3]."""
    if len({image.shape for image in images}) > 1:
        raise RequestError("images of one request have several sizes: expected one size, or a request for each")
    return np.stack(images)
