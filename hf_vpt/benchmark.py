"""Prompts, baselines and other adapters side by side on one backbone with random weights: what each costs."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from .cost import count_flops, count_saved_bytes, interleaved_seconds, peak_memory
from .tuners.bpt import BPTConfig
from .tuners.provpt import PROVPTConfig
from .tuners.vapt import VAPTConfig
from .tuners.vpt import VPTConfig


FLOOR = "frozen backbone, no prompts"
CONCATENATED = ", concatenated"
Mode = Literal["training", "inference"]


@dataclass(frozen=True)
class BenchmarkBackbone:
    """A backbone to measure.

    Attributes:
        title: What people call it.
        model_cls: Its class.
        config: Its config values.
        trained: The parameter that trains in the floor, of which all blocks are a function.
        query_value: Names of the projections that LoRA adapts.
    """

    title: str
    model_cls: type[PreTrainedModel]
    config: PretrainedConfig
    trained: str
    query_value: tuple[str, ...] = ("q_proj", "v_proj")


def _vit(title: str, **values: int) -> BenchmarkBackbone:
    return BenchmarkBackbone(
        title, ViTForImageClassification, ViTConfig(num_labels=100, **values), "vit.embeddings.cls_token"
    )


BACKBONES = {
    "vit": _vit("ViT-B/16"),
    "vit_small": _vit("ViT-S/16", hidden_size=384, num_attention_heads=6, intermediate_size=1536),
    "vit_large": _vit(
        "ViT-L/16", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "swin": BenchmarkBackbone(
        "Swin-B",
        SwinForImageClassification,
        SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], num_labels=100),
        "swin.embeddings.norm.bias",
    ),
}


@dataclass
class BenchmarkArguments:
    """Size of the measurement.

    Args:
        backbone: Which backbone, with random weights.
        num_virtual_tokens: Prompts N in a block; one round of measurements for each number.
        batch_size: Images B; one round for each number.
        image_size: Height and width in pixels.
        modes: `"training"`, forward and backward, or `"inference"`, forward alone, or both.
        variants: Names of the variants to measure beside the floor; all if left out. See `VARIANTS`.
        repeats: Measured runs of each variant, after one that warms up.
        device: `"cpu"` or `"cuda"`.
        dtype: Number format: of weights and images, or `"autocast"` for bfloat16 products on float32 weights.
        num_threads: Threads of PyTorch on a CPU.
        attn_implementation: Attention backend of Transformers.
        compile: Whether models are compiled.
        gradient_checkpointing: Whether activations are computed a second time instead of kept.
        count: Whether operations, bytes kept and peak memory are measured as well, in passes of their own.
    """

    backbone: Literal["vit", "vit_small", "vit_large", "swin"] = field(
        default="vit", metadata={"help": "ViT-B/16, ViT-S/16, ViT-L/16 or Swin-B."}
    )
    num_virtual_tokens: list[int] = field(default_factory=lambda: [50], metadata={"help": "Prompts in a block."})
    batch_size: list[int] = field(default_factory=lambda: [8], metadata={"help": "Images in a batch."})
    image_size: int = field(default=224, metadata={"help": "Pixels."})
    modes: list[str] = field(default_factory=lambda: ["training"], metadata={"help": "training, inference."})
    variants: list[str] | None = field(default=None, metadata={"help": "Names of the variants; all if left out."})
    repeats: int = field(default=7, metadata={"help": "Measured runs of each variant."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: Literal["float32", "bfloat16", "float16", "autocast"] = field(
        default="float32", metadata={"help": "Number format; autocast computes float32 weights in bfloat16."}
    )
    num_threads: int = field(default=2, metadata={"help": "Threads of PyTorch."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "Attention backend."})
    compile: bool = field(default=False, metadata={"help": "Compile the models."})
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
        seconds: Every measured run.
        over_floor: Median seconds, as a multiple of the floor's in the same round.
        trained_parameters: Numbers that train, without the head.
        flops: Counted operations of one run; None where they were not counted.
        saved_bytes: Bytes kept for the backward pass; None where there is none.
        peak_bytes: Bytes by which memory grew at most.
    """

    variant: str
    mode: Mode
    num_virtual_tokens: int
    batch_size: int
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


def _adapter(make_config: Callable[[int], PeftConfig], insertion: str = "keys_values") -> Callable[..., nn.Module]:
    def build(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
        model = get_peft_model(base, make_config(num_virtual_tokens))
        model.base_model.set_insertion(insertion)
        return model.train()

    return build


def _floor(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
    _train_copy(base, [measured.trained])
    # In evaluation mode: prompts turn a frozen backbone's dropout and stochastic depth off as well.
    return base.eval()


def _linear_probe(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
    _train_copy(base, [name for name, _ in base.named_parameters() if name.startswith("classifier.")])
    return base.eval()


def _full(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
    _train_copy(base, [name for name, _ in base.named_parameters()])
    return base.eval()


def _lora(base: PreTrainedModel, measured: BenchmarkBackbone, num_virtual_tokens: int) -> nn.Module:
    config = LoraConfig(r=8, target_modules=list(measured.query_value), modules_to_save=["classifier"])
    return get_peft_model(base, config).eval()


def _train_copy(model: nn.Module, names: Sequence[str]) -> None:
    """Give a model parameters of its own, that train, in the place of some that it shares with others."""
    for name in names:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(model.get_parameter(name).detach().clone()))


CONFIGS: dict[str, Callable[[int], PeftConfig]] = {
    "VPT-Deep": lambda n: VPTConfig(num_virtual_tokens=n),
    "VAPT": lambda n: VAPTConfig(num_virtual_tokens=n),
    "PRO-VPT": lambda n: PROVPTConfig(num_virtual_tokens=n),
    "BPT-Deep": lambda n: BPTConfig(num_virtual_tokens=n, rank=n),
}
# Each makes a model from a bare backbone, whose parameters it shares with all others, and a number of prompts.
VARIANTS: dict[str, Callable[[PreTrainedModel, BenchmarkBackbone, int], nn.Module]] = {
    FLOOR: _floor,
    **{name: _adapter(config) for name, config in CONFIGS.items()},
    "VPT-Shallow": _adapter(lambda n: VPTConfig(num_virtual_tokens=n, deep=False)),
    **{name + CONCATENATED: _adapter(config, "tokens") for name, config in CONFIGS.items()},
    "linear probe": _linear_probe,
    "LoRA, r = 8 on q and v": _lora,
    "full fine-tuning": _full,
}


def run_benchmark(args: BenchmarkArguments, report: Callable[[str], None] = lambda line: None) -> list[Measurement]:
    """Measure what the arguments ask for; every round runs each variant in turn.

    Args:
        args: What to measure.
        report: Told how far it is.

    Raises:
        ValueError: A name is unknown.
    """
    _check(args)
    measured = BACKBONES[args.backbone]
    config = copy.deepcopy(measured.config)
    config.image_size = args.image_size
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
        for number in args.num_virtual_tokens:
            models = {name: VARIANTS[name](_share(base), measured, number) for name in names}
            if args.gradient_checkpointing:
                for model in models.values():
                    model.gradient_checkpointing_enable({"use_reentrant": False})
            for mode in args.modes:
                report(f"B = {batch_size}, N = {number}, {mode}")
                results += _measure_round(args, models, images, labels, mode, number)
            del models
    return results


def _check(args: BenchmarkArguments) -> None:
    for name, values, known in (
        ("variants", args.variants or [], list(VARIANTS)),
        ("modes", args.modes, ["training", "inference"]),
    ):
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"{name} has {unknown}. Known are {known}: correct them.")


def _share(base: PreTrainedModel) -> PreTrainedModel:
    """A copy with the same tensors: a dozen copies of a backbone would not fit every machine."""
    return copy.deepcopy(base, memo={id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def _measure_round(
    args: BenchmarkArguments,
    models: dict[str, nn.Module],
    images: torch.Tensor,
    labels: torch.Tensor,
    mode: Mode,
    num_virtual_tokens: int,
) -> list[Measurement]:
    runs, forwards = {}, {}
    for name, model in models.items():
        called = torch.compile(model) if args.compile else model
        model.train(mode == "training" and name not in (FLOOR, "linear probe", "full fine-tuning"))
        forwards[name] = _forward(called, images, labels, args, grad=mode == "training")
        runs[name] = _step(model, forwards[name]) if mode == "training" else forwards[name]
    seconds = interleaved_seconds(runs, args.repeats, device=args.device)
    floor = statistics.median(seconds[FLOOR])
    results = []
    for name, model in models.items():
        counts: dict[str, int | None] = {}
        if args.count:
            counts["flops"] = count_flops(runs[name])
            model.zero_grad()
            counts["saved_bytes"] = count_saved_bytes(forwards[name], model) if mode == "training" else None
            counts["peak_bytes"] = peak_memory(runs[name], args.device)
        model.zero_grad()
        trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)
        over_floor = statistics.median(seconds[name]) / floor
        results.append(
            Measurement(name, mode, num_virtual_tokens, len(images), seconds[name], over_floor, trained, **counts)
        )
    return results


def _forward(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, args: BenchmarkArguments, grad: bool
) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=args.dtype == "autocast")
        with torch.set_grad_enabled(grad), autocast:
            return model(pixel_values=images, labels=labels).loss

    return run


def _step(model: nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad()
        forward().backward()

    return run


def to_markdown(results: Sequence[Measurement]) -> str:
    """One table for each mode, batch size and number of prompts."""
    tables = []
    settings = dict.fromkeys((r.mode, r.batch_size, r.num_virtual_tokens) for r in results)
    for mode, batch_size, number in settings:
        rows = [r for r in results if (r.mode, r.batch_size, r.num_virtual_tokens) == (mode, batch_size, number)]
        floor = rows[0]
        counted = floor.flops is not None
        header = ["× floor", "seconds (quartiles)", "images/s", "tuned, without head"]
        header += ["× FLOPs", "× bytes kept", "× peak memory"] if counted else []
        lines = [f"**{mode}, B = {batch_size}, N = {number}**\n", f"| | {' | '.join(header)} |"]
        lines.append("|" + "---|" * (len(header) + 1))
        for row in rows:
            low, middle, high = statistics.quantiles(row.seconds, n=4) if len(row.seconds) > 1 else 3 * row.seconds
            cells = [f"{row.over_floor:.2f}", f"{middle:.3g} ({low:.3g} – {high:.3g})", f"{row.images_per_second:.3g}"]
            cells.append(f"{row.trained_parameters:,}")
            if counted:
                for name in ("flops", "saved_bytes", "peak_bytes"):
                    value, reference = getattr(row, name), getattr(floor, name)
                    cells.append("–" if not value or not reference else f"{value / reference:.2f}")
            lines.append(f"| {row.variant} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"
