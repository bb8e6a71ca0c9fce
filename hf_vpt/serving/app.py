"""The service's routes, and what they refuse."""

from __future__ import annotations

import time
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .answers import AdapterDescription, AdapterList, Classification, Health, ImageSize, Prediction
from .arguments import ServingArguments
from .classifier import Classifier
from .errors import ErrorAnswer, Refusal, shorten, stopping
from .images import FORMATS, check_content_type
from .metrics import Metrics, Observer
from .service import Service, unless_gone


_DEFAULT_TOP_K = 5
# Nobody reads the answer to a client that has gone away; in the metrics it has the number that nginx gives it.
_CLIENT_GONE = 499
_REFUSALS = {
    404: "No such adapter.",
    408: "The body did not arrive in time.",
    413: "The body has too many bytes, or the image too many pixels.",
    415: "The content type or the body is not that of an image.",
    422: "The image is broken or too long and narrow, or `top_k` is out of range.",
    429: "Too many images are in work.",
    500: "The model failed.",
    503: "The service is shutting down.",
}


def create_app(classifier: Classifier, args: ServingArguments | None = None) -> FastAPI:
    """Make the web application, for any ASGI server.

    Args:
        classifier: Model and adapters.
        args: Limits; where to listen is the server's business.

    Example:
        >>> app = create_app(load_classifier({"digits": "outputs/vapt/digits"}, ServingArguments()))
    """
    args = args or ServingArguments()
    service = Service(classifier, args)
    metrics = service.batcher.metrics
    app = FastAPI(
        title="hf_vpt",
        description="Image classification with one frozen backbone and a prompt-tuning adapter for each task. "
        "Every answer with a status of 400 or more is `{error: {found, needed, do}}`.",
        lifespan=service.running,
        redirect_slashes=False,
    )
    app.state.service = service
    app.add_middleware(Observer, metrics=metrics)
    _answer_errors_alike(app, metrics)

    body = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS.values()}
    body_help = f"The bytes of one image file, at most {args.max_body_bytes:,}, and {args.max_pixels:,} pixels."

    @app.post(
        "/classify/{adapter}",
        response_model=Classification,
        responses={status: {"model": ErrorAnswer, "description": text} for status, text in _REFUSALS.items()},
        openapi_extra={"requestBody": {"required": True, "description": body_help, "content": body}},
    )
    async def classify(
        request: Request,
        adapter: str,
        top_k: Annotated[int | None, Query(ge=1, description="Number of classes; 5, or all if fewer.")] = None,
    ):
        """Tell the likeliest classes of an image."""
        start = time.perf_counter()
        served = service.adapter(adapter)
        labels = served.label_names
        if top_k is not None and top_k > len(labels):
            raise _bad_parameter(f"top_k is {top_k}.", f"Adapter '{adapter}' has {len(labels)} classes.")
        check_content_type(request.headers.get("Content-Type"))
        try:
            with service.room():
                image = await service.read_body(request)
                scores, (width, height) = await unless_gone(request, service.scores(served, image))
        except ClientDisconnect:
            metrics.refused.labels("gone").inc()
            return Response(status_code=_CLIENT_GONE)
        best = scores.topk(top_k or min(_DEFAULT_TOP_K, len(labels)))
        return Classification(
            adapter=adapter,
            predictions=[
                Prediction(label=labels[index], score=score)
                for score, index in zip(best.values.tolist(), best.indices.tolist())
            ],
            image=ImageSize(width=width, height=height),
            milliseconds=round(1000 * (time.perf_counter() - start), 3),
        )

    @app.get("/adapters")
    async def adapters() -> AdapterList:
        """Describe the adapters."""
        return AdapterList(
            adapters=[
                AdapterDescription(
                    name=adapter.name,
                    method=adapter.method,
                    source=adapter.source,
                    num_classes=len(adapter.label_names),
                    labels=adapter.label_names,
                )
                for adapter in classifier.adapters.values()
            ]
        )

    @app.get("/health", responses={503: {"model": ErrorAnswer, "description": _REFUSALS[503]}})
    async def health() -> Health:
        """Tell whether images get answers."""
        if not service.batcher.is_alive:
            raise stopping()
        return Health(status="ok")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus():
        """Counters for Prometheus."""
        return Response(metrics.to_text(), media_type=CONTENT_TYPE_LATEST)

    return app


def serve(classifier: Classifier, args: ServingArguments) -> None:
    """Answer requests until the process is told to stop; those that are in work get their answers first.

    Args:
        classifier: Model and adapters.
        args: Where to listen, and the limits.
    """
    uvicorn.run(
        create_app(classifier, args),
        host=args.host,
        port=args.port,
        access_log=False,  # the metrics count requests
        server_header=False,
        http="h11",  # whatever else is installed: how it ends connections is what the tests know
        ws="none",
        # Slower bodies have been refused by then.
        timeout_graceful_shutdown=int(args.body_timeout) + 10,
    )


def _answer_errors_alike(app: FastAPI, metrics: Metrics) -> None:
    routes = "POST /classify/{adapter}, GET /adapters, /health, /metrics and /docs"

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        metrics.refused.labels(refusal.reason).inc()
        return refusal.to_response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        found = f"There is no {shorten(request.method)} {shorten(request.url.path)}."
        needed, do = f"The service has {routes}.", "Correct the address."
        return await refuse(request, Refusal(error.status_code, "route", found, needed, do, error.headers))

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        found = f"{first['loc'][-1]} is '{shorten(str(first.get('input')))}'."
        return await refuse(request, _bad_parameter(found, f"{first['msg']}."))

    @app.exception_handler(Exception)
    async def our_fault(request: Request, error: Exception) -> Response:
        found = "The service failed."
        needed = "Nothing is known to be wrong with the request."
        do = "Ask again; if it happens again, tell those who run the service: its log has the error."
        return await refuse(request, Refusal(500, "service", found, needed, do))


def _bad_parameter(found: str, needed: str) -> Refusal:
    return Refusal(422, "parameter", found, needed, "Correct the parameter, or leave it out.")
