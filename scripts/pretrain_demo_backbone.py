"""Pre-train the small ViT that the demos adapt, without any download, on `hf_vpt.data.pretraining_shapes`.

    python scripts/pretrain_demo_backbone.py --output_dir hf_vpt/demo/vit_drawn --max_minutes 32

The result is a folder for `AutoModelForImageClassification.from_pretrained`: float16 weights that load as float32, the
image processor and a model card. It is overwritten every few minutes, so a run that is stopped early leaves a usable
backbone.
"""

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_vpt.data.pretraining_shapes import IMAGE_SIZE, DrawnClasses


@dataclass
class PretrainArguments:
    output_dir: str = field(metadata={"help": "folder that receives the backbone"})
    steps: int = field(default=20_000, metadata={"help": "optimiser steps of the whole schedule"})
    max_minutes: float = field(default=32.0, metadata={"help": "time budget; the schedule shortens itself to fit"})
    batch_size: int = field(default=64, metadata={"help": "images per step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of the cosine"})
    warmup: float = field(default=0.04, metadata={"help": "part of the schedule with a rising learning rate"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW decay of matrices"})
    label_smoothing: float = field(default=0.1, metadata={"help": "of the cross entropy"})
    keep_patches: float = field(
        default=0.5, metadata={"help": "part of the patches that the encoder sees in training"}
    )
    full_from: float = field(default=0.85, metadata={"help": "part of the schedule after which it sees all of them"})
    num_fractals: int = field(default=500, metadata={"help": "classes that are fractals"})
    num_glyphs: int = field(default=0, metadata={"help": "classes that are stroke glyphs"})
    num_contours: int = field(default=300, metadata={"help": "classes that are closed contours"})
    save_every_minutes: float = field(default=5.0, metadata={"help": "time between two saves"})
    seed: int = field(default=0, metadata={"help": "fixes classes, instances and initial weights"})
    bf16: bool = field(default=True, metadata={"help": "run matrix products in bfloat16"})


CARD = """---
library_name: transformers
license: apache-2.0
tags: [vision, formula-driven-supervised-learning]
---

# ViT pre-trained on drawn shapes

A ViT with {parameters:,} parameters (32 x 32 pixels, patches of 4 x 4, {layers} blocks of width {width}) for demos and
tests of visual prompts that must run offline. It has seen no photograph and no handwriting: all {classes} classes are
shapes drawn by `hf_vpt/data/pretraining_shapes.py` ({num_fractals} fractals, {num_contours} closed contours,
{num_glyphs} stroke glyphs).

| | |
|---|---|
| Command | `python scripts/pretrain_demo_backbone.py --output_dir {output_dir} --max_minutes {max_minutes:g}` |
| Seed | {seed} |
| Steps, batch size | {step:,} of {batch_size} freshly drawn images |
| Run time | {minutes:.0f} minutes, CPU threads: {threads} |
| Accuracy on {held_out:,} new instances | {accuracy:.1%} of {classes} classes (chance {chance:.1%}) |

The schedule follows the clock, so another machine, or a busier one, takes another number of steps. The weights are
stored as float16 and load as float32.
"""


@torch.no_grad()
def initialise(model: ViTForImageClassification) -> None:
    """Give layers the gain, and patches the sense of place, that a short training from scratch needs.

    The default (normal, 0.02) suits width 768. At width 128 it leaves attention nearly uniform and positions nearly
    invisible: in one run of each, the loss began to fall about 150 steps later with it. Positions start as the sines
    of https://arxiv.org/abs/2205.01580 and are trained.
    """
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(layer.weight)
    embeddings = model.vit.embeddings
    patch = embeddings.patch_embeddings.projection.weight
    torch.nn.init.xavier_uniform_(patch.view(len(patch), -1))
    side = torch.arange(model.config.image_size // model.config.patch_size)
    row, column = torch.meshgrid(side, side, indexing="ij")
    frequency = 100.0 ** -torch.linspace(0, 1, patch.shape[0] // 4)
    phases = [axis.reshape(-1, 1) * frequency for axis in (row, column)]
    embeddings.position_embeddings[0, 1:] = torch.cat([wave(p) for p in phases for wave in (torch.sin, torch.cos)], 1)


def drop_patches(embeddings: torch.nn.Module, inputs: tuple, tokens: torch.Tensor) -> torch.Tensor:
    """Forward hook: keep the CLS token and a random part of the patches, (B, 1 + h*w, D) to (B, 1 + kept, D)."""
    # Attention over fewer tokens nearly doubles the images per second, as in masked pre-training.
    num_kept = round(embeddings.keep_patches * (tokens.shape[1] - 1)) if embeddings.training else tokens.shape[1] - 1
    if num_kept == tokens.shape[1] - 1:
        return tokens
    kept = torch.rand(tokens.shape[0], tokens.shape[1] - 1).argsort(1)[:, :num_kept, None] + 1
    return torch.cat([tokens[:, :1], tokens.gather(1, kept.expand(-1, -1, tokens.shape[2]))], 1)


@torch.no_grad()
def accuracy_of(model: ViTForImageClassification, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Part of the images (B, 3, 32, 32) in [0, 1] that the model labels rightly."""
    model.eval()
    hits = [model(pixel_values=x * 2 - 1).logits.argmax(-1) == y for x, y in zip(images.split(250), labels.split(250))]
    model.train()
    return torch.cat(hits).float().mean().item()


def save(model: ViTForImageClassification, card: str, output_dir: str) -> None:
    """Write the backbone without its head, its image processor and its card."""
    copy.deepcopy(model.vit).half().save_pretrained(output_dir)
    config = copy.deepcopy(model.config)
    # The file is float16 to be small; the config says float32, which is what `from_pretrained` then builds.
    config.dtype, config.architectures, config.num_labels = torch.float32, ["ViTModel"], 2
    config.save_pretrained(output_dir)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True)
    processor.save_pretrained(output_dir)
    Path(output_dir, "README.md").write_text(card)


def main(args: PretrainArguments) -> None:
    torch.manual_seed(args.seed)
    drawn = DrawnClasses(args.num_fractals, args.num_glyphs, args.num_contours, args.seed)
    config = ViTConfig(
        image_size=IMAGE_SIZE, patch_size=4, hidden_size=128, num_hidden_layers=8, num_attention_heads=4,
        intermediate_size=512, num_labels=len(drawn), attn_implementation="eager",
    )  # fmt: skip
    # Eager attention: for 32 to 64 tokens on a CPU it trains about 1.5 times as fast as the fused kernel.
    model = ViTForImageClassification(config).train()
    initialise(model)
    model.vit.embeddings.register_forward_hook(drop_patches)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)

    def sample(num: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(len(drawn), (num,), generator=generator)
        return drawn.draw(labels, generator), labels

    held_out = sample(2000, torch.Generator().manual_seed(args.seed + 1))
    generator = torch.Generator().manual_seed(args.seed + 2)
    facts = {"parameters": model.vit.num_parameters(), "layers": config.num_hidden_layers, "width": config.hidden_size}
    facts |= {"classes": len(drawn), "chance": 1 / len(drawn), "held_out": len(held_out[1])}
    facts["threads"] = torch.get_num_threads()
    start = saved = time.monotonic()
    step, progress, running = 0, 0.0, math.log(len(drawn))
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(
                progress / args.warmup + 0.01, 0.5 + 0.5 * math.cos(math.pi * progress)
            )
        model.vit.embeddings.keep_patches = args.keep_patches if progress < args.full_from else 1.0
        images, labels = sample(args.batch_size, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = model(pixel_values=images * 2 - 1).logits
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        step, running, now = step + 1, 0.98 * running + 0.02 * loss.item(), time.monotonic()
        progress = max(step / args.steps, (now - start) / (60 * args.max_minutes))
        if step % 50 == 0:
            speed = step * args.batch_size / (now - start)
            print(f"step {step} progress {progress:.3f} loss {running:.3f} {speed:.0f} images/s")
        if progress >= 1 or now - saved > 60 * args.save_every_minutes:
            saved, facts["accuracy"] = now, accuracy_of(model, *held_out)
            card = CARD.format(**vars(args), **facts, step=step, minutes=(now - start) / 60)
            save(model, card, args.output_dir)
            print(f"step {step} accuracy on held-out instances {facts['accuracy']:.3f}, saved")


if __name__ == "__main__":
    main(*HfArgumentParser(PretrainArguments).parse_args_into_dataclasses())
