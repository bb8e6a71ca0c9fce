"""Write an adapter and its backbone to one file, which classifies images without this package.

    python scripts/export.py user/vapt-flowers --output flowers.onnx
    python scripts/export.py outputs/vapt/digits --output digits.pt2 --format torch

The adapter is a folder or a repository on the Hub. The file is written after its logits, for one and for several
images, have been compared with the model's; it holds the names of the classes and how images are prepared.
"""

from __future__ import annotations

import argparse

from PIL import Image

import hf_vpt
from hf_vpt.export import export_onnx, export_program


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("adapter", help="folder or Hub id")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--format", choices=["onnx", "torch"], default="onnx", help="torch: a program of torch.export")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter")
    parser.add_argument("--subfolder", help="folder of the adapter in its repository")
    parser.add_argument("--base_model", help="folder or Hub id; the one that the adapter names if left out")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    where = {"revision": args.revision, "subfolder": args.subfolder, "base_model": args.base_model}
    model, processor = hf_vpt.load_image_classifier(args.adapter, **where)
    example = processor(Image.new("RGB", (256, 256), "gray"), return_tensors="pt")["pixel_values"]
    export = {"onnx": export_onnx, "torch": export_program}[args.format]
    path = export(model, args.output, example, processor=processor, tolerance=args.tolerance)
    size, (height, width) = path.stat().st_size / 1e6, example.shape[2:]
    print(f"Saved {path}, {size:.1f} MB, for {height} × {width} pixels and {model.config.num_labels} classes.")


if __name__ == "__main__":
    main()
