"""The service on a Ray cluster: ``serve run hypersd.cluster.application:app bundles=FOLDER``.

An ingress speaks HTTP; replicas generate the images, one replica per GPU, as many as the queue needs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import click
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from ..errors import HyperSDError, RequestError
from ..serve.app import make_app
from ..serve.service import check_slots, name_folders
from ..serve.settings import ServeSettings
from .bundles import BundleShelf, SharedBundle, share
from .cluster_service import ClusterService
from .options import ClusterOptions, read_options
from .replica import Replica

HEAD_NODE = {"node:__internal_head__": 0.001}
UPSCALE_DELAY = 5.0  # seconds that a queue must last; short, because somebody waits
CONSTRUCTOR_RETRIES = 3
CONNECTIONS = 1000  # of an ingress; an open WebSocket takes one


class ArgumentError(click.ClickException, RequestError):
    """The application's arguments are wrong. Ray's command line prints a ClickException as one line."""

    exit_code = 2


@serve.ingress()
class Ingress:
    """The HTTP side, the same as in ``hypersd serve``."""

    def __init__(self, replica: DeploymentHandle, settings: ServeSettings) -> None:
        self._service, self._settings = ClusterService(replica), settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Make the application; Ray calls this in the event loop in which it will run."""
        self._watcher = asyncio.get_running_loop().create_task(self._service.watch())
        return make_app(self._service, self._settings)

    def __del__(self) -> None:
        self._service.stop()
        with contextlib.suppress(AttributeError, RuntimeError):  # not built yet, or the loop has ended
            self._watcher.cancel()


def app(arguments: Mapping[str, Any]) -> Application:
    """Make the application that Ray Serve runs.

    Args:
        arguments: the fields of :class:`hypersd.cluster.options.ClusterOptions`.

    Raises:
        ArgumentError: an argument is missing, not known or out of range; or a folder holds no bundle.
    """
    try:
        options = read_options(arguments)
        folders = name_folders(options.bundles)
        bundles = [share(folder) for folder in folders.values()]
        settings = options.settings()
        if options.loras() is not None:
            check_slots(folders)
    except HyperSDError as error:
        raise ArgumentError(str(error)) from error
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=options.ingresses,
        max_ongoing_requests=CONNECTIONS,
        ray_actor_options={"num_cpus": 0},
    )(Ingress)
    return ingress.bind(_replica(options, bundles), settings)


def _replica(options: ClusterOptions, bundles: Sequence[SharedBundle]) -> Application:
    shelf = serve.deployment(
        name="BundleShelf",
        max_ongoing_requests=8,
        ray_actor_options={"num_cpus": 0, "resources": HEAD_NODE},
    )(BundleShelf)
    replica = serve.deployment(
        name="Replica",
        max_ongoing_requests=options.max_ongoing_requests,
        max_queued_requests=options.queue,
        max_constructor_retry_count=CONSTRUCTOR_RETRIES,
        graceful_shutdown_timeout_s=options.timeout,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        **_replicas(options),
    )(Replica)
    return replica.bind(
        bundles,
        shelf.bind(bundles),
        device=options.device,
        queue=options.max_ongoing_requests * options.max_count,  # never full before Ray's own, which all replicas share
        max_batch=options.max_batch,
        loras=options.loras,
        backend=options.backend,
        precision=options.precision,
        low_memory=options.low_memory,
    )


def _replicas(options: ClusterOptions) -> dict[str, Any]:
    if options.min_replicas == options.max_replicas:
        return {"num_replicas": options.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_ongoing_requests,
            "upscale_delay_s": UPSCALE_DELAY,
        }
    }
