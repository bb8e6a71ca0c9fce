"""Send good and bad requests to a running service, and check that each gets the one answer that it should get.

    python scripts/serve.py outputs/vapt/digits --body_timeout 2
    python scripts/load_test.py outputs/vapt/digits --seconds 30 --connections 8 --num_bad 200

The same adapters again, because the right answers come from a model of its own, which sees each image alone. Ends with
status 1 if an answer was a 5xx, wrong, or missing.
"""

import sys

import torch

from hf_vpt.serving import LoadArguments, LoadTest, ServingArguments, load_classifier, parse_serving


def main() -> None:
    args, adapters = parse_serving(settings=LoadArguments)
    torch.set_num_threads(1)  # the service needs the processor
    report = LoadTest(load_classifier(adapters, ServingArguments()), args).run()
    print(report.to_markdown())
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()
