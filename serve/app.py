"""The HTTP application: its routes, its error answers and its OpenAPI description."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Body, FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from .. import __version__
from ..errors import HyperSDError, validation_in_words
from .edits import edit_body, read_edit
from .guard import Guard
from .image_codec import encode
from .intake import read_request
from .live import LiveConnections
from .problems import problem_response, response_of
from .schemas import Failure, Generation, GenerationRequest, Health, Image, Model, Models
from .service import Service
from .service_request import GeneratedImage, ServiceRequest
from .settings import ServeSettings

STATIC = Path(__file__).parent / "static"
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' ws: wss:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
IMAGES: dict[str, Any] = {"image/png": {}, "image/jpeg": {}, "image/webp": {}}
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": words}
    for status, words in {
        400: "the request is wrong",
        401: "the token is missing or wrong",
        403: "the page of another site asks",
        404: "no such model",
        408: "the body came too slowly",
        413: "the body is too large",
        500: "an engine failed",
        503: "the queue is full, or the service starts or stops; retry after the seconds in Retry-After",
        504: "not finished in time",
    }.items()
}
GENERATION_FAILURES = (400, 401, 404, 408, 413, 500, 503, 504)
T = TypeVar("T")


def make_app(service: Service, settings: ServeSettings) -> FastAPI:
    """The ASGI application that answers with a service's images."""
    app = FastAPI(
        title="hypersd",
        version=__version__,
        description="Generates images with Hyper-SD in few steps. Requests and answers follow the OpenAI images API.",
        docs_url=None,  # that page loads scripts from another site
        redoc_url=None,
    )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    _handle_errors(app)
    _add_generation(app, service, settings)
    _add_status(app, service, settings)
    _add_page(app, service, settings)
    paths = {route.path for route in app.routes if isinstance(route, Route)}
    app.add_middleware(Guard, settings=settings, metrics=service.metrics, paths=paths)
    if settings.loopback_only:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "::1", "[::1]"])
    return app


def _add_generation(app: FastAPI, service: Service, settings: ServeSettings) -> None:
    @app.post(
        "/v1/images/generations",
        response_model=Generation,
        responses=_answers("the images", *GENERATION_FAILURES, content=IMAGES),
        summary="Generate images",
    )
    async def generate(request: Request, body: Annotated[GenerationRequest, Body()]) -> Any:
        """Answers with JSON, or with the image itself if `Accept` names image/png, image/jpeg or image/webp."""
        return await _answer(request, body, service, settings)

    @app.post(
        "/v1/images/edits",
        response_model=Generation,
        responses=_answers("the images", *sorted((403, *GENERATION_FAILURES)), content=IMAGES),
        summary="Generate images from an image",
        openapi_extra=edit_body(),
    )
    async def edit(request: Request) -> Any:
        """Starts from `image`; the other fields are those of a GenerationRequest.

        A form (multipart/form-data) carries images as files, JSON in base64. Without a mask, the transparent pixels of
        the image are one.
        """
        return await _answer(request, await read_edit(request), service, settings)


async def _answer(request: Request, body: GenerationRequest, service: Service, settings: ServeSettings) -> Any:
    """Generate the images that a body asks for."""
    wanted = _wanted_format(request, body)
    service_request = await asyncio.to_thread(lambda: read_request(body, service.models(), settings))
    images = await _while_connected(request, service.generate(service_request, settings.timeout))
    output_format = wanted or body.output_format
    files = await asyncio.to_thread(_encode_all, images, output_format, body.output_compression)
    if wanted:
        headers = {
            "X-Hypersd-Seed": str(images[0].seed),
            "X-Hypersd-Timings": json.dumps(dict(images[0].timings)),
        }
        return Response(files[0], media_type=f"image/{wanted}", headers=headers)
    return _generation(service_request, images, files, output_format)


def _wanted_format(request: Request, body: GenerationRequest) -> str | None:
    """The format of an answer that is an image; None for JSON, as always for several images."""
    for part in request.headers.get("accept", "").split(","):
        media_type = part.partition(";")[0].strip().lower()
        if media_type in IMAGES and body.n == 1:
            return media_type.removeprefix("image/")
    return None


def _encode_all(images: Sequence[GeneratedImage], output_format: str, quality: int | None) -> list[bytes]:
    return [encode(one.image, output_format, quality, one.metadata) for one in images]


def _generation(
    service_request: ServiceRequest, images: Sequence[GeneratedImage], files: Sequence[bytes], output_format: str
) -> Generation:
    request = images[-1].request
    return Generation(
        created=int(time.time()),
        data=[
            Image(b64_json=base64.b64encode(file).decode(), seed=one.seed)
            for one, file in zip(images, files, strict=True)
        ],
        model=service_request.model,
        output_format=output_format,  # type: ignore[arg-type]
        size="{}x{}".format(*images[-1].image.size),
        steps=request.steps,
        eta=request.eta,
        waited=max(one.waited for one in images),
        timings=dict(images[-1].timings),
    )


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await the work, and cancel it when the client disconnects."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client has disconnected")
        return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_status(app: FastAPI, service: Service, settings: ServeSettings) -> None:
    @app.get("/v1/models", responses=_answers("the bundles", 401, 503), summary="List the served bundles")
    async def models() -> Models:
        cards = await asyncio.to_thread(service.models)  # reads from the disk
        return Models(data=[Model(**dict(card), max_count=settings.max_count) for card in cards])

    @app.get("/healthz", responses=_answers("the process answers"), summary="Check that the process answers")
    async def healthz() -> Health:
        return Health(status="ok")

    @app.get(
        "/readyz",
        response_model=Health,
        responses=_answers("every bundle is loaded", 503),
        summary="Check that the service can generate",
    )
    async def readyz() -> Any:
        if service.is_ready():
            return Health(status="ready")
        return problem_response(503, "not ready: loading, stopping or failing", retry_after=2)

    @app.get("/metrics", responses=_answers("the metrics", 401, content={"text/plain": {}}), response_class=Response)
    async def metrics() -> Response:
        """Read the service's metrics, in Prometheus' text format."""
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI, service: Service, settings: ServeSettings) -> None:
    connections = LiveConnections(service, settings)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=SECURITY_HEADERS)

    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        await connections.serve(socket)

    app.mount("/static", _PageFiles(directory=STATIC, check_dir=False), name="static")


class _PageFiles(StaticFiles):
    """The page's files; browsers revalidate them, because they change with the package."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(SECURITY_HEADERS)
        return response


def _handle_errors(app: FastAPI) -> None:
    handlers: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {}

    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        message, param = validation_in_words(error)
        return problem_response(400, message, param=param)

    async def on_http(_: Request, error: HTTPException) -> Response:
        response = problem_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    async def on_known(_: Request, error: HyperSDError) -> Response:
        return response_of(error)

    async def on_unknown(_: Request, error: Exception) -> Response:
        message = f"a bug: {type(error).__name__}; the service's log has more"
        return problem_response(500, message, code="internal", close=True)  # as uvicorn does

    handlers[RequestValidationError] = on_invalid
    handlers[HTTPException] = on_http
    handlers[HyperSDError] = on_known
    handlers[Exception] = on_unknown
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _answers(success: str, *failures: int, **about_success: Any) -> dict[int | str, dict[str, Any]]:
    """Descriptions of an operation's answers."""
    return {200: {"description": success, **about_success}, **{status: FAILURES[status] for status in failures}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description without status 422: this service answers 400 to a body that does not fit its schema."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
