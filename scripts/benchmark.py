"""What prompts cost: forward and backward of ViT-B/16 with and without them, side by side in one run.

    python scripts/benchmark.py --num_virtual_tokens 50 --batch_size 8 --repeats 15

The floor is the same frozen backbone with no prompts, whose CLS token trains, so that gradients flow through all
blocks. Every repeat runs each variant once, in turn, so that a slow moment of the machine hits all of them; the table
shows medians and what they are times the floor's.
"""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification

from hf_vpt import BPTConfig, PROVPTConfig, VAPTConfig, VPTConfig


@dataclass
class BenchmarkArguments:
    """Size of the measurement.

    Args:
        num_virtual_tokens: Prompts N in a block.
        batch_size: Images B.
        repeats: Measured runs of each variant, after one that warms up.
        num_threads: Threads of PyTorch.
        attn_implementation: Attention backend of Transformers.
    """

    num_virtual_tokens: int = field(default=50, metadata={"help": "Prompts in a block."})
    batch_size: int = field(default=8, metadata={"help": "Images in a batch."})
    repeats: int = field(default=15, metadata={"help": "Measured runs of each variant."})
    num_threads: int = field(default=2, metadata={"help": "Threads of PyTorch."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "Attention backend."})


def make_variants(args: BenchmarkArguments) -> dict[str, torch.nn.Module]:
    """The models to compare, on one set of random backbone weights."""
    base = ViTForImageClassification(ViTConfig(num_labels=100, attn_implementation=args.attn_implementation))
    weights = base.state_dict()

    def backbone() -> ViTForImageClassification:
        with torch.device("meta"):
            model = ViTForImageClassification(base.config)
        # The same tensors in all variants: seven copies of ViT-B would not fit every machine.
        model.load_state_dict(weights, assign=True)
        return model

    floor = backbone().requires_grad_(False)
    floor.vit.embeddings.cls_token = torch.nn.Parameter(floor.vit.embeddings.cls_token.detach().clone())
    n = args.num_virtual_tokens
    variants = {"frozen backbone, no prompts": floor}
    for name, config in {
        "VPT-Deep": VPTConfig(num_virtual_tokens=n),
        "VPT-Deep, concatenated": VPTConfig(num_virtual_tokens=n),
        "VPT-Shallow": VPTConfig(num_virtual_tokens=n, deep=False),
        "VAPT": VAPTConfig(num_virtual_tokens=n),
        "PRO-VPT": PROVPTConfig(num_virtual_tokens=n),
        "BPT-Deep": BPTConfig(num_virtual_tokens=n, rank=n),
    }.items():
        variants[name] = get_peft_model(backbone(), config)
        if "concatenated" in name:
            variants[name].base_model.set_insertion("tokens")
    return {name: model.train() for name, model in variants.items()}


def seconds(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Time of one forward and backward pass."""
    model.zero_grad()
    start = time.perf_counter()
    model(pixel_values=images, labels=labels).loss.backward()
    return time.perf_counter() - start


def main() -> None:
    args = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()[0]
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(0)
    variants = make_variants(args)
    images, labels = torch.randn(args.batch_size, 3, 224, 224), torch.randint(100, (args.batch_size,))
    times = {name: [] for name in variants}
    for repeat in range(args.repeats + 1):
        for name, model in variants.items():
            elapsed = seconds(model, images, labels)
            if repeat:
                times[name].append(elapsed)
    floor = statistics.median(times["frozen backbone, no prompts"])
    print(f"ViT-B/16, {args}, torch {torch.__version__}, {platform.processor() or platform.machine()}\n")
    print("| forward + backward | seconds (median) | quartiles | × floor |\n|---|---|---|---|")
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"| {name} | {middle:.2f} | {low:.2f} – {high:.2f} | {middle / floor:.2f} |")


if __name__ == "__main__":
    main()
