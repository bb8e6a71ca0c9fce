"""Measure what the two caches save: seconds per epoch with and without each.

    OMP_NUM_THREADS=1 python scripts/benchmark_caches.py

First epochs over JPEG files of 500 × 375 pixels, decoded and resized to 224 each time or once (`cache_images`); then
epochs of training and validation on the handwritten digits, with prompts in later blocks alone and with or without
`cache_prefix`. Epochs in which a cache is filled are not counted. `--num_images` and `--epochs` make it shorter.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import TrainerCallback, ViTImageProcessor

from hf_vpt.data import AugmentedImages, ImageTransform, ResizedImages, collate_images
from hf_vpt.training import build_trainer, parse_arguments


class EpochTimer(TrainerCallback):
    """Seconds from the end of one epoch to that of the next, validation and checkpoint included."""

    def __init__(self):
        self.ends = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends.append((time.perf_counter(), time.process_time()))


def jpeg_files(number: int) -> Dataset:
    """Draw smooth images, encoded."""
    generator, rows = np.random.default_rng(0), []
    for _ in range(number):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["any"])})
    return Dataset.from_dict({"image": rows, "label": [0] * number}, features=features)


def measure_images(number: int, epochs: int, folder: Path) -> None:
    images, transform = jpeg_files(number), ImageTransform(ViTImageProcessor(size={"height": 224, "width": 224}))
    resized = ResizedImages(images, transform, folder)
    plain, cached = AugmentedImages(images, transform), AugmentedImages(resized, resized.finish)
    seconds = {"decoded each epoch": [], "from the cache": []}
    pass_through(cached)
    for _ in range(epochs):  # by turns, because other processes come and go
        seconds["decoded each epoch"].append(pass_through(plain))
        seconds["from the cache"].append(pass_through(cached))
    report(f"{number} images, reading alone", seconds)


def pass_through(images: AugmentedImages) -> tuple[float, float]:
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in DataLoader(images, batch_size=64, collate_fn=collate_images):
        pass
    return time.perf_counter() - clock, time.process_time() - cpu


def measure_prefix(layers: list[int], epochs: int, folder: Path) -> None:
    seconds = {}
    for title, options in {
        "every block": [],
        "from the cache": ["--cache_prefix", "--cache_dir", str(folder)],
    }.items():
        words = ["--config", "configs/vpt/digits.yaml", "--output_dir", str(folder / "out"), "--disable_tqdm=1"]
        words += ["--num_train_epochs", str(epochs + 2), "--use_cpu", "--layers_to_transform", *map(str, layers)]
        trainer, _ = build_trainer(parse_arguments([*words, *options]))
        timer = EpochTimer()
        trainer.add_callback(timer)
        trainer.train()
        ends = timer.ends[1:]  # the cache of validation images is filled after the first end
        seconds[title] = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(ends, ends[1:])]
    report(f"Digits, prompts in blocks {layers}", seconds)


def report(title: str, seconds: dict[str, list[tuple[float, float]]]) -> None:
    print(f"\n{title}: median seconds per epoch (of processor time)")
    medians = [[statistics.median(column) for column in zip(*values)] for values in seconds.values()]
    for name, (clock, cpu) in zip(seconds, medians):
        print(f"  {name:20} {clock:6.2f} ({cpu:.2f}), {clock / medians[0][0]:.3f} ({cpu / medians[0][1]:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=4802, help="Number of JPEG files.")
    parser.add_argument("--epochs", type=int, default=3, help="Epochs that are counted.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure_images(args.num_images, args.epochs, Path(folder))
        for layers in ([4, 5, 6, 7], [7]):
            measure_prefix(layers, args.epochs, Path(folder))


if __name__ == "__main__":
    main()
