"""What prompts cost: methods, concatenation and baselines on ViT or Swin, random weights, side by side in one run.

    python scripts/benchmark.py --num_virtual_tokens 5 10 50 100 200 --modes training inference --count true
    python scripts/benchmark.py --backbone swin --num_virtual_tokens 50 --batch_size 4
    python scripts/benchmark.py --device cuda --dtype bfloat16 --batch_size 64 256 --compile true
    python scripts/benchmark.py --modes inference --num_adapters 1 2 4 8
    accelerate launch --config_file configs/accelerate/cpu_two_processes.yaml scripts/benchmark.py --num_threads 1

The floor is the same frozen backbone with no prompts, whose CLS token trains (in Swin, which has none, the bias of the
embeddings' norm), so that gradients flow through all blocks. Every repeat runs each variant once, in turn, so that a
slow moment of the machine hits all of them; the tables show medians: of seconds, and of how many times the floor's in
the same repeat they are. `--folder` takes the tables, every number as JSON, and plots of cost against prompts, images
and adapters.
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
from accelerate import PartialState
from transformers import HfArgumentParser

from hf_vpt.benchmark import BENCHMARK_BACKBONES, BenchmarkArguments, run_benchmark, to_markdown


@dataclass
class OutputArguments:
    """Where results go, besides the console."""

    folder: str | None = field(default=None, metadata={"help": "Folder for Markdown, JSON and plots."})


def main() -> None:
    args, output = HfArgumentParser((BenchmarkArguments, OutputArguments)).parse_args_into_dataclasses()
    processes = PartialState(cpu=args.device == "cpu")
    torch.set_num_threads(args.num_threads)
    results = run_benchmark(args, report=lambda line: processes.is_main_process and print(line, file=sys.stderr))
    if not processes.is_main_process:
        return
    machine = torch.cuda.get_device_name() if args.device == "cuda" else _cpu_name()
    threads = f"{processes.num_processes} × {args.num_threads} threads"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    text = (
        f"{BENCHMARK_BACKBONES[args.backbone].title}, {args.image_size} pixels, {args.dtype}, "
        f"{args.attn_implementation}, {machine}, {threads}, {versions}; "
        f"medians of {args.repeats}, {args.clock} time\n\n"
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

    for over in ("num_virtual_tokens", "batch_size", "num_adapters"):
        if len(getattr(args, over)) > 1:
            plot_cost(results, over, folder / f"cost_over_{over}.png")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} CPU" + (f" ({names[0]})" if names else "")


if __name__ == "__main__":
    main()
