"""Images of many requests go through the model together, whichever adapters they are for."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers.utils import logging

from .errors import Refusal, stopping
from .metrics import Metrics


logger = logging.get_logger(__name__)


@dataclass(eq=False)
class _Waiting:
    """An image, the adapter it is for, the time at which it has waited long enough, and where its scores go."""

    adapter: str
    image: torch.Tensor
    deadline: float
    answer: asyncio.Future[torch.Tensor]

    @property
    def shape(self) -> torch.Size:
        return self.image.shape


class Batcher:
    """Collects images that arrive at about the same time, and runs the model on them in one thread.

    A batch holds images of one shape. It starts when it is full, when no other image is on its way, or when its
    oldest image has waited long enough; while one runs, images for the next ones gather. If a batch fails, each of its
    images is tried alone.

    Args:
        run: From the adapters' names and the images of a batch to the scores of each. Called in a thread of its own,
            never twice at once.
        max_batch_size: Images B of a batch at most.
        max_wait_ms: Milliseconds that an image waits at most for others on their way, while the model has nothing to
            do.
    """

    def __init__(
        self,
        run: Callable[[Sequence[str], Sequence[torch.Tensor]], Sequence[torch.Tensor]],
        max_batch_size: int,
        max_wait_ms: float,
    ):
        self.run = run
        self.max_batch_size = max_batch_size
        self.max_wait = max_wait_ms / 1000
        self.metrics = Metrics(lambda: len(self._queue))
        self._queue: list[_Waiting] = []
        self._num_on_their_way = 0
        self._stopping = False
        self._worker: asyncio.Task | None = None

    @property
    def is_alive(self) -> bool:
        """Whether images that are handed in get an answer."""
        return self._worker is not None and not self._worker.done() and not self._stopping

    def start(self) -> None:
        """Begin to work, in the event loop that runs."""
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Answer what waits, and take nothing more."""
        self._stopping = True
        self._changed.set()
        await self._worker
        self._thread.shutdown()

    @contextlib.contextmanager
    def on_its_way(self) -> Iterator[None]:
        """The time in which an image is made ready: for this one, others wait."""
        self._num_on_their_way += 1
        try:
            yield
        finally:
            self._num_on_their_way -= 1
            self._changed.set()

    async def classify(self, adapter: str, image: torch.Tensor) -> torch.Tensor:
        """Return the scores of an image; if the one who waits for them is cancelled, the image leaves the queue.

        Args:
            adapter: Name of the adapter.
            image: Pixel values `(3, height, width)`.

        Raises:
            Refusal: The model fails on this image (status 500), or the service is shutting down (503).
        """
        if not self.is_alive:
            raise stopping()
        loop = asyncio.get_running_loop()
        waiting = _Waiting(adapter, image, loop.time() + self.max_wait, loop.create_future())
        self._queue.append(waiting)
        self._changed.set()
        return await waiting.answer

    async def _work(self) -> None:
        while batch := await self._next_batch():
            await self._answer(batch)

    async def _next_batch(self) -> list[_Waiting]:
        """Waits for a batch to be due; an empty one means the end."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            # Those whose clients have gone away are cancelled.
            self._queue = [waiting for waiting in self._queue if not waiting.answer.done()]
            if not self._queue and self._stopping:
                return []
            if batch := self._due(loop.time()):
                self._queue = [waiting for waiting in self._queue if waiting not in batch]
                return batch
            timeout = self._queue[0].deadline - loop.time() if self._queue else None
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout)

    def _due(self, now: float) -> list[_Waiting]:
        if not self._queue:
            return []
        oldest = self._queue[0]
        shape, size = Counter(waiting.shape for waiting in self._queue).most_common(1)[0]
        if self._stopping or not self._num_on_their_way or now >= oldest.deadline:
            shape = oldest.shape  # the oldest goes first, so that no shape waits for ever
        elif size < self.max_batch_size:
            return []
        return [waiting for waiting in self._queue if waiting.shape == shape][: self.max_batch_size]

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        adapters, images = [waiting.adapter for waiting in batch], [waiting.image for waiting in batch]
        try:
            scores = await asyncio.get_running_loop().run_in_executor(self._thread, self.run, adapters, images)
        except Exception as error:
            self.metrics.failed_batches.inc()
            logger.exception(f"A batch of {len(batch)} images failed.")
            if len(batch) == 1:
                _finish(batch[0], _model_failed(error))
                return
            for waiting in batch:
                if not waiting.answer.done():
                    await self._answer([waiting])
            return
        self.metrics.batch_size.observe(len(batch))
        self.metrics.batch_adapters.observe(len(set(adapters)))
        for waiting, result in zip(batch, scores, strict=True):
            self.metrics.images.labels(waiting.adapter).inc()
            _finish(waiting, result)


def _finish(waiting: _Waiting, result: torch.Tensor | Refusal) -> None:
    if waiting.answer.done():  # cancelled while the batch ran
        return
    if isinstance(result, Refusal):
        waiting.answer.set_exception(result)
    else:
        waiting.answer.set_result(result)


def _model_failed(error: Exception) -> Refusal:
    refusal = Refusal(
        500,
        "model",
        "The model failed on this image.",
        "Nothing is known to be wrong with the request.",
        "Ask again; if it happens again, tell those who run the service: its log has the error.",
    )
    refusal.__cause__ = error
    return refusal
