"""Settings of the web service, and which adapters it has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal, TypeVar

from PIL import Image
from transformers import HfArgumentParser

from ..choices import check_choice


# Beyond twice this constant, Pillow refuses an image itself.
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class ServingArguments:
    """Where the service listens, how it makes batches, and what it refuses.

    Args:
        host: Address to listen on. The default is reached from this machine alone: the service knows neither
            passwords nor TLS, so put a proxy before it that does.
        port: Port to listen on; 0 lets the system choose one.
        max_batch_size: Images in one forward pass at most, at least 1.
        max_wait_ms: Milliseconds that an image waits at most for others that are being decoded, before the model runs
            without them. One that is alone does not wait.
        max_queue: Images in work at most: being received, decoded, waiting, or in the model. Further requests are
            told to come back later. Times `max_body_bytes` it bounds the memory that requests take.
        max_body_bytes: Size of a request's body at most, in bytes.
        max_pixels: Width times height of an image at most, at most Pillow's own limit of 178,956,970. A decoder
            thread takes up to about 10 bytes a pixel.
        body_timeout: Seconds that a client has to send its body.
        num_decoders: Threads that decode images.
        base_model: Folder or Hub id of the backbone. Default: the one that the first adapter names.
        device: `"cpu"`, `"cuda"` or another device of PyTorch.
        dtype: Number format of the frozen backbone.
        attn_implementation: Attention kernel, such as `"sdpa"` or `"eager"`. Default: the backbone's own choice.
        num_threads: Threads of PyTorch on a CPU. Default: PyTorch's own choice.

    Raises:
        ValueError: A setting is out of range.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 for any."})
    max_batch_size: int = field(default=16, metadata={"help": "Images in one forward pass."})
    max_wait_ms: float = field(default=5.0, metadata={"help": "Milliseconds that an image waits for others."})
    max_queue: int = field(default=64, metadata={"help": "Images in work at once."})
    max_body_bytes: int = field(default=10 * 2**20, metadata={"help": "Size of a body."})
    max_pixels: int = field(default=50_000_000, metadata={"help": "Width times height of an image."})
    body_timeout: float = field(default=30.0, metadata={"help": "Seconds that a client has to send its body."})
    num_decoders: int = field(default=2, metadata={"help": "Threads that decode images."})
    base_model: str | None = field(default=None, metadata={"help": "Backbone, if the adapters do not name it."})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda or another device."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Number format of the frozen backbone."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention kernel."})
    num_threads: int | None = field(default=None, metadata={"help": "Threads of PyTorch."})

    def __post_init__(self):
        check_choice("dtype", self.dtype, ["float32", "bfloat16", "float16"])
        least = {
            "port": 0,
            "max_wait_ms": 0,
            "max_batch_size": 1,
            "max_queue": 1,
            "max_body_bytes": 1,
            "max_pixels": 1,
        }
        most = {"port": 65535, "max_pixels": MOST_PIXELS or float("inf")}
        for name, low in {**least, "num_decoders": 1, "num_threads": 1, "body_timeout": 0.001}.items():
            value, high = getattr(self, name), most.get(name, float("inf"))
            if value is not None and not low <= value <= high:
                limit = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
                raise ValueError(f"{name} is {value}. It must be {limit}: correct it, or leave it out.")


Settings = TypeVar("Settings")


def parse_serving(
    argv: Sequence[str] | None = None, settings: type[Settings] = ServingArguments
) -> tuple[Settings, dict[str, str]]:
    """Read settings and adapters from the command line: `flowers=user/vapt-flowers outputs/vapt/digits --port 8000`.

    Args:
        argv: Words of the command line. Default: those of this process.
        settings: Dataclass whose fields are the options.

    Returns:
        The settings, and the folder or Hub id of each adapter by its name.

    Raises:
        ValueError: A setting is out of range, or an adapter has no name of its own.
    """
    parser = HfArgumentParser(settings, allow_abbrev=False)
    parser.add_argument("adapters", nargs="+", metavar="NAME=ADAPTER", help="Folder or Hub id of each adapter.")
    args, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return args, read_adapters(rest.adapters)


def read_adapters(words: Sequence[str]) -> dict[str, str]:
    """Read `name=adapter`, or `adapter` alone, which is then called by the last part of its path.

    Raises:
        ValueError: A name stands there twice, or cannot be one.
    """
    adapters: dict[str, str] = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not equals:
            name, source = PurePath(word).name, word
        if not _NAME.fullmatch(name) or not source or name in adapters:
            before = f", and {name} before that" if name in adapters else ""
            raise ValueError(
                f"Found the adapter '{word}'{before}. Each needs a name of its own of letters, digits, - and _: write "
                "name=folder, or name=user/repository."
            )
        adapters[name] = source
    return adapters
