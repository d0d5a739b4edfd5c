"""Files of prompts on a Ray cluster: actors generate, one per GPU; the machine that started them writes the images."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import EngineError, HyperSDError, RequestError, one_line
from ..serve.image_codec import encode
from ..serve.intake import read_request
from ..serve.lora_folder import LoraFolder
from ..serve.schemas import GenerationRequest
from ..serve.service import LocalService
from ..serve.settings import ServeSettings
from .bundles import BundleShelf, SharedBundle, find_or_fetch, share
from .job_images import with_files
from .jobs import KEY_NAME, PromptJob

BLOCK = 16  # images that an actor takes and returns at a time
ATTEMPTS = 3  # at a block whose actor dies: Ray itself would retry for ever
A_DAY = 86_400.0  # seconds for a block; nobody waits for one image
LIMITS = ServeSettings(max_prompt=1_000_000, max_pixels=1 << 26)  # the file is the user's own
SCHEMA = pa.schema([("file", pa.string()), ("png", pa.binary()), ("error", pa.string())])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorOptions:
    """The actors.

    Attributes:
        count: number of actors.
        num_gpus: GPUs of each actor; 0 generates on the CPU.
        max_batch: the most images of one call.
        lora_folder: of LoRAs that lines may use, at this path on every machine.
        strict_loras: leave out LoRAs of which a part would be left out.
        backend: as for :meth:`hypersd.Pipeline.load`; likewise ``precision`` and ``low_memory``.
    """

    count: int
    num_gpus: float
    max_batch: int
    lora_folder: Path | None
    strict_loras: bool
    backend: str
    precision: str | None
    low_memory: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """An image's PNG file, or the error that prevented it."""

    file: str
    png: bytes | None
    error: str | None


class Desk(BundleShelf):
    """The actors' contact on the machine that started them: files of the bundle, images, and attempts at each block."""

    def __init__(self, bundle: SharedBundle) -> None:
        super().__init__([bundle])
        self._attempts: Counter[str] = Counter()

    def begin(self, file: str) -> int:
        """Count a beginning of the block that starts with ``file``; the number of earlier ones."""
        self._attempts[file] += 1
        return self._attempts[file] - 1

    def read_image(self, path: str) -> bytes | RequestError:
        """A file that a line names; an error is returned, because Ray would wrap it."""
        try:
            return Path(path).read_bytes()
        except OSError as error:
            return RequestError(f"{path} cannot be read any more ({error.strerror or error}): put it back")


class BatchReplica:
    """An actor of Ray Data: blocks of requests in, PNG files out."""

    def __init__(self, bundle: SharedBundle, desk: Any, options: ActorOptions) -> None:
        """Load the bundle and warm up; ``desk`` is the handle of an actor :class:`Desk`."""

        def read(digest: str, file: str, offset: int) -> bytes:
            return ray.get(desk.read.remote(digest, file, offset))

        self._desk = desk
        self._service = LocalService(
            [find_or_fetch(bundle, read)],
            devices=["cuda" if options.num_gpus else "cpu"],
            queue=BLOCK,
            max_batch=options.max_batch,
            lora_folder=options.lora_folder and LoraFolder(options.lora_folder, options.strict_loras),
            backend=options.backend,
            precision=options.precision,
            low_memory=options.low_memory,
        )
        self._service.start()
        self._service.wait_ready()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Generate a block: columns ``file``, ``key`` and ``body`` (JSON) in, the columns of SCHEMA out."""
        rows = block.to_pylist()
        begun: Any = ray.get(self._desk.begin.remote(rows[0]["file"]))
        if begun >= ATTEMPTS:
            error = f"the process that generated it died {ATTEMPTS} times: see Ray's log"
            return pa.Table.from_pylist([{"file": row["file"], "error": error} for row in rows], SCHEMA)
        results = asyncio.run(self._generate_all(rows))
        if not self._service.is_ready():
            os._exit(1)  # the device fails at every call, and would fail all remaining images
        return pa.Table.from_pylist(results, SCHEMA)

    async def _generate_all(self, rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        return await asyncio.gather(*map(self._generate, rows))

    async def _generate(self, row: dict[str, str]) -> dict[str, Any]:
        try:
            body = GenerationRequest.model_validate_json(row["body"])
            body = await asyncio.to_thread(with_files, body, self._read_image)
            service_request = await asyncio.to_thread(read_request, body, self._service.models(), LIMITS)
            [image] = await self._service.generate(service_request, A_DAY)
        except HyperSDError as error:
            return {"file": row["file"], "error": str(error)}
        metadata = {**image.metadata, KEY_NAME: row["key"]}
        return {"file": row["file"], "png": await asyncio.to_thread(encode, image.image, "png", None, metadata)}

    def _read_image(self, path: str) -> bytes:
        content: Any = ray.get(self._desk.read_image.remote(path))
        if isinstance(content, RequestError):
            raise content
        return content


def connect(address: str | None) -> None:
    """Join the cluster at ``address``; None: the cluster of this machine, or else a new one.

    Raises:
        EngineError: there is no cluster.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    except (RayError, ConnectionError, ValueError, RuntimeError) as error:
        raise EngineError(f"no Ray cluster at {address or 'hand'}: {one_line(error)}") from error


def default_actors() -> tuple[int, float]:
    """Number of actors and GPUs of each: one per GPU of the cluster, or one on the CPU."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return (gpus, 1.0) if gpus else (1, 0.0)


def generate_jobs(bundle: Path, jobs: Sequence[PromptJob], options: ActorOptions) -> Iterator[Result]:
    """Generate images; results come as they are ready.

    Raises:
        BundleError: the folder holds no bundle.
        EngineError: the actors could not start.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # a failure of one actor does not end the others' work
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [
        {"file": job.file, "key": job.key, "body": job.body.model_dump_json(exclude_none=True)}
        for job in sorted(jobs, key=lambda job: job.settings)  # images that one call can generate are neighbours
    ]
    try:
        for row in _generated(rows, share(bundle), options).iter_rows():
            yield Result(**row)
    except RayError as error:
        raise EngineError(f"the actors failed: {_last_line(error)}") from error


def _generated(rows: list[dict[str, str]], bundle: SharedBundle, options: ActorOptions) -> ray.data.Dataset:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote(bundle)
    blocks = math.ceil(len(rows) / BLOCK)
    return ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        BatchReplica,
        batch_size=BLOCK,
        batch_format="pyarrow",
        fn_constructor_kwargs={"bundle": bundle, "desk": desk, "options": options},
        compute=ray.data.ActorPoolStrategy(size=min(options.count, blocks)),
        num_gpus=options.num_gpus or None,
        num_cpus=None if options.num_gpus else 1,
    )


def _last_line(error: RayError) -> str:
    """The error itself: Ray's errors are whole tracebacks."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
