"""Refused requests, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: what is wrong, and the remedy.
        param: the field of the body that is wrong.
        code: a short name of the error for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
