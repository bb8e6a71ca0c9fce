"""What Prometheus can ask about the service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import stopping


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters of one application; two in one process do not share them.

    Args:
        queue_length: Tells how many images wait for the model.
    """

    def __init__(self, queue_length: Callable[[], int]):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("hf_vpt_requests", "Answers, by route and HTTP status.", ["route", "status"], **own)
        self.seconds = Histogram(
            "hf_vpt_request_seconds", "Seconds from request to answer.", ["route"], buckets=_SECONDS, **own
        )
        self.images = Counter("hf_vpt_images", "Classified images, by adapter.", ["adapter"], **own)
        self.refused = Counter("hf_vpt_refused", "Requests that were not served, by reason.", ["reason"], **own)
        self.batch_size = Histogram(
            "hf_vpt_batch_size", "Images in one forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **own
        )
        self.batch_adapters = Histogram(
            "hf_vpt_batch_adapters", "Adapters in one forward pass.", buckets=(1, 2, 4, 8, 16, 32), **own
        )
        self.failed_batches = Counter("hf_vpt_failed_batches", "Forward passes that ended with an error.", **own)
        waiting = Gauge("hf_vpt_queue_length", "Images that wait for the model.", **own)
        waiting.set_function(queue_length)

    def to_text(self) -> bytes:
        return generate_latest(self.registry)


class Observer:
    """Counts every answer and the time that it took.

    Args:
        app: The application inside.
        metrics: Where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:  # the server has waited long enough for its end
            if status is not None:
                raise
            await stopping().to_response()(scope, receive, watched)
        finally:
            # Routes that do not exist have no name of their own: clients could invent any number of them.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status or 500).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
