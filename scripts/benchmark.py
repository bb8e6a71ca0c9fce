"""What prompts cost: forward and backward of ViT-B/16 or Swin-B with and without them, side by side in one run.

    python scripts/benchmark.py --num_virtual_tokens 50 --batch_size 8 --repeats 15
    python scripts/benchmark.py --backbone swin --num_virtual_tokens 50 --batch_size 4

The floor is the same frozen backbone with no prompts, whose CLS token trains (in Swin, which has none, the bias of the
embeddings' norm), so that gradients flow through all blocks. Every repeat runs each variant once, in turn, so that a
slow moment of the machine hits all of them; the table shows medians and what they are times the floor's.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from peft import get_peft_model
from transformers import (
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_vpt import BPTConfig, PROVPTConfig, VAPTConfig, VPTConfig


@dataclass
class BenchmarkArguments:
    """Size of the measurement.

    Args:
        backbone: Which backbone, with random weights.
        num_virtual_tokens: Prompts N in a block.
        batch_size: Images B.
        repeats: Measured runs of each variant, after one that warms up.
        num_threads: Threads of PyTorch.
        attn_implementation: Attention backend of Transformers.
    """

    backbone: Literal["vit", "swin"] = field(default="vit", metadata={"help": "ViT-B/16 or Swin-B."})
    num_virtual_tokens: int = field(default=50, metadata={"help": "Prompts in a block."})
    batch_size: int = field(default=8, metadata={"help": "Images in a batch."})
    repeats: int = field(default=15, metadata={"help": "Measured runs of each variant."})
    num_threads: int = field(default=2, metadata={"help": "Threads of PyTorch."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "Attention backend."})


@dataclass(frozen=True)
class Measured:
    """A backbone to measure.

    Attributes:
        title: What people call it.
        model_cls: Its class.
        config: Its config values.
        trained: The parameter that trains in the floor, of which all blocks are a function.
    """

    title: str
    model_cls: type[PreTrainedModel]
    config: PretrainedConfig
    trained: str


MEASURED = {
    "vit": Measured("ViT-B/16", ViTForImageClassification, ViTConfig(num_labels=100), "vit.embeddings.cls_token"),
    "swin": Measured(
        "Swin-B",
        SwinForImageClassification,
        SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], num_labels=100),
        "swin.embeddings.norm.bias",
    ),
}


def make_variants(args: BenchmarkArguments) -> dict[str, torch.nn.Module]:
    """The models to compare, on one set of random backbone weights."""
    measured = MEASURED[args.backbone]
    config = copy.deepcopy(measured.config)
    config._attn_implementation = args.attn_implementation
    base = measured.model_cls(config).requires_grad_(False)

    def backbone() -> PreTrainedModel:
        # The same tensors in all variants: seven copies of a base model would not fit every machine.
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        return copy.deepcopy(base, memo=shared)

    floor = backbone()
    owner, _, name = measured.trained.rpartition(".")
    trained = torch.nn.Parameter(floor.get_parameter(measured.trained).detach().clone())
    setattr(floor.get_submodule(owner), name, trained)
    n = args.num_virtual_tokens
    # In evaluation mode: prompts turn a frozen backbone's dropout and stochastic depth off as well.
    variants = {"frozen backbone, no prompts": floor.eval()}
    for name, config in {
        "VPT-Deep": VPTConfig(num_virtual_tokens=n),
        "VPT-Deep, concatenated": VPTConfig(num_virtual_tokens=n),
        "VPT-Shallow": VPTConfig(num_virtual_tokens=n, deep=False),
        "VAPT": VAPTConfig(num_virtual_tokens=n),
        "PRO-VPT": PROVPTConfig(num_virtual_tokens=n),
        "BPT-Deep": BPTConfig(num_virtual_tokens=n, rank=n),
    }.items():
        if "concatenated" in name and args.backbone == "swin":
            continue  # tokens on a grid of windows have no place beside them
        variants[name] = get_peft_model(backbone(), config).train()
        if "concatenated" in name:
            variants[name].base_model.set_insertion("tokens")
    return variants


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
    machine = platform.processor() or platform.machine()
    print(f"{MEASURED[args.backbone].title}, {args}, torch {torch.__version__}, {machine}\n")
    print("| forward + backward | seconds (median) | quartiles | × floor |\n|---|---|---|---|")
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"| {name} | {middle:.2f} | {low:.2f} – {high:.2f} | {middle / floor:.2f} |")


if __name__ == "__main__":
    main()
