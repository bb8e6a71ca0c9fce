"""What the service answers: the results here, the refusals in `errors`."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Prediction(BaseModel):
    """A class and its probability."""

    label: str
    score: float = Field(
        description="Probability: softmax over the adapter's classes, or a sigmoid where several may be right."
    )


class ImageSize(BaseModel):
    """Pixels of the image as it was sent, upright."""

    width: int
    height: int


class Classification(BaseModel):
    """The likeliest classes of an image, the likeliest first."""

    adapter: str
    predictions: list[Prediction]
    image: ImageSize
    milliseconds: float = Field(description="Time in the service, from the request's headers on.")


class AdapterDescription(BaseModel):
    """An adapter that requests may name."""

    name: str
    method: str = Field(description="Of prompt tuning.")
    source: str = Field(description="Repository on the Hub, or the name of a folder.")
    num_classes: int
    labels: list[str]


class AdapterList(BaseModel):
    """All adapters of the service."""

    adapters: list[AdapterDescription]


class Health(BaseModel):
    """The service is alive."""

    status: str
