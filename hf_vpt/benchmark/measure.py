"""Time, operations and memory of all variants, measured in turn."""

from __future__ import annotations

import copy
import operator
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..tuners.base.block import silence_frozen_modules
from .cost import count_flops, count_saved_bytes, interleaved_seconds, peak_memory
from .variants import BAKED, BENCHMARK_BACKBONES, COMPILED, CONCATENATED, FLOOR, VARIANTS


Mode = Literal["training", "inference"]


@dataclass
class BenchmarkArguments:
    """Size of the measurement.

    Args:
        backbone: Which backbone, with random weights.
        num_virtual_tokens: Prompts N in a block; one round of measurements for each number.
        batch_size: Images B, in each process; one round for each number.
        num_adapters: Adapters among which the images of a batch are divided, in inference; one round for each number.
        image_size: Height and width in pixels.
        modes: `"training"`, forward and backward, or `"inference"`, forward alone, or both.
        variants: Names of the variants to measure beside the floor; all if left out. See `VARIANTS`.
        repeats: Measured runs of each variant, after one that warms up.
        device: `"cpu"` or `"cuda"`.
        dtype: Number format: of weights and images, or `"autocast"` for bfloat16 products on float32 weights.
        num_threads: Threads of PyTorch on a CPU.
        clock: `"wall"`, or `"processor"`: time in which the process worked, which others disturb less.
        attn_implementation: Attention backend of Transformers.
        compile: Whether each model is measured a second time, compiled.
        gradient_checkpointing: Whether activations are computed a second time instead of kept.
        count: Whether operations, bytes kept and peak memory are measured as well, in passes of their own.
    """

    backbone: Literal["vit", "vit_small", "vit_large", "swin"] = field(
        default="vit", metadata={"help": "ViT-B/16, ViT-S/16, ViT-L/16 or Swin-B."}
    )
    num_virtual_tokens: list[int] = field(default_factory=lambda: [50], metadata={"help": "Prompts in a block."})
    batch_size: list[int] = field(default_factory=lambda: [8], metadata={"help": "Images in a batch."})
    num_adapters: list[int] = field(default_factory=lambda: [1], metadata={"help": "Adapters in a batch."})
    image_size: int = field(default=224, metadata={"help": "Pixels."})
    modes: list[str] = field(default_factory=lambda: ["training"], metadata={"help": "training, inference."})
    variants: list[str] | None = field(default=None, metadata={"help": "Names of the variants; all if left out."})
    repeats: int = field(default=7, metadata={"help": "Measured runs of each variant."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: Literal["float32", "bfloat16", "float16", "autocast"] = field(
        default="float32", metadata={"help": "Number format; autocast computes float32 weights in bfloat16."}
    )
    num_threads: int = field(default=2, metadata={"help": "Threads of PyTorch."})
    clock: Literal["wall", "processor"] = field(
        default="wall", metadata={"help": "Time that passed, or time in which the process worked."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "Attention backend."})
    compile: bool = field(default=False, metadata={"help": "Measure compiled models as well."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Compute activations a second time."})
    count: bool = field(default=False, metadata={"help": "Count operations and memory as well."})


@dataclass(frozen=True)
class Measurement:
    """What one variant costs in one setting.

    Attributes:
        variant: Its name.
        mode: `"training"` or `"inference"`.
        num_virtual_tokens: Prompts N in a block.
        batch_size: Images B.
        num_adapters: Adapters among which the images are divided.
        seconds: Every measured run.
        over_floor: Seconds as a multiple of the floor's in the same repeat, the median over repeats: a slow minute of
            the machine is in both.
        trained_parameters: Numbers that train, without the head.
        flops: Counted operations of one run; None where they were not counted.
        saved_bytes: Bytes kept for the backward pass; None where there is none.
        peak_bytes: Bytes by which memory grew at most.
    """

    variant: str
    mode: Mode
    num_virtual_tokens: int
    batch_size: int
    num_adapters: int
    seconds: list[float]
    over_floor: float
    trained_parameters: int
    flops: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def images_per_second(self) -> float:
        return self.batch_size / statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "images_per_second": self.images_per_second}


def run_benchmark(args: BenchmarkArguments, report: Callable[[str], None] = lambda line: None) -> list[Measurement]:
    """Measure what the arguments ask for; every round runs each variant in turn.

    Where `torch.distributed` is initialised, every process measures its own batch, and training steps average their
    gradients.

    Args:
        args: What to measure.
        report: Told how far it is.

    Raises:
        ValueError: A name is unknown.
    """
    _check(args)
    measured = BENCHMARK_BACKBONES[args.backbone]
    config = copy.deepcopy(measured.config)
    config.image_size = args.image_size
    # The first loss would find it out, and compiled models be compiled anew for it.
    config.problem_type = "single_label_classification"
    config._attn_implementation = args.attn_implementation
    torch.manual_seed(0)
    dtype = torch.float32 if args.dtype == "autocast" else getattr(torch, args.dtype)
    base = measured.model_cls(config).requires_grad_(False).to(args.device, dtype)
    names = [FLOOR, *(name for name in VARIANTS if name != FLOOR and name in (args.variants or VARIANTS))]
    if args.backbone == "swin":
        # Tokens on a grid of windows have no place beside them.
        names = [name for name in names if not name.endswith(CONCATENATED)]
    results = []
    for batch_size in args.batch_size:
        images = torch.randn(batch_size, 3, args.image_size, args.image_size, device=args.device, dtype=dtype)
        labels = torch.randint(100, (batch_size,), device=args.device)
        for number, num_adapters in product(args.num_virtual_tokens, args.num_adapters):
            models = {name: VARIANTS[name](_share(base), measured, number) for name in names}
            if num_adapters > 1:
                models = {n: _with_adapters(m, num_adapters) for n, m in models.items() if _takes_adapters(n, m)}
            if args.gradient_checkpointing:
                for model in models.values():
                    model.gradient_checkpointing_enable({"use_reentrant": False})
            for mode in args.modes:
                report(f"B = {batch_size}, N = {number}, {num_adapters} adapters, {mode}")
                results += _measure_round(args, models, images, labels, mode, number, num_adapters)
            del models
    return results


def _check(args: BenchmarkArguments) -> None:
    for name, values, known in (
        ("variants", args.variants or [], list(VARIANTS)),
        ("modes", args.modes, ["training", "inference"]),
    ):
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"{name} has {unknown}. Known are {known}: correct them.")
    if args.clock == "processor" and args.device != "cpu":
        raise ValueError(
            f"clock is 'processor' and device '{args.device}'. Processor time does not see what a device does: "
            "measure with clock 'wall', or on the CPU."
        )
    if max(args.num_adapters) > 1 and (args.modes != ["inference"] or max(args.num_adapters) > min(args.batch_size)):
        raise ValueError(
            f"num_adapters has {max(args.num_adapters)}, with modes {args.modes} and batches of {args.batch_size}. "
            "Several adapters in a batch need inference alone, and an image each: add --modes inference, or correct "
            "the sizes."
        )


def _share(base: PreTrainedModel) -> PreTrainedModel:
    """A copy with the same tensors: a dozen copies of a backbone would not fit every machine."""
    return copy.deepcopy(base, memo={id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def _takes_adapters(name: str, model: nn.Module) -> bool:
    return name == FLOOR or isinstance(model, PeftModel)


def _with_adapters(model: nn.Module, num_adapters: int) -> nn.Module:
    """The model with that many adapters like the one that it has, called by their numbers."""
    if isinstance(model, PeftModel):
        for number in range(num_adapters):
            model.add_adapter(str(number), copy.deepcopy(model.active_peft_config))
    return model


def _measure_round(
    args: BenchmarkArguments,
    models: dict[str, nn.Module],
    images: torch.Tensor,
    labels: torch.Tensor,
    mode: Mode,
    num_virtual_tokens: int,
    num_adapters: int,
) -> list[Measurement]:
    runs, forwards = {}, {}
    if mode == "training":
        models = {name: model for name, model in models.items() if not name.endswith(BAKED)}
    measured: dict[str, nn.Module] = {}
    for name, model in models.items():
        model.train(mode == "training")
        # All of them, as prompts do. In evaluation mode blocks would not be checkpointed either.
        silence_frozen_modules(model)
        called = DistributedDataParallel(model) if mode == "training" and distributed.is_initialized() else model
        inputs = {"pixel_values": images, "labels": labels}
        if num_adapters > 1 and name != FLOOR:
            inputs["adapter_names"] = [str(number % num_adapters) for number in range(len(images))]
        forms = {name: called} | ({name + COMPILED: torch.compile(called)} if args.compile else {})
        for form, called in forms.items():
            measured[form] = model
            forwards[form] = _forward(called, inputs, args, grad=mode == "training")
            runs[form] = _step(model, forwards[form]) if mode == "training" else forwards[form]
    with _compiling(len(runs)) if args.compile else nullcontext():
        seconds = interleaved_seconds(runs, args.repeats, device=args.device, clock=args.clock)
    results = []
    for name, model in measured.items():
        counts: dict[str, int | None] = {}
        # Operations and memory of compiled code are not what modules do one after the other.
        if args.count and not name.endswith(COMPILED):
            counts["flops"] = count_flops(runs[name])
            model.zero_grad()
            counts["saved_bytes"] = count_saved_bytes(forwards[name], model) if mode == "training" else None
            counts["peak_bytes"] = peak_memory(runs[name], args.device)
        model.zero_grad()
        trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)
        over_floor = statistics.median(map(operator.truediv, seconds[name], seconds[FLOOR]))
        results.append(
            Measurement(
                name, mode, num_virtual_tokens, len(images), num_adapters, seconds[name], over_floor, trained, **counts
            )
        )
    return results


def _compiling(num_models: int) -> AbstractContextManager:
    """Lets that many models be compiled, each for itself."""
    torch.compiler.reset()  # sizes of earlier rounds would become variables
    # Models share the code that is compiled: after PyTorch's limit of 8 they would run as they are, without an error.
    return torch._dynamo.config.patch(cache_size_limit=8 + num_models)


def _forward(
    model: nn.Module, inputs: dict[str, Any], args: BenchmarkArguments, grad: bool
) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "autocast")
        with torch.set_grad_enabled(grad), autocast:
            return model(**inputs).loss

    return run


def _step(model: nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad()
        forward().backward()

    return run
