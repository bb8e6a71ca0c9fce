"""What many adapters on one backbone cost: a batch whose images name their adapters, and switching among them.

    python scripts/benchmark_adapters.py
    python scripts/benchmark_adapters.py --method bpt --num_adapters 8 --batch_size 16 --repeats 15

A batch of images of several adapters, whose heads have different numbers of classes, is timed beside the same batch
with one adapter and beside the backbone without any: ViT-B/16 with random weights, in turn, medians of the ratios in
the same repeat. Switching is timed on the demo backbone.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from hf_vpt import METHODS
from hf_vpt.benchmark.measure import interleaved_seconds
from hf_vpt.classifiers import load_backbone, load_classifier_config


def add_adapters(model: PreTrainedModel, method: str, num_adapters: int, num_virtual_tokens: int) -> PeftModel:
    """Adapters called "0", "1" and so on, with 2, 3 and so on classes."""
    for number in range(num_adapters):
        config = METHODS[method](
            num_virtual_tokens=num_virtual_tokens,
            init_weights=False,
            label_names=[str(label) for label in range(number + 2)],
        )
        if number == 0:
            model = get_peft_model(model, config, adapter_name="0")
        else:
            model.add_adapter(str(number), config)
    return model.eval()


@torch.inference_mode()
def time_mixed_batch(args: argparse.Namespace) -> None:
    model = add_adapters(
        ViTForImageClassification(ViTConfig()), args.method, args.num_adapters, args.num_virtual_tokens
    )
    images = torch.randn(args.batch_size, 3, 224, 224)
    names = [str(row % args.num_adapters) for row in range(args.batch_size)]

    def bare() -> None:
        with model.disable_adapter():
            model(pixel_values=images)

    runs = {
        "no adapter": bare,
        "one adapter": lambda: model(pixel_values=images),
        f"{args.num_adapters} adapters": lambda: model(pixel_values=images, adapter_names=names),
    }
    seconds = interleaved_seconds(runs, args.repeats)
    for name in runs:
        over_one = statistics.median(a / b for a, b in zip(seconds[name], seconds["one adapter"], strict=True))
        print(f"{name}: {statistics.median(seconds[name]):.3f} s, {over_one:.3f} × one adapter")


def time_switching(args: argparse.Namespace) -> None:
    model = load_backbone("demo", load_classifier_config("demo", ["a", "b"]))
    model = add_adapters(model, args.method, args.num_switched, args.num_virtual_tokens)
    seconds = []
    for _ in range(args.repeats):
        for number in range(args.num_switched):
            start = time.perf_counter()
            model.set_adapter(str(number * 7 % args.num_switched))
            seconds.append(time.perf_counter() - start)
    percentile = statistics.quantiles(seconds, n=20)[-1]
    print(
        f"Switching among {args.num_switched} adapters of the demo backbone: {1e3 * statistics.median(seconds):.2f} "
        f"ms, 95 % within {1e3 * percentile:.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", choices=METHODS, default="vpt")
    parser.add_argument("--num_virtual_tokens", type=int, default=50)
    parser.add_argument("--num_adapters", type=int, default=8, help="in a batch")
    parser.add_argument("--num_switched", type=int, default=20, help="switched among")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    print(f"{args.method}, {args.num_virtual_tokens} prompts a block, batch {args.batch_size}")
    time_switching(args)
    time_mixed_batch(args)


if __name__ == "__main__":
    main()
