"""Errors as an API server answers them."""

from typing import Any

REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "Conflict",
    410: "Expired",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


class ApiError(Exception):
    """A request that is answered with `status` and a Status object."""

    def __init__(
        self,
        status: int,
        message: str,
        reason: str | None = None,
        headers: dict[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(message)
        self.name = name
        """Of the object that the error is about, where it is about one."""
        self.status, self.message, self.headers = status, message, headers or {}
        self.reason = reason or REASONS.get(status, "")

    def body(self) -> dict[str, Any]:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.status,
        } | ({"details": {"name": self.name}} if self.name else {})
