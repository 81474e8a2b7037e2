"""Answers that are not images: a status, and the error object that clients of OpenAI's API read.

Source: the shape {"error": {message, type, param, code}} and the types are those of OpenAI's API reference (facts).
"""

from __future__ import annotations

from stagevar.errors import StagevarError

#: Statuses after which the same request may be sent again, as OpenAI's clients do.
RETRYABLE = (408, 429, 500, 503, 504)


class Refusal(StagevarError):
    """A request that gets no image.

    Attributes:
        status: of HTTP.
        code: a stable word for programs.
        param: the invalid field, if there is one.
        retry_after_s: seconds until a retry makes sense; None if it never does.
        close: whether the connection is unusable because the rest of the body is still on its way.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        code: str = "invalid_value",
        param: str | None = None,
        retry_after_s: int | None = None,
        close: bool = False,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s, self.close = status, code, param, retry_after_s, close

    @property
    def kind(self) -> str:
        """OpenAI's word for errors of this status."""
        if self.status in (401, 403):
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def logged(self) -> str:
        """What the log says of it: a model's own words may quote the prompt."""
        return "the model refuses the prompt" if self.code == "not_drawable" else str(self)

    def body(self) -> dict[str, dict[str, str | None]]:
        """What is sent."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What is sent along with it."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return {**headers, "connection": "close"} if self.close else headers


def busy(waiting: int, limit: int, retry_after_s: int) -> Refusal:
    """The queue is full."""
    message = f"{waiting} images are waiting, of at most {limit}; try again in {retry_after_s} s"
    return Refusal(message, 429, code="queue_full", retry_after_s=retry_after_s)


def not_ready(state: str, close: bool = False) -> Refusal:
    """Loading, stopping or broken: another replica, or this one later, will answer. close: see `Refusal`."""
    reasons = {
        "loading": "the model is still loading and warming up; poll /ready, then try again",
        "stopping": "the server is stopping; send the request to another one",
        "broken": "the device is broken and the server is shutting down; a supervisor restarts it",
    }
    return Refusal(reasons[state], 503, code=f"server_{state}", retry_after_s=5, close=close)
