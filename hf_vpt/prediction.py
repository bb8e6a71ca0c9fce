"""Classes of images: of files, of all images in a folder, and of addresses on the web."""

from __future__ import annotations

import csv
import http.client
import io
import itertools
import json
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import torch
from PIL import Image
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from .choices import check_choice
from .data.decoding import BrokenImageError, decode_to_rgb


PredictionFormat = Literal["text", "jsonl", "csv"]

MAX_DOWNLOAD_BYTES = 64 << 20
DOWNLOAD_TIMEOUT = 30.0
_ADDRESS = ("http://", "https://")


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of an image.

    Args:
        image: Path or address.
        classes: The most probable classes and their probabilities, the best first; empty where there is an error.
        error: Why the image could not be read; None if it was.
    """

    image: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def find_images(names: Iterable[str]) -> list[str]:
    """List images: files and addresses as they are given, of a folder everything below it that Pillow can open.

    Raises:
        FileNotFoundError: A name is neither a file, nor a folder with images, nor an address.
    """
    found: list[str] = []
    for name in names:
        if name.startswith(_ADDRESS) or Path(name).is_file():
            found.append(name)
            continue
        kinds = Image.registered_extensions()
        files = sorted(path for path in Path(name).rglob("*") if kinds.get(path.suffix.lower()) in _formats())
        inside = [path for path in files if path.is_file()]
        if not inside:
            what = "a folder without images" if Path(name).is_dir() else "neither a file nor a folder"
            raise FileNotFoundError(
                f"'{name}' is {what}. An image, a folder with images or an address that begins with http:// or "
                "https:// is needed: correct it."
            )
        found += map(str, inside)
    return found


@torch.inference_mode()
def predict_images(
    model: nn.Module, processor: BaseImageProcessor, images: Sequence[str], top_k: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Classify images in batches; an image that cannot be read gets an error and stops none of the others.

    Args:
        model: A classifier, as `hf_vpt.load_image_classifier` returns it.
        processor: Its image processor.
        images: Paths or addresses.
        top_k: Number of classes for each image, at most as many as there are, at least 1.
        batch_size: Images that go through the model at once, at least 1.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}. It must be at least 1: correct it.")
    names = model.config.id2label
    device = next(model.parameters()).device
    for start in range(0, len(images), batch_size):
        read = [_read(image) for image in images[start : start + batch_size]]
        pixels = [
            processor(image, return_tensors="pt")["pixel_values"] for image in read if not isinstance(image, str)
        ]
        # Processors that keep an image's own shape make several shapes, which do not stack.
        by_shape = itertools.groupby(pixels, key=lambda image: image.shape)
        batches = [model(pixel_values=torch.cat(list(group)).to(device)).logits.float() for _, group in by_shape]
        rows = itertools.chain.from_iterable(to_scores(logits, model.config.problem_type) for logits in batches)
        for image, content in zip(images[start : start + batch_size], read, strict=True):
            if isinstance(content, str):
                yield Prediction(image, error=content)
                continue
            values, indices = next(rows).topk(min(top_k, len(names)))
            classes = tuple((names[index], value) for index, value in zip(indices.tolist(), values.tolist()))
            yield Prediction(image, classes)


def to_scores(logits: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """Return the probabilities of classes, as pipelines do.

    Softmax, or, where several classes may be right or there is only one, a sigmoid of each.

    Args:
        logits: `(…, classes)`.
        problem_type: Transformers' word for the kind of classification.
    """
    if problem_type == "multi_label_classification" or logits.shape[-1] == 1:
        return logits.sigmoid()
    return logits.softmax(dim=-1)


def write_predictions(predictions: Iterable[Prediction], stream: TextIO, form: PredictionFormat = "text") -> int:
    """Write predictions as they come, and return the number of images that could not be read.

    Args:
        predictions: What `predict_images` yields.
        stream: Where to write.
        form: `"text"`: a line an image. `"jsonl"`: an object a line. `"csv"`: a row for each image and class.
    """
    check_choice("format", form, PredictionFormat)
    broken = 0
    table = csv.writer(stream)
    if form == "csv":
        table.writerow(["image", "rank", "label", "score", "error"])
    for prediction in predictions:
        broken += prediction.error is not None
        if form == "jsonl":
            classes = [{"label": label, "score": score} for label, score in prediction.classes]
            error = {} if prediction.error is None else {"error": prediction.error}
            stream.write(json.dumps({"image": prediction.image, "predictions": classes, **error}) + "\n")
        elif form == "csv":
            for rank, (label, score) in enumerate(prediction.classes, start=1):
                table.writerow([prediction.image, rank, label, f"{score:.6f}", ""])
            if prediction.error is not None:
                table.writerow([prediction.image, "", "", "", prediction.error])
        else:
            said = ", ".join(f"{label} {score:.1%}" for label, score in prediction.classes) or prediction.error
            # Names of classes come from whoever made the adapter; a console obeys some characters.
            line = "".join(letter if letter.isprintable() else "?" for letter in f"{prediction.image}: {said}")
            stream.write(f"{line}\n")
        stream.flush()
    return broken


def _read(image: str) -> Image.Image | str:
    """The image in RGB, upright; or, where it cannot be read, why."""
    try:
        content = io.BytesIO(_download(image)) if image.startswith(_ADDRESS) else Path(image)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"cannot be fetched ({error})"
    try:
        with Image.open(content, formats=_formats()) as opened:
            opened.load()
            return decode_to_rgb(opened)
    except BrokenImageError as error:
        return f"cannot be read ({error.__cause__})"
    except Exception as error:  # Pillow's readers raise whatever comes to mind
        return f"cannot be read ({error})"


def _formats() -> list[str]:
    """What Pillow can read, but for PostScript, for which it would start another program."""
    Image.init()
    return sorted(Image.OPEN.keys() - {"EPS"})


def _download(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "hf_vpt"})
    with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
        content = response.read(MAX_DOWNLOAD_BYTES + 1)
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"more than {MAX_DOWNLOAD_BYTES >> 20} MiB")
    return content
