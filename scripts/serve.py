"""Classify images over HTTP: one frozen backbone, an adapter for each task, requests for all of them in one batch.

The adapter that `make demo` writes:

    python scripts/serve.py outputs/vapt/digits
    curl --data-binary @digit.png -H "Content-Type: image/png" "http://127.0.0.1:8000/classify/digits?top_k=3"

Several, from folders and from the Hub, each by a name of its own:

    python scripts/serve.py flowers=user/vapt-flowers digits=outputs/vapt/digits --port 8000 --max_batch_size 32

docs/serving.md says what is answered and what is refused. The service knows neither passwords nor TLS.
"""

from hf_vpt.serving import load_classifier, parse_serving, serve


def main() -> None:
    args, adapters = parse_serving()
    serve(load_classifier(adapters, args), args)


if __name__ == "__main__":
    main()
