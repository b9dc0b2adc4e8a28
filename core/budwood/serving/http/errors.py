"""Errors in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

from budwood.errors import BudwoodError, InputError, ResourceError
from budwood.serving.requests import QueueFullError

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 409: "conflict_error", 413: "invalid_request_error", 415: "invalid_request_error",
    422: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip


class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
        status: HTTP status; code: what programs compare; param: the field that is wrong.
        retry_after: seconds after which the request may succeed.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients read."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {"retry-after": str(self.retry_after)} if self.retry_after else {}


def no_model(name: str) -> ApiError:
    """Return the one error for a model that does not exist and for one that the client may not use."""
    message = f"The model '{name[:64]}' does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found", param="model")


def from_error(error: BaseException) -> ApiError:
    """Return what a client is told about an error of the engine: what is its own fault, and no more of the rest."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after=1)
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, ResourceError):
        return ApiError(503, str(error), code="resources", retry_after=1)
    if isinstance(error, BudwoodError):
        return ApiError(500, str(error), code="failed")
    return ApiError(500, "The request failed; the server's log says why.", code="failed")
