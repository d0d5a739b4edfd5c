"""Error answers in the format of the OpenAI API."""

from __future__ import annotations

from fastapi.responses import JSONResponse

from ..errors import RequestError
from .schemas import Failure, Problem, ProblemType, json_of
from .service_errors import TimedOutError, UnavailableError, UnknownModelError

CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    500: "engine_failed",
    503: "unavailable",
    504: "timeout",
}


def problem(status: int, message: str, param: str | None = None, code: str | None = None) -> Problem:
    """The error object of an answer; its type follows from the status."""
    kind: ProblemType = "server_error" if status >= 500 else "invalid_request_error"
    if status == 401:
        kind = "authentication_error"
    return Problem(message=message, type=kind, param=param, code=code or CODES.get(status, f"http_{status}"))


def problem_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after: int | None = None,
    close: bool = False,
) -> JSONResponse:
    """Make an error answer. ``close`` ends the connection: the rest of the body was not read."""
    headers = {}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if close:
        headers["Connection"] = "close"
    failure = Failure(error=problem(status, message, param, code))
    return JSONResponse(json_of(failure), status, headers)


def response_of(error: Exception) -> JSONResponse:
    """Make the answer to a request that raised an error."""
    status, code = status_of(error)
    retry_after = error.retry_after if isinstance(error, UnavailableError) else None
    return problem_response(status, str(error), code=code, retry_after=retry_after)


def status_of(error: Exception) -> tuple[int, str | None]:
    """The HTTP status of an error, and its code if that differs from the status's default."""
    if isinstance(error, UnknownModelError):
        return 404, "model_not_found"
    if isinstance(error, RequestError):
        return 400, None
    if isinstance(error, UnavailableError):
        return 503, error.code
    if isinstance(error, TimedOutError):
        return 504, None
    return 500, None
