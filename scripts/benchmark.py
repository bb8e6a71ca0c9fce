"""What prompts cost: methods, concatenation and baselines on ViT or Swin, random weights, side by side in one run.

    python scripts/benchmark.py --num_virtual_tokens 5 10 50 100 200 --modes training inference --count true
    python scripts/benchmark.py --backbone swin --num_virtual_tokens 50 --batch_size 4
    python scripts/benchmark.py --device cuda --dtype bfloat16 --batch_size 64 256 --compile true

The floor is the same frozen backbone with no prompts, whose CLS token trains (in Swin, which has none, the bias of the
embeddings' norm), so that gradients flow through all blocks. Every repeat runs each variant once, in turn, so that a
slow moment of the machine hits all of them; the tables show medians and what they are times the floor's. `--folder`
takes the tables, every number as JSON, and plots of cost against prompts and images.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from transformers import HfArgumentParser

from hf_vpt.benchmark import BENCHMARK_BACKBONES, BenchmarkArguments, run_benchmark, to_markdown


@dataclass
class OutputArguments:
    """Where results go, besides the console."""

    folder: str | None = field(default=None, metadata={"help": "Folder for Markdown, JSON and plots."})


def main() -> None:
    args, output = HfArgumentParser((BenchmarkArguments, OutputArguments)).parse_args_into_dataclasses()
    torch.set_num_threads(args.num_threads)
    results = run_benchmark(args, report=lambda line: print(line, file=sys.stderr))
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    text = (
        f"{BENCHMARK_BACKBONES[args.backbone].title}, {args.image_size} pixels, {args.dtype}, "
        f"{args.attn_implementation}, {machine}, {args.num_threads} threads, {versions}; medians of {args.repeats}\n\n"
        f"    python {shlex.join(sys.argv)}\n\n{to_markdown(results)}"
    )
    print(text)
    if output.folder is None:
        return
    folder = Path(output.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.md").write_text(text, encoding="utf-8")
    record = {"arguments": asdict(args), "machine": machine, "results": [r.to_dict() for r in results]}
    (folder / "benchmark.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    from hf_vpt.plots import plot_cost

    for over in ("num_virtual_tokens", "batch_size"):
        if len(getattr(args, over)) > 1:
            plot_cost(results, over, folder / f"cost_over_{over}.png")


if __name__ == "__main__":
    main()
