"""The web service: right answers in any batch, refusals that say why, and a service that goes on after each."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import uvicorn
from conftest import BACKBONES
from fastapi.openapi.models import OpenAPI
from peft import get_peft_model
from PIL import Image, ImageFile
from transformers import ViTImageProcessor

from hf_vpt import VPTConfig
from hf_vpt.serving import (
    Batcher,
    Classifier,
    LoadArguments,
    LoadTest,
    ServingArguments,
    create_app,
    parse_serving,
)
from hf_vpt.serving.bad_requests import bad_requests, bombs, encode
from hf_vpt.serving.errors import Refusal


ROOT = Path(__file__).parent.parent
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = os.environ | {"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1"}
ARGS = {"max_body_bytes": 100_000, "body_timeout": 0.5}
PROCESSORS = {
    "cats": ViTImageProcessor(size={"height": 32, "width": 48}),
    "birds": ViTImageProcessor(size={"height": 32, "width": 48}, image_mean=[0.1, 0.2, 0.3]),
}
LABELS = {"cats": ["lynx", "lion", "puma", "tiger", "ocelot"], "birds": ["0", "1", "2"]}


def make_model():
    """Adapters for five and for three classes, which the second one does not name, with random heads."""
    torch.manual_seed(0)
    configs = [VPTConfig(num_virtual_tokens=2, init_weights=False, label_names=names) for names in LABELS.values()]
    model = get_peft_model(BACKBONES["vit"].build(), configs[0], adapter_name="cats")
    model.add_adapter("birds", configs[1])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    configs[1].label_names = None
    return model


def make_classifier(sources=None):
    return Classifier(make_model(), PROCESSORS, sources)


@pytest.fixture(scope="module")
def classifier():
    return make_classifier()


@pytest.fixture(scope="module")
def photos():
    """Images of many sizes, so different that batches cannot be mixed up unnoticed."""
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (2, 3, 3), generator=generator, dtype=torch.uint8) for _ in range(12)]
    return [Image.fromarray(p.numpy()).resize((20 + 7 * i, 90 - 5 * i)) for i, p in enumerate(pixels)]


@pytest.fixture(scope="module")
def expected(classifier, photos):
    """The softmax of the model with one active adapter, for one image at a time."""
    model = copy.deepcopy(classifier.model)

    @torch.no_grad()
    def expected(adapter, number):
        model.set_adapter(adapter)
        inputs = PROCESSORS[adapter](photos[number], return_tensors="pt")
        return dict(zip(LABELS[adapter], model(**inputs).logits[0].softmax(-1).tolist()))

    return expected


class Server:
    """A service in a thread of this process, asked over the loopback interface."""

    def __init__(self, classifier, **args):
        self.app = create_app(classifier, ServingArguments(**(ARGS | args)))
        config = uvicorn.Config(
            self.app, port=0, http="h11", ws="none", log_level="error", timeout_graceful_shutdown=20
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def connect(self):
        return contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=20))

    def ask(self, method, path, body=None, **headers):
        with self.connect() as connection:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.headers["Content-Type"] == "application/json"
            return SimpleNamespace(
                status=response.status, headers=response.headers, text=text, json=json.loads(text) if is_json else None
            )

    def classify(self, adapter, image, top_k=None):
        return self.ask("POST", f"/classify/{adapter}{f'?top_k={top_k}' if top_k else ''}", encode(image, "PNG"))

    def metric(self, name):
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.ask("GET", "/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def assert_serves(self, photos, expected):
        assert self.ask("GET", "/health").json == {"status": "ok"}
        assert_answer(self.classify("cats", photos[0]), expected("cats", 0))


class Gated:
    """A classifier that notes its batches and does not answer before its gate is open."""

    def __init__(self, classifier, is_open=False):
        self.classifier, self.adapters = classifier, classifier.adapters
        self.batches, self.gate = [], threading.Event()
        if is_open:
            self.gate.set()

    def scores(self, adapters, images):
        self.batches.append(list(adapters))
        assert self.gate.wait(20)
        return self.classifier.scores(adapters, images)


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def assert_answer(answer, scores):
    assert answer.status == 200, answer.text
    found = {prediction["label"]: prediction["score"] for prediction in answer.json["predictions"]}
    assert found == pytest.approx(scores, abs=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def assert_refusal(answer, status):
    assert answer.status == status, answer.text
    assert answer.json.keys() == {"error"} and answer.json["error"].keys() == {"found", "needed", "do"}
    assert all(text.endswith(".") for text in answer.json["error"].values())


@pytest.fixture(scope="module")
def server(classifier):
    with Server(classifier) as server:
        yield server


# --- answers


def test_answers_are_the_models_own_whatever_batch_an_image_came_in_with(classifier, photos, expected):
    asked = [(adapter, number) for number in range(len(photos)) for adapter in PROCESSORS]
    gated = Gated(classifier)
    with Server(gated, max_batch_size=7) as server, ThreadPoolExecutor(len(asked)) as clients:
        answers = list(clients.map(lambda a: clients.submit(server.classify, a[0], photos[a[1]]), asked))
        wait_until(lambda: server.metric("hf_vpt_queue_length") == len(asked) - sum(map(len, gated.batches)) > 0)
        gated.gate.set()
        for (adapter, number), answer in zip(asked, answers, strict=True):
            assert_answer(answer.result(), expected(adapter, number))
            width, height = photos[number].size
            assert answer.result().json["image"] == {"width": width, "height": height}
            assert answer.result().json["adapter"] == adapter
    assert sum(map(len, gated.batches)) == len(asked)
    assert any(len(batch) == 7 for batch in gated.batches)


def test_concurrent_requests_for_different_adapters_share_a_batch(classifier, photos):
    gated = Gated(classifier)
    with Server(gated) as server, ThreadPoolExecutor(7) as clients:
        clients.submit(server.classify, "cats", photos[0])
        wait_until(lambda: gated.batches)
        rest = [clients.submit(server.classify, name, photos[1]) for name in ("cats", "birds") * 3]
        wait_until(lambda: server.metric("hf_vpt_queue_length") == 6)
        gated.gate.set()
        assert {answer.result().status for answer in rest} == {200}
        assert server.metric('hf_vpt_batch_adapters_bucket{le="1.0"}') == 1
        assert server.metric("hf_vpt_batch_adapters_count") == 2
    assert [sorted(batch) for batch in gated.batches] == [["cats"], ["birds"] * 3 + ["cats"] * 3]


def test_the_likeliest_classes_come_first_and_top_k_says_how_many(server, photos, expected):
    scores = expected("cats", 3)
    best = sorted(scores, key=scores.get, reverse=True)
    answer = server.classify("cats", photos[3], top_k=2)
    assert [prediction["label"] for prediction in answer.json["predictions"]] == best[:2]
    assert answer.json["milliseconds"] > 0
    for adapter, number in (("cats", 5), ("birds", 3)):  # five, or all if there are fewer
        whole = server.ask("POST", f"/classify/{adapter}", encode(photos[3], "PNG"))
        assert len(whole.json["predictions"]) == number
    assert_refusal(server.classify("birds", photos[3], top_k=4), 422)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("content_type", [None, "image/{}", "IMAGE/{}; q=1", "application/octet-stream"])
def test_every_format_is_read_whatever_fitting_type_it_comes_with(server, kind, content_type):
    headers = {"Content_Type": content_type.format(kind.lower())} if content_type else {}
    answer = server.ask("POST", "/classify/birds", encode(Image.new("RGB", (30, 20), "red"), kind), **headers)
    assert answer.status == 200, answer.text
    assert answer.json["image"] == {"width": 30, "height": 20}


def test_the_first_frame_of_an_animation_is_classified_and_cameras_notes_are_followed(server, photos, expected):
    others = [photo.resize(photos[0].size) for photo in photos[1:4]]
    for kind in ("WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encode(photos[0], kind, save_all=True, append_images=others, **options)
        assert_answer(server.ask("POST", "/classify/cats", content), expected("cats", 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = photos[0].transpose(Image.Transpose.ROTATE_90)
    assert_answer(server.ask("POST", "/classify/cats", encode(turned, "PNG", exif=exif)), expected("cats", 0))


def test_adapters_are_described_without_telling_where_they_lie(photos, tmp_path):
    folder = tmp_path / "felines"
    folder.mkdir()
    with Server(make_classifier({"cats": str(folder), "birds": "user/birds"})) as server:
        adapters = {adapter.pop("name"): adapter for adapter in server.ask("GET", "/adapters").json["adapters"]}
    cats = {"method": "vpt", "source": "felines", "num_classes": 5, "labels": LABELS["cats"]}
    birds = {"method": "vpt", "source": "user/birds", "num_classes": 3, "labels": ["0", "1", "2"]}
    assert adapters == {"cats": cats, "birds": birds}


# --- refusals


@pytest.mark.parametrize("request_", bad_requests(ARGS["max_body_bytes"]), ids=lambda request: request.name)
def test_a_bad_request_is_refused_in_three_parts_and_the_service_goes_on(server, photos, expected, request_):
    with server.connect() as connection:
        found = request_.send(connection, "cats")
    if request_.status is None:
        assert found is None
    else:
        status, text = found
        assert_refusal(SimpleNamespace(status=status, json=json.loads(text), text=text), request_.status)
        assert not re.search(rb"Traceback|\.py|0x|/root|/home|/tmp|PIL|BytesIO|Training", text)
    server.assert_serves(photos, expected)


@pytest.mark.parametrize("kind", bombs())
def test_images_that_claim_too_many_pixels_are_refused_before_they_are_decoded(server, monkeypatch, kind):
    def decode(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    answer = server.ask("POST", "/classify/cats", bombs()[kind])
    assert_refusal(answer, 413)
    assert "pixels" in answer.json["error"]["found"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_number_of_pixels_may_be_the_limit_and_no_more(classifier, kind):
    with Server(classifier, max_pixels=600) as server:
        assert server.ask("POST", "/classify/cats", encode(Image.new("RGB", (30, 20)), kind)).status == 200
        answer = server.ask("POST", "/classify/cats", encode(Image.new("RGB", (30, 21)), kind))
    assert_refusal(answer, 413)
    assert answer.json["error"]["found"] == "The image has 30 × 21 = 630 pixels."


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_have_as_many_bytes_as_the_limit_and_no_more(server, chunked):
    limit = ARGS["max_body_bytes"]
    content = encode(Image.new("RGB", (30, 20)), "JPEG")
    for size, status in ((limit, 200), (limit + 1, 413), (50 * limit, 413)):
        body = content + bytes(size - len(content))
        pieces = (body[start : start + 1000] for start in range(0, len(body), 1000))
        answer = server.ask("POST", "/classify/cats", pieces if chunked else body)
        assert answer.status == status, answer.text


def test_an_unknown_adapter_is_answered_with_the_known_ones(server, photos):
    answer = server.classify("dogs", photos[0])
    assert_refusal(answer, 404)
    assert answer.json["error"]["needed"] == "One of these is needed: cats, birds."


def test_too_many_images_in_work_are_refused_with_the_time_to_come_back(classifier, photos, expected):
    gated = Gated(classifier)
    with Server(gated, max_queue=3, max_batch_size=1) as server, ThreadPoolExecutor(3) as clients:
        taken = [clients.submit(server.classify, "cats", photos[0]) for _ in range(3)]
        wait_until(lambda: server.metric("hf_vpt_queue_length") == 2)
        answer = server.classify("cats", photos[0])
        assert_refusal(answer, 429)
        assert answer.headers["Retry-After"] == "1"
        gated.gate.set()
        assert [answer.result().status for answer in taken] == [200] * 3
        server.assert_serves(photos, expected)
        assert server.metric('hf_vpt_refused_total{reason="busy"}') == 1


def test_a_client_that_falls_silent_holds_its_place_no_longer_than_the_timeout(classifier, photos, expected):
    with Server(classifier, max_queue=1) as server, socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.sendall(b"POST /classify/cats HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        wait_until(lambda: server.classify("cats", photos[0]).status == 429)
        wait_until(lambda: server.classify("cats", photos[0]).status == 200)
        silent.settimeout(10)
        assert silent.recv(1000).startswith(b"HTTP/1.1 408 ")
        server.assert_serves(photos, expected)


def test_what_is_no_http_is_no_matter(server, photos, expected):
    for noise in (
        b"\x16\x03\x01\x02\x00\x01" * 20,
        b"GET\r\n\r\n",
        b"POST /classify/cats HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(noise)
            client.settimeout(10)
            assert client.recv(1000).startswith(b"HTTP/1.1 400 ")
    server.assert_serves(photos, expected)


# --- trouble


def test_an_image_on_which_the_model_fails_does_not_spoil_its_batch(classifier, photos, expected):
    class Failing(Gated):
        def scores(self, adapters, images):
            scores = super().scores(adapters, images)
            if any(len(set(image.flatten().tolist())) == 1 for image in images):
                raise RuntimeError("a secret of the machine")
            return scores

    failing = Failing(classifier)
    grey = Image.new("RGB", (30, 20), "gray")
    with Server(failing) as server, ThreadPoolExecutor(5) as clients:
        first = clients.submit(server.classify, "cats", photos[0])
        wait_until(lambda: failing.batches)
        good = [clients.submit(server.classify, "cats", photos[number]) for number in (1, 2)]
        bad = clients.submit(server.classify, "cats", grey)
        wait_until(lambda: server.metric("hf_vpt_queue_length") == 3)
        failing.gate.set()
        assert_refusal(bad.result(), 500)
        assert "secret" not in bad.result().text
        for number, answer in enumerate([first, *good]):
            assert_answer(answer.result(), expected("cats", number))
        assert server.metric("hf_vpt_failed_batches_total") == 2  # the whole batch, and the image alone
        server.assert_serves(photos, expected)
    assert list(map(len, failing.batches)) == [1, 3, 1, 1, 1, 1]


def test_a_client_that_goes_away_is_dropped_from_the_queue(classifier, photos, expected):
    gated = Gated(classifier)
    body = encode(photos[1], "PNG")
    with Server(gated) as server, ThreadPoolExecutor(1) as clients:
        first = clients.submit(server.classify, "cats", photos[0])
        wait_until(lambda: gated.batches)
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            head = f"POST /classify/birds HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            wait_until(lambda: server.metric("hf_vpt_queue_length") == 1)
        wait_until(lambda: server.metric('hf_vpt_refused_total{reason="gone"}') == 1)
        gated.gate.set()
        assert_answer(first.result(), expected("cats", 0))
        server.assert_serves(photos, expected)
        assert server.metric('hf_vpt_requests_total{route="/classify/{adapter}",status="499"}') == 1
    assert gated.batches == [["cats"], ["cats"]]


def test_requests_in_work_are_answered_before_the_service_ends(classifier, photos, expected):
    gated = Gated(classifier)
    with Server(gated, max_batch_size=2) as server, ThreadPoolExecutor(5) as clients:
        answers = [clients.submit(server.classify, "birds", photos[number]) for number in range(5)]
        wait_until(lambda: server.metric("hf_vpt_queue_length") >= 3)
        server.server.should_exit = True
        time.sleep(0.3)
        gated.gate.set()
        for number, answer in enumerate(answers):
            assert_answer(answer.result(), expected("birds", number))


def test_requests_that_would_hold_up_the_end_are_told_so(classifier, photos):
    gated = Gated(classifier)
    with Server(gated) as server, ThreadPoolExecutor(2) as clients:
        server.server.config.timeout_graceful_shutdown = 1
        answers = [clients.submit(server.classify, "birds", photos[number]) for number in range(2)]
        wait_until(lambda: gated.batches)
        server.server.should_exit = True
        for answer in answers:
            assert_refusal(answer.result(), 503)
        gated.gate.set()


def test_an_error_of_our_own_is_answered_without_its_text(classifier, photos, expected, monkeypatch):
    with Server(classifier) as server:
        monkeypatch.setattr("hf_vpt.serving.service.read_image", lambda *args: 1 / 0)
        answer = server.classify("cats", photos[0])
        assert_refusal(answer, 500)
        assert "division" not in answer.text
        monkeypatch.undo()
        server.assert_serves(photos, expected)


def test_metrics_count_answers_images_batches_and_refusals(classifier, photos):
    with Server(classifier, max_wait_ms=0) as server:
        for number in range(3):
            server.classify("cats", photos[number])
        server.classify("dogs", photos[0])
        server.ask("POST", "/classify/cats", b"nothing")
        server.ask("GET", "/somewhere")
        server.ask("GET", "/else/where")
        route = 'route="/classify/{adapter}"'
        assert server.metric(f'hf_vpt_requests_total{{{route},status="200"}}') == 3
        assert server.metric(f'hf_vpt_requests_total{{{route},status="404"}}') == 1
        assert server.metric(f'hf_vpt_requests_total{{{route},status="415"}}') == 1
        assert server.metric('hf_vpt_requests_total{route="other",status="404"}') == 2
        assert server.metric(f"hf_vpt_request_seconds_count{{{route}}}") == 5
        assert server.metric('hf_vpt_images_total{adapter="cats"}') == 3
        assert server.metric("hf_vpt_batch_size_count") == server.metric("hf_vpt_batch_size_sum") == 3
        assert server.metric("hf_vpt_queue_length") == 0
        reasons = {"adapter": 1, "not_image": 1, "route": 2, "broken": 0}
        assert {r: server.metric(f'hf_vpt_refused_total{{reason="{r}"}}') for r in reasons} == reasons


def test_the_openapi_page_describes_the_body_and_every_refusal(server):
    schema = server.ask("GET", "/openapi.json").json
    OpenAPI.model_validate(schema)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema)))
    assert references <= schema["components"]["schemas"].keys()
    classify = schema["paths"]["/classify/{adapter}"]["post"]
    assert {"image/jpeg", "image/tiff"} <= classify["requestBody"]["content"].keys()
    assert classify["responses"].keys() == {"200", "404", "408", "413", "415", "422", "429", "500", "503"}
    for status, answer in classify["responses"].items():
        name = "Classification" if status == "200" else "ErrorAnswer"
        assert answer["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
    assert server.ask("GET", "/docs").status == 200


# --- batches


def batches_of(arrivals, max_batch_size=4, max_wait_ms=10.0, fails=lambda images: False):
    """Batches that images given as (adapter, width) are run in if they arrive while the model is busy."""
    batches, gate = [], threading.Event()

    def run(adapters, images):
        gate.wait(20)
        batches.append([(adapter, image.shape[-1]) for adapter, image in zip(adapters, images)])
        if fails(batches[-1]):
            raise RuntimeError("failed")
        return [image.sum() for image in images]

    async def main():
        batcher = Batcher(run, max_batch_size, max_wait_ms)
        batcher.start()
        first = asyncio.create_task(batcher.classify("first", torch.zeros(1)))
        await asyncio.sleep(0.05)
        tasks = [asyncio.create_task(batcher.classify(name, torch.ones(3, 1, width))) for name, width in arrivals]
        await asyncio.sleep(0.05)
        gate.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert batcher.is_alive
        await batcher.stop()
        return results

    results = asyncio.run(main())
    return batches[1:], results[1:]


def test_a_batch_holds_images_of_one_shape_and_the_oldest_image_goes_first():
    arrivals = [("a", 2), ("b", 3), ("a", 3), ("b", 2), ("a", 3)]
    batches, results = batches_of(arrivals)
    assert batches == [[("a", 2), ("b", 2)], [("b", 3), ("a", 3), ("a", 3)]]
    assert [int(result) for result in results] == [3 * width for _, width in arrivals]


def test_a_batch_is_no_larger_than_its_limit():
    batches, _ = batches_of([("a", 2)] * 10)
    assert [len(batch) for batch in batches] == [4, 4, 2]


def test_images_of_a_failed_batch_are_tried_alone():
    batches, results = batches_of([("a", 2), ("bad", 2), ("b", 2)], fails=lambda batch: ("bad", 2) in batch)
    assert [len(batch) for batch in batches] == [3, 1, 1, 1]
    assert [isinstance(result, Refusal) for result in results] == [False, True, False]
    assert results[1].status == 500 and isinstance(results[1].__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("number", "max_wait_ms", "others", "low", "high"),
    [(1, 200.0, True, 0.19, 5.0), (4, 60_000.0, True, 0.0, 5.0), (1, 60_000.0, False, 0.0, 5.0)],
    ids=["until its time is up", "until the batch is full", "not at all if it is alone"],
)
def test_an_image_waits_for_others_on_their_way(number, max_wait_ms, others, low, high):
    async def main():
        batcher = Batcher(lambda adapters, images: images, 4, max_wait_ms)
        batcher.start()
        start = time.monotonic()
        with batcher.on_its_way() if others else contextlib.nullcontext():
            await asyncio.gather(*(batcher.classify("a", torch.ones(3)) for _ in range(number)))
        seconds = time.monotonic() - start
        await batcher.stop()
        return seconds

    assert low <= asyncio.run(main()) < high


def test_an_image_waits_no_longer_when_the_last_one_on_its_way_is_there_or_refused():
    async def main():
        batcher = Batcher(lambda adapters, images: [torch.tensor(len(images))] * len(images), 4, max_wait_ms=60_000)
        batcher.start()
        with contextlib.suppress(Refusal), batcher.on_its_way():
            tasks = [asyncio.create_task(batcher.classify("a", torch.ones(3))) for _ in range(2)]
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in tasks)
            raise Refusal(422, "broken", "", "", "")
        sizes = await asyncio.wait_for(asyncio.gather(*tasks), 5)
        await batcher.stop()
        return sizes

    assert asyncio.run(main()) == [2, 2]


def test_the_end_answers_what_waits_and_takes_nothing_more():
    async def main():
        batcher = Batcher(lambda adapters, images: images, 4, max_wait_ms=60_000)
        batcher.start()
        with batcher.on_its_way():
            tasks = [asyncio.create_task(batcher.classify("a", torch.full((3,), float(n)))) for n in range(3)]
            await asyncio.sleep(0)
            await batcher.stop()
        with pytest.raises(Refusal, match="shutting down") as refusal:
            await batcher.classify("a", torch.ones(3))
        assert refusal.value.status == 503 and not batcher.is_alive
        return [int((await task)[0]) for task in tasks]

    assert asyncio.run(main()) == [0, 1, 2]


# --- start


def test_adapters_have_the_names_that_the_command_line_gives_them():
    args, adapters = parse_serving(
        ["flowers=user/vapt-flowers", "outputs/vapt/digits", "--port", "81", "--host", "::"]
    )
    assert adapters == {"flowers": "user/vapt-flowers", "digits": "outputs/vapt/digits"}
    assert (args.port, args.host, args.max_body_bytes) == (81, "::", 10 * 2**20)
    for words, message in (
        (["a=x", "a=y"], "'a=y', and a before that"),
        (["user/repo.v2"], "'user/repo.v2'. Each needs a name"),
        (["a="], "'a='. Each needs a name"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_serving(words)


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 65536), ("max_batch_size", 0), ("max_wait_ms", -1), ("max_queue", 0), ("max_pixels", 10**9)]
    + [("num_threads", 0), ("body_timeout", 0), ("body_timeout", float("nan")), ("dtype", "int8")],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        ServingArguments(**{name: value})


def test_names_of_classes_that_are_no_text_are_served_all_the_same(photos):
    model = make_model()
    model.peft_config["birds"].label_names = ["\ud800", "emu", "rhea"]
    with Server(Classifier(model, PROCESSORS)) as server:
        labels = {prediction["label"] for prediction in server.classify("birds", photos[0]).json["predictions"]}
    assert labels == {"?", "emu", "rhea"}


def test_an_adapter_that_cannot_classify_is_found_at_the_start(classifier):
    without_crop = ViTImageProcessor(size={"shortest_edge": 32})
    with pytest.raises(ValueError, match="Adapter 'cats' failed on a trial image"):
        Classifier(classifier.model, {"cats": without_crop})


def save_adapters(folder):
    """The adapters of a model in folders, as training leaves them, and their backbone."""
    model, backbone = make_model(), folder / "backbone"
    model.peft_config["birds"].label_names = ["kiwi", "emu", "rhea"]
    base = BACKBONES["vit"].build()
    base.save_pretrained(backbone)
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(backbone)
    model.save_pretrained(folder)
    for name, processor in PROCESSORS.items():
        processor.save_pretrained(folder / name)
    return [f"cats={folder / 'cats'}", str(folder / "birds")]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The service as the command line starts it, in a process of its own, and what it was started with."""
    words = save_adapters(tmp_path_factory.mktemp("adapters"))
    server = Server.__new__(Server)
    with socket.create_server(("127.0.0.1", 0)) as free:
        server.port = free.getsockname()[1]
    command = [sys.executable, "scripts/serve.py", *words, f"--port={server.port}", "--body_timeout=5"]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT) as process:
        try:
            wait_until(lambda: process.poll() is not None or is_open(server.port), 180)
            assert process.poll() is None, "it ended by itself"
            yield SimpleNamespace(server=server, words=words, process=process)
        finally:
            process.terminate()
    assert process.returncode == 0 or process.returncode == -signal.SIGTERM


def is_open(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_the_script_serves_saved_adapters_with_heads_of_their_own(script, photos, expected):
    adapters = script.server.ask("GET", "/adapters").json["adapters"]
    assert [(a["name"], a["source"], a["num_classes"]) for a in adapters] == [
        ("cats", "cats", 5),
        ("birds", "birds", 3),
    ]
    assert_answer(script.server.classify("cats", photos[2]), expected("cats", 2))
    birds = dict(zip(["kiwi", "emu", "rhea"], expected("birds", 2).values()))
    assert_answer(script.server.classify("birds", photos[2]), birds)


@pytest.mark.slow
def test_the_load_test_ends_with_status_0_against_the_script(script):
    options = [f"--port={script.server.port}", "--seconds=1", "--connections=3", "--num_bad=50"]
    command = [sys.executable, "scripts/load_test.py", *script.words, *options]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| images/s |" in done.stdout


# --- under load


def test_the_load_test_finds_nothing_wrong_with_a_service_that_works(classifier):
    with Server(classifier, max_body_bytes=10**6) as server:
        args = LoadArguments(port=server.port, seconds=1.5, connections=3, num_bad=50, max_body_bytes=10**6)
        report = LoadTest(classifier, args).run()
    assert report.problems == []
    assert report.good[200] == len(report.latencies) > 0 and report.bad.total() == 50
    assert report.to_markdown().count("|\n") >= 2


def test_the_load_test_finds_wrong_answers_and_missing_ones(classifier):
    wrong = Gated(classifier, is_open=True)
    wrong.scores = lambda adapters, images: [row / 2 for row in classifier.scores(adapters, images)]
    with Server(wrong, max_body_bytes=10**6) as server:
        args = LoadArguments(port=server.port, seconds=0.5, connections=1, num_bad=0)
        report = LoadTest(classifier, args).run()
    assert len(report.problems) == report.good[200] > 0 and "a wrong answer" in report.problems[0]
    failing = Gated(classifier)
    failing.scores = lambda adapters, images: 1 / 0
    with Server(failing, max_body_bytes=10**6) as server:
        args = LoadArguments(port=server.port, seconds=0.5, connections=1, num_bad=0)
        report = LoadTest(classifier, args).run()
    assert len(report.problems) == report.good[500] > 0
