"""From the body of a request to the scores of its image."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import torch
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect

from .arguments import ServingArguments
from .classifier import Classifier, ServedAdapter
from .engine import Batcher
from .errors import Refusal, shorten
from .images import read_image


class Service:
    """What requests share: the model, the threads, and the count of images in work.

    Args:
        classifier: Model and adapters.
        args: Limits.
    """

    def __init__(self, classifier: Classifier, args: ServingArguments):
        self.classifier = classifier
        self.args = args
        self.batcher = Batcher(classifier.scores, args.max_batch_size, args.max_wait_ms)
        self.num_in_work = 0

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """The time between the start and the end of the application."""
        self.decoders = ThreadPoolExecutor(self.args.num_decoders, thread_name_prefix="decoder")
        self.batcher.start()
        yield
        await self.batcher.stop()
        self.decoders.shutdown(cancel_futures=True)

    def adapter(self, name: str) -> ServedAdapter:
        try:
            return self.classifier.adapters[name]
        except KeyError:
            known = ", ".join(self.classifier.adapters)
            raise Refusal(
                404,
                "adapter",
                f"There is no adapter '{shorten(name)}'.",
                f"One of these is needed: {known}.",
                "Correct the address; GET /adapters describes them.",
            ) from None

    @contextmanager
    def room(self) -> Iterator[None]:
        """A place among the images in work.

        Raises:
            Refusal: All are taken.
        """
        if self.num_in_work >= self.args.max_queue:
            raise Refusal(
                429,
                "busy",
                f"{self.num_in_work} images are in work.",
                f"Fewer than {self.args.max_queue} are needed for another one.",
                "Ask again in a second.",
                {"Retry-After": "1"},
            )
        self.num_in_work += 1
        try:
            yield
        finally:
            self.num_in_work -= 1

    async def read_body(self, request: Request) -> bytes:
        """Return the body of a request.

        Raises:
            Refusal: It has too many bytes, or arrives too slowly.
            ClientDisconnect: The client has gone away.
        """
        limit = self.args.max_body_bytes
        declared = request.headers.get("Content-Length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise _body_too_large(f"The body has {int(declared):,} bytes.", limit)
        try:
            return await asyncio.wait_for(_read(request, limit), self.args.body_timeout)
        except asyncio.TimeoutError:
            raise Refusal(
                408,
                "slow",
                f"The body had not arrived after {self.args.body_timeout:g} seconds.",
                "All of it is needed by then.",
                "Send it again, or a smaller image.",
                {"Connection": "close"},
            ) from None

    async def scores(self, adapter: ServedAdapter, body: bytes) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the score of each class, and the width and height of the image.

        Raises:
            Refusal: The body is no image that is read, or the model fails.
        """
        loop = asyncio.get_running_loop()
        how = (adapter.transform, self.args.max_pixels)
        with self.batcher.on_its_way():
            pixel_values, size = await loop.run_in_executor(self.decoders, read_image, body, *how)
        return await self.batcher.classify(adapter.name, pixel_values), size


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Wait for a result, but no longer than there is a client; then the work is cancelled.

    Raises:
        ClientDisconnect: The client has gone away.
    """
    tasks = result, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _body_too_large(f"The body has more than {limit:,} bytes.", limit)
    return bytes(body)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _body_too_large(found: str, limit: int) -> Refusal:
    return Refusal(413, "body", found, f"At most {limit:,} are read.", "Send a smaller file.")
