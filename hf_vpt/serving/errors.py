"""What the service answers to a request that it does not serve: the same JSON everywhere."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field


class ErrorText(BaseModel):
    """Why there is no result, for people to read."""

    found: str = Field(description="What the request had.")
    needed: str = Field(description="What it should have had.")
    do: str = Field(description="What to do now.")


class ErrorAnswer(BaseModel):
    """The body of every answer whose status is 400 or more."""

    error: ErrorText


class Refusal(Exception):
    """A request is not served.

    Args:
        status: HTTP status of the answer.
        reason: One word, by which the metrics count it.
        found: What the request had.
        needed: What it should have had.
        do: What to do now.
        headers: Headers of the answer.
    """

    def __init__(
        self, status: int, reason: str, found: str, needed: str, do: str, headers: Mapping[str, str] | None = None
    ):
        super().__init__(f"{found} {needed} {do}")
        self.status = status
        self.reason = reason
        self.text = ErrorText(found=found, needed=needed, do=do)
        self.headers = headers

    def to_response(self) -> JSONResponse:
        return JSONResponse(ErrorAnswer(error=self.text).model_dump(), self.status, self.headers)


def shorten(text: str, length: int = 100) -> str:
    """What a client sent, cut to a length that fits an answer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def stopping() -> Refusal:
    return Refusal(
        503, "stopping", "The service is shutting down.", "A running service is needed.", "Ask again in a moment."
    )
