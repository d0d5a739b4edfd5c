"""The errors of a service: it is unavailable, too slow, or does not serve the model."""

from __future__ import annotations

from ..errors import HyperSDError, RequestError


class UnavailableError(HyperSDError):
    """The service could not accept a valid request: retry after ``retry_after`` seconds."""

    code = "unavailable"

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message, retry_after)  # both, so that the error can be pickled
        self.message, self.retry_after = message, retry_after

    def __str__(self) -> str:
        return self.message


class QueueFullError(UnavailableError):
    """The queue is full."""

    code = "queue_full"


class NotReadyError(UnavailableError):
    """The bundles are still being loaded."""

    code = "not_ready"


class StoppingError(UnavailableError):
    """The service is about to end."""

    code = "stopping"


class TimedOutError(HyperSDError):
    """The image was not finished in time."""


class UnknownModelError(RequestError):
    """The request names a bundle that is not served."""
