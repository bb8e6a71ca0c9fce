"""A point of a sweep that somebody is at work on, one that is done, and the error of one that failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """The right to do a point.

    Args:
        point: Which one.
        attempt: How many processes were at it before; what they left behind may be gone on from.
        params: Settings of the point that an earlier attempt has drawn.
        trial_id: The trial's id in the storage.
        token: Unique name of the claim.
    """

    point: int
    attempt: int
    params: Mapping[str, Any]
    trial_id: int
    token: str


@dataclass(frozen=True)
class Entry:
    """A point that is done."""

    point: int
    params: Mapping[str, Any]
    value: float
    result: Mapping[str, Any]
    attempts: int

    @property
    def diverged(self) -> bool:
        """Whether training broke off with a loss that is no number, so that the value is none to choose by."""
        return bool(self.result.get("diverged"))


def describe_error(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
