"""From the bytes of a request to pixel values, with limits that are checked before anything large is decoded."""

from __future__ import annotations

import io

import torch
from PIL import Image, UnidentifiedImageError

from ..data.decoding import BrokenImageError, decode_to_rgb
from ..data.processing import ImageTransform
from .errors import Refusal, shorten


# Formats that are opened, of the many that Pillow knows, and how requests call them.
FORMATS = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
# Types that say nothing about the content are let through: the content itself decides.
CONTENT_TYPES = (*FORMATS.values(), "image/jpg", "image/x-ms-bmp", "image/*", "application/octet-stream")

# Processors that fix the shorter side would make a line of pixels into a picture of billions.
MAX_ASPECT_RATIO = 100
# A progressive JPEG passes over all its pixels once a scan. Files have about ten; one of 10 MiB has room for 100,000.
MAX_SCANS = 100
_START_OF_SCAN = b"\xff\xda"
_TILE_WIDTH, _TILE_LENGTH = 322, 323

_NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"


def check_content_type(content_type: str | None) -> None:
    """Refuse a request that says it is something else than an image of the formats that are opened.

    Raises:
        Refusal: It does, with status 415.
    """
    kind = (content_type or "image/*").partition(";")[0].strip().lower()
    if kind not in CONTENT_TYPES:
        hint = " A form (curl -F) is not read." if kind.startswith("multipart/") else ""
        raise Refusal(
            415,
            "content_type",
            f"The content type is '{shorten(kind)}'.",
            f"The bytes of one image are needed as the body ({_NAMES}).{hint}",
            "Send the file itself with its type: curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg'.",
        )


def read_image(body: bytes, transform: ImageTransform, max_pixels: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Make pixel values `(3, height, width)` from an image file, and tell the width and height of the image, upright.

    Of an animation, the first frame is read. Colours and orientation are those of training, see `decode_to_rgb`.

    Args:
        body: The bytes of the file.
        transform: Of the adapter.
        max_pixels: Width times height at most.

    Raises:
        Refusal: It is no image (status 415), too large (413), or broken (422).
    """
    try:
        image = _open(body, max_pixels)
        image.load()
        image = decode_to_rgb(image)
    except Refusal:
        raise
    except MemoryError as error:
        raise _too_large("The image takes more memory than there is.", max_pixels) from error
    except BrokenImageError as error:  # its text speaks of training
        raise _broken(error.__cause__) from error
    except Exception as error:  # Pillow's readers raise whatever comes to mind
        raise _broken(error) from error
    return transform({"image": [image]})["pixel_values"][0], image.size


def _open(body: bytes, max_pixels: int) -> Image.Image:
    """Reads the header alone: Pillow decodes pixels when they are asked for."""
    try:
        image = Image.open(io.BytesIO(body), formats=list(FORMATS))
    except UnidentifiedImageError as error:
        raise Refusal(
            415,
            "not_image",
            f"The body ({len(body):,} bytes) is no image, or breaks off in its header.",
            f"An image file is needed: {_NAMES}.",
            "Check that the file opens in a viewer, or convert it to one of these formats.",
        ) from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours
        raise _too_large("The image's header claims more pixels than are ever read.", max_pixels) from error
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(f"The image has {width} × {height} = {width * height:,} pixels.", max_pixels)
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise Refusal(
            422,
            "shape",
            f"The image has {width} × {height} pixels.",
            f"The longer side may be at most {MAX_ASPECT_RATIO} times the shorter one.",
            "Cut the image.",
        )
    if image.format == "TIFF":
        tile = [image.tag_v2.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH)]
        # A whole tile is decoded, whatever the size of the image it is part of.
        if not all(isinstance(side, int) for side in tile) or tile[0] * tile[1] > max_pixels:
            raise _too_large(f"The image is stored in tiles of {tile[0]} × {tile[1]} pixels.", max_pixels)
    # MPO is what Pillow calls a JPEG file with more than one picture in it.
    if image.format in ("JPEG", "MPO") and (scans := body.count(_START_OF_SCAN)) > MAX_SCANS:
        raise Refusal(
            422,
            "scans",
            f"The JPEG file has {scans:,} scans.",
            f"At most {MAX_SCANS} are read, and files from cameras and editors have about ten.",
            "Save the image anew.",
        )
    return image


def _too_large(found: str, max_pixels: int) -> Refusal:
    needed = f"At most {max_pixels:,} pixels are read."
    return Refusal(413, "pixels", found, needed, "Send a smaller image: the model sees a few hundred pixels a side.")


def _broken(error: BaseException | None) -> Refusal:
    reason = str(error).rstrip(".") if isinstance(error, (OSError, SyntaxError, ValueError, EOFError)) else ""
    if not reason or "0x" in reason or "/" in reason:  # an object's address, a path: nothing for clients
        reason = "its data are damaged"
    return Refusal(
        422,
        "broken",
        f"The image cannot be read: {shorten(reason)}.",
        "A whole image file is needed.",
        "Check that the file opens in a viewer, and send it again.",
    )
