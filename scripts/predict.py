"""Classify images with an adapter: files, folders and addresses.

    python scripts/predict.py outputs/vapt/digits photo.jpg more_photos/ https://example.org/image.png
    python scripts/predict.py user/vapt-flowers photos --top_k 3 --format jsonl --output predictions.jsonl

The adapter is a folder or a repository on the Hub. An image that cannot be read is said to be so in the output; the
others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import torch

import hf_vpt
from hf_vpt.prediction import PredictionFormat, find_images, predict_images, write_predictions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("adapter", help="folder or Hub id")
    parser.add_argument("images", nargs="+", help="files, folders, addresses")
    parser.add_argument("--top_k", type=int, default=5, help="classes for each image")
    parser.add_argument("--format", choices=get_args(PredictionFormat), default="text")
    parser.add_argument("--output", help="file to write; the console if left out")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter")
    parser.add_argument("--subfolder", help="folder of the adapter in its repository")
    parser.add_argument("--base_model", help="folder or Hub id; the one that the adapter names if left out")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    images = find_images(args.images)
    where = {"revision": args.revision, "subfolder": args.subfolder, "base_model": args.base_model}
    model, processor = hf_vpt.load_image_classifier(args.adapter, **where)
    predictions = predict_images(model.to(args.device), processor, images, args.top_k, args.batch_size)
    with Path(args.output).open("w", encoding="utf-8", newline="") if args.output else nullcontext(sys.stdout) as out:
        broken = write_predictions(predictions, out, args.format)
    if broken:
        print(f"{broken} of {len(images)} images could not be read.", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
