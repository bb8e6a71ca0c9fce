"""Requests that no service should serve, each with the status that it should get: for tests, also under load."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection

from PIL import Image

from .images import MAX_SCANS


@dataclass(frozen=True)
class BadRequest:
    """A request and what should come of it.

    Attributes:
        name: What is wrong with it.
        status: Of the answer; None where the client leaves before there is one.
        body: Its bytes.
        path: With `{adapter}` for the name of one.
        method: HTTP method.
        content_type: Header of that name.
        chunked: Whether it says nothing about the body's length before it.
        num_sent: Bytes of the body that are sent; all if left out. Then nothing comes any more.
    """

    name: str
    status: int | None
    body: bytes = b""
    path: str = "/classify/{adapter}"
    method: str = "POST"
    content_type: str = "image/png"
    chunked: bool = False
    num_sent: int | None = None

    def send(self, connection: HTTPConnection, adapter: str) -> tuple[int, bytes] | None:
        """Send it over a fresh connection, and return status and body of the answer; None if there was none."""
        connection.putrequest(self.method, self.path.format(adapter=adapter))
        connection.putheader("Content-Type", self.content_type)
        if self.chunked:
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders(self._pieces(), encode_chunked=True)
        else:
            connection.putheader("Content-Length", str(len(self.body)))
            connection.endheaders(self.body[: self.num_sent])
        if self.status is None:
            connection.close()
            return None
        response = connection.getresponse()
        return response.status, response.read()

    def _pieces(self) -> Iterator[bytes]:
        for start in range(0, len(self.body), 1 << 16):
            yield self.body[start : start + (1 << 16)]


def bad_requests(max_body_bytes: int, slow: bool = True) -> list[BadRequest]:
    """Return one request of every kind.

    Args:
        max_body_bytes: Of the service.
        slow: Whether clients that fall silent are among them; each waits for the service's `body_timeout`.
    """
    noise = Image.effect_noise((64, 48), 80).convert("RGB")
    whole = {kind: encode(noise, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")}
    png, jpeg = whole["PNG"], whole["JPEG"]
    large = bytes(max_body_bytes + 1)
    requests = [
        BadRequest("text that says so", 415, b"not an image", content_type="text/plain"),
        BadRequest("a form", 415, png, content_type="multipart/form-data; boundary=x"),
        BadRequest("what curl says by itself", 415, png, content_type="application/x-www-form-urlencoded"),
        BadRequest("text that says it is an image", 415, b"<html>not found</html>"),
        BadRequest("nothing", 415),
        BadRequest("an image of another format", 415, encode(noise, "PPM")),
        BadRequest("too many bytes", 413, large),
        BadRequest("too many bytes in pieces", 413, large, chunked=True),
        BadRequest("a narrow image", 422, encode(Image.new("L", (20_000, 1)), "PNG")),
        BadRequest("tiles larger than the image", 413, tiled_tiff(64, 64, 32_768, 32_768)),
        BadRequest("a JPEG file of many scans", 422, jpeg_of_scans(MAX_SCANS + 1)),
        BadRequest("bytes that are wrong", 422, png[:200] + bytes(100) + png[300:]),
        BadRequest("an unknown adapter", 404, png, "/classify/unknown"),
        BadRequest("an adapter that is no text", 404, png, "/classify/%00%ff"),
        BadRequest("the bare backbone", 404, png, "/classify/__base__"),
        BadRequest("no adapter", 404, png, "/classify/"),
        BadRequest("another address", 404, png, "/classify/{adapter}/more"),
        BadRequest("another method", 405, png, method="PUT"),
        *(BadRequest(f"top_k={k}", 422, png, "/classify/{adapter}?top_k=" + k) for k in ("0", "-1", "9999999", "all")),
        *(
            BadRequest(f"a {kind} that is cut off", 422, content[: len(content) // 2])
            for kind, content in whole.items()
        ),
        *(BadRequest(f"a {kind} of billions of pixels", 413, content) for kind, content in bombs().items()),
        BadRequest("a client that leaves while it sends", None, png, num_sent=len(png) // 2),
        BadRequest("a client that leaves when it has sent", None, jpeg),
    ]
    if slow:
        requests.append(BadRequest("a client that falls silent", 408, png, num_sent=len(png) // 2))
    return requests


def bombs() -> dict[str, bytes]:
    """Small files whose headers claim as many pixels as their format can."""
    small = Image.new("RGB", (16, 16))
    files = {kind: bytearray(encode(small, kind)) for kind in ("GIF", "BMP", "JPEG")}
    files["GIF"][6:10] = struct.pack("<HH", 65_535, 65_535)
    files["BMP"][18:26] = struct.pack("<ii", 60_000, 60_000)
    frame = files["JPEG"].index(b"\xff\xc0")
    files["JPEG"][frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    animation = io.BytesIO()
    small.save(animation, "WEBP", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")])
    files["WEBP"] = bytearray(animation.getvalue())
    canvas = files["WEBP"].index(b"VP8X") + 12
    files["WEBP"][canvas : canvas + 6] = (16_382).to_bytes(3, "little") * 2
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    pixels = _png_chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
    png = b"\x89PNG\r\n\x1a\n" + header + pixels + _png_chunk(b"IEND", b"")
    return {"PNG": png, "TIFF": tiled_tiff(60_000, 60_000, 64, 64), **{kind: bytes(f) for kind, f in files.items()}}


def tiled_tiff(width: int, height: int, tile_width: int, tile_length: int) -> bytes:
    """A grey TIFF file of one tile, compressed zeros."""
    tile = zlib.compress(bytes(1 << 16))
    directory_size = 2 + 10 * 12 + 4
    # Tag, type (3: 16 bits, 4: 32 bits) and value: 8 bits, Deflate, black is zero, one sample.
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    tags += [(322, 4, tile_width), (323, 4, tile_length), (324, 4, 8 + directory_size), (325, 4, len(tile))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + tile


def jpeg_of_scans(number: int) -> bytes:
    """A progressive JPEG file whose last scan is repeated."""
    content = encode(Image.effect_noise((64, 48), 80), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * (number - content.count(b"\xff\xda")) + content[-2:]


def encode(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
