"""What prompts cost, beside baselines and other adapters, measured and counted."""

from .cost import count_flops, count_saved_bytes, interleaved_seconds, peak_memory
from .measure import BenchmarkArguments, Measurement, run_benchmark
from .report import to_markdown
from .variants import BAKED, BENCHMARK_BACKBONES, COMPILED, CONCATENATED, FLOOR, VARIANTS, BenchmarkBackbone


__all__ = [
    "BAKED",
    "BENCHMARK_BACKBONES",
    "COMPILED",
    "CONCATENATED",
    "FLOOR",
    "VARIANTS",
    "BenchmarkArguments",
    "BenchmarkBackbone",
    "Measurement",
    "count_flops",
    "count_saved_bytes",
    "interleaved_seconds",
    "peak_memory",
    "run_benchmark",
    "to_markdown",
]
