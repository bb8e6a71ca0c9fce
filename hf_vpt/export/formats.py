"""The files: ONNX for onnxruntime and others, `torch.export` for PyTorch alone."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from .description import describe
from .recording import check_exportable, record


# Beyond this, PyTorch's exporter puts the weights into a second file: one of ONNX ends at 2 GiB.
LARGEST_ONNX = 1.5 * 2**30


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example: torch.Tensor,
    *,
    processor: BaseImageProcessor | None = None,
    verify: bool = True,
    tolerance: float = 1e-4,
    **options: Any,
) -> Path:
    """Write a classifier to one ONNX file that takes any number of images and knows the names of its classes.

    The input is `pixel_values` `(B, 3, height, width)`, the output `logits` `(B, classes)`, both float32. Prompts that
    are the same for every image stand in the file as constant keys and values (`bake()`), others with what makes them
    from the image. What is exported is a copy in evaluation mode: the model itself stays as it is.

    Args:
        model: A classifier: a `PeftModel` with the adapters that are active, a baked or a plain model.
        path: File to write. It appears, in the place of one that was there, when all has gone well.
        example: Pixel values `(B, 3, height, width)`. The file takes images of this height and width.
        processor: The image processor, for the file's metadata. `preprocessing` holds, under the names of
            `preprocessor_config.json`, what is to be done: `size`, `resample` (a number of Pillow's) and `crop_size`
            where images are resized and their centre is cut out, and always `rescale_factor`, `image_mean` and
            `image_std`. `class_names` stand there in any case. Both are JSON.
        verify: Run the file with onnxruntime and compare it with the model, on the example and on one and on three
            images of noise.
        tolerance: Largest difference of a logit.
        options: More arguments of the model's `forward`, such as `interpolate_pos_encoding=True`.

    Returns:
        The path.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: The model takes more than an image, gives no logits, is quantised or too large for one file, or
            the processor makes images of another size than the example's.
        RuntimeError: The file computes something else than the model.

    Example:
        >>> export_onnx(model, "classifier.onnx", torch.randn(2, 3, 224, 224), processor=processor)
        >>> session = onnxruntime.InferenceSession("classifier.onnx")
        >>> (logits,) = session.run(None, {"pixel_values": pixel_values.numpy()})
    """
    onnxruntime = _import_onnxruntime()
    size = 4 * sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    if size > LARGEST_ONNX:
        raise ValueError(
            f"Found a model of {size / 1e9:.1f} GB in float32. One ONNX file holds up to {LARGEST_ONNX / 1e9:.1f} GB. "
            "Use `export_program`, or a smaller backbone."
        )
    check_exportable(model)
    about = describe(model, example, processor)
    recording = record(model, example, options)
    with _draft_of(path) as draft:
        with _quietly():
            made = torch.onnx.export(
                recording.program,
                dynamo=True,
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes={"pixel_values": {0: "batch"}},  # a name instead of a number
                verbose=False,
            )
        made.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
        made.save(draft)
        if verify:
            quiet = onnxruntime.SessionOptions()
            quiet.log_severity_level = 3
            session = onnxruntime.InferenceSession(draft, quiet, providers=["CPUExecutionProvider"])

            def run(images: torch.Tensor) -> torch.Tensor:
                return torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])

            recording.check(run, tolerance)
    return Path(path)


def export_program(
    model: nn.Module,
    path: str | Path,
    example: torch.Tensor,
    *,
    processor: BaseImageProcessor | None = None,
    verify: bool = True,
    tolerance: float = 1e-4,
    **options: Any,
) -> Path:
    """Write a classifier to a file of `torch.export` (`.pt2`), which PyTorch runs without Transformers and PEFT.

    Arguments, metadata and errors are those of `export_onnx`, except that no package and no size is too much. The
    metadata are extra files of the program.

    Example:
        >>> export_program(model, "classifier.pt2", torch.randn(2, 3, 224, 224), processor=processor)
        >>> about = {"class_names": "", "preprocessing": ""}
        >>> logits = torch.export.load("classifier.pt2", extra_files=about).module()(pixel_values)
        >>> names = json.loads(about["class_names"])
    """
    check_exportable(model)
    about = describe(model, example, processor)
    recording = record(model, example, options)
    with _draft_of(path) as draft:
        extra_files = {name: json.dumps(value) for name, value in about.items()}
        torch.export.save(recording.program, draft, extra_files=extra_files)
        if verify:
            recording.check(torch.export.load(draft).module(), tolerance)
    return Path(path)


@contextlib.contextmanager
def _draft_of(path: str | Path) -> Iterator[Path]:
    """A file in a folder beside another one, which takes its place at the end and is gone after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.draft-", dir=path.parent) as folder:
        draft = Path(folder, path.name)
        yield draft
        os.replace(draft, path)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps the exporter from thinking aloud."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _import_onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401, which the exporter needs, as it does the last one
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Found no {error.name}. Export to ONNX needs onnx, onnxscript and onnxruntime. Install them with "
            '`pip install "hf_vpt[onnx]"`, or use `export_program`.'
        ) from error
    return onnxruntime
