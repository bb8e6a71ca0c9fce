"""Good and bad requests over many connections at once, and whether each got the answer that it should get."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException

import numpy as np
from PIL import Image

from .bad_requests import BadRequest, bad_requests, encode
from .classifier import Classifier
from .images import FORMATS, read_image


_COUNTS = re.compile(r'hf_vpt_requests_total\{route="([^"]*)",status="(\d+)"\} (\S+)')


@dataclass
class LoadArguments:
    """How many requests of which kind are sent, and where to.

    Args:
        host: Where the service listens.
        port: Where it listens.
        seconds: Time in which good requests are sent without a pause.
        connections: Clients that send good requests, each the next one when it has the answer to the last.
        num_bad: Bad requests in that time, of all kinds in turn.
        max_body_bytes: Of the service.
        timeout: Seconds without an answer after which a request counts as lost.
        seed: Of the images and their order.

    Raises:
        ValueError: A number is too small.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "Where the service listens."})
    port: int = field(default=8000, metadata={"help": "Where the service listens."})
    seconds: float = field(default=30.0, metadata={"help": "Time of sustained good requests."})
    connections: int = field(default=8, metadata={"help": "Clients that send good requests."})
    num_bad: int = field(default=200, metadata={"help": "Bad requests in that time."})
    max_body_bytes: int = field(default=10 * 2**20, metadata={"help": "Of the service."})
    timeout: float = field(default=60.0, metadata={"help": "Seconds after which a request counts as lost."})
    seed: int = field(default=0, metadata={"help": "Of the images and their order."})

    def __post_init__(self):
        for name, least in {"seconds": 0.1, "connections": 1, "num_bad": 0, "timeout": 1}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}. It must be at least {least}: correct it.")


@dataclass
class LoadReport:
    """What came of it.

    Attributes:
        seconds: From the first good request to the last answer to one.
        good: Answers to good requests, by status.
        bad: Answers to bad requests, by status; None where the client left.
        latencies: Seconds of each good request that was served.
        problems: What should not have happened.
    """

    seconds: float = 0.0
    good: Counter = field(default_factory=Counter)
    bad: Counter = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_markdown(self) -> str:
        p50, p95, p99 = 1000 * np.percentile(self.latencies or [float("nan")], [50, 95, 99])
        lines = [
            "| images/s | p50 ms | p95 ms | p99 ms | served | bad requests | 5xx, lost or wrong |",
            "|---|---|---|---|---|---|---|",
            f"| {len(self.latencies) / self.seconds:.0f} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {self.good[200]:,} "
            f"| {self.bad.total()} | {len(self.problems)} |",
            "",
            f"Good requests by status: {dict(self.good)}. Bad ones: {dict(self.bad)} (None: the client left).",
            *self.problems[:20],
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Good:
    adapter: str
    content_type: str
    body: bytes
    scores: Mapping[str, float]

    def problem(self, answer: Mapping) -> str | None:
        """Scores may differ by what a batch does to rounding, and so may the order of classes that are as good."""
        (best,) = answer["predictions"]
        expected = self.scores[best["label"]]
        is_right = abs(expected - best["score"]) < 0.01 and max(self.scores.values()) - expected < 0.01
        return None if is_right and answer["adapter"] == self.adapter else f"{self.adapter}: a wrong answer, {answer}"


class LoadTest:
    """Asks a service that runs elsewhere, and knows the right answers from a model of its own.

    Args:
        classifier: The same adapters as the service's.
        args: How much of it.
    """

    def __init__(self, classifier: Classifier, args: LoadArguments):
        self.args = args
        self.report = LoadReport()
        self.lock = threading.Lock()
        self.adapters = list(classifier.adapters)
        self.good = [_good(classifier, name, *image) for image in _draw(args.seed) for name in self.adapters]

    def run(self) -> LoadReport:
        """Send everything, and wait for the answers."""
        args, report = self.args, self.report
        kinds = bad_requests(args.max_body_bytes)
        before = self._counts()
        start = time.perf_counter()
        with ThreadPoolExecutor(args.connections) as clients, ThreadPoolExecutor(32) as bad_clients:
            for number in range(args.connections):
                clients.submit(self._guarded, self._send_good, number, start + args.seconds)
            for number, request in zip(range(args.num_bad), itertools.cycle(kinds)):
                time.sleep(max(0.0, start + number * args.seconds / args.num_bad - time.perf_counter()))
                bad_clients.submit(self._guarded, self._send_bad, request, self.adapters[number % len(self.adapters)])
        self._compare_counts(before)
        return report

    def _guarded(self, send, *args) -> None:
        try:
            send(*args)
        except Exception as error:
            self._problem(f"the client failed: {error!r}")

    def _problem(self, text: str) -> None:
        with self.lock:
            self.report.problems.append(text)

    def _connect(self) -> HTTPConnection:
        return HTTPConnection(self.args.host, self.args.port, timeout=self.args.timeout)

    def _send_good(self, number: int, until: float) -> None:
        choose, connection = random.Random(f"{self.args.seed} {number}"), self._connect()
        while (start := time.perf_counter()) < until:
            good = choose.choice(self.good)
            try:
                path, headers = f"/classify/{good.adapter}?top_k=1", {"Content-Type": good.content_type}
                connection.request("POST", path, good.body, headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, HTTPException, ValueError) as error:
                self._problem(f"{good.adapter}: a lost request, {error!r}")
                connection.close()
                continue
            end = time.perf_counter()
            problem = good.problem(answer) if response.status == 200 else None
            if response.status not in (200, 429):
                problem = f"{good.adapter}: status {response.status}, {answer}"
            with self.lock:
                self.report.good[response.status] += 1
                self.report.seconds = max(self.report.seconds, end - until + self.args.seconds)
                if response.status == 200:
                    self.report.latencies.append(end - start)
            if problem:
                self._problem(problem)
            if response.status == 429:
                time.sleep(0.1)
        connection.close()

    def _send_bad(self, request: BadRequest, adapter: str) -> None:
        connection = self._connect()
        try:
            answer = request.send(connection, adapter)
            status = answer[0] if answer else None
            # Every refusal says why, in three parts.
            if answer is not None and set(json.loads(answer[1])["error"]) != {"found", "needed", "do"}:
                self._problem(f"{request.name}: {answer[1]!r}")
        except (OSError, HTTPException, ValueError, KeyError) as error:
            self._problem(f"{request.name}: a lost request, {error!r}")
            return
        finally:
            connection.close()
        with self.lock:
            self.report.bad[status] += 1
        if status not in (request.status, 429):
            self._problem(f"{request.name}: status {status} instead of {request.status}, {answer}")

    def _counts(self) -> Counter:
        """How many answers the service has counted, by status."""
        connection, counts = self._connect(), Counter()
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        for route, status, count in _COUNTS.findall(text):
            if route != "/metrics":
                counts[int(status)] += int(float(count))
        return counts

    def _compare_counts(self, before: Counter) -> None:
        """One answer to each request: the service counts as many as came, and one for each client that left."""
        received = self.report.good + self.report.bad
        num_left = received.pop(None, 0)
        for _ in range(50):
            counted = self._counts() - before
            if counted.total() == received.total() + num_left:
                break
            time.sleep(0.1)  # it notices a moment later that a client has left
        # Where it did not notice in time, the answer was sent to nobody.
        if counted.total() != received.total() + num_left or received - counted:
            self._problem(f"the service counts {dict(counted)}, received were {dict(received)} and {num_left} left")


def _draw(seed: int) -> list[tuple[str, bytes]]:
    """Smooth random images of all formats and many sizes: content type and bytes."""
    generator, images = np.random.default_rng(seed), []
    for kind, content_type in FORMATS.items():
        for _ in range(4):
            coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            image = coarse.resize(tuple(generator.integers(16, 400, 2).tolist()), Image.Resampling.BICUBIC)
            images.append((content_type, encode(image, kind)))
    return images


def _good(classifier: Classifier, name: str, content_type: str, body: bytes) -> _Good:
    adapter = classifier.adapters[name]
    pixel_values, _ = read_image(body, adapter.transform, max_pixels=10**6)
    (scores,) = classifier.scores([name], [pixel_values])
    return _Good(name, content_type, body, dict(zip(adapter.label_names, scores.tolist())))
