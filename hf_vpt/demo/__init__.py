"""A small pre-trained ViT inside the package, so that examples and tests run without a download."""

from pathlib import Path


__all__ = ["DEMO", "demo_backbone_path"]

# What settings and saved adapters call it: where this package lies is different on each machine.
DEMO = "demo"


def demo_backbone_path() -> str:
    """Return the folder of the demo ViT, for `AutoModelForImageClassification.from_pretrained`.

    The model takes 32 x 32 pixels in 4 x 4 patches and has 8 blocks of width 128. Its card (`README.md` in the folder)
    says how it was pre-trained: on shapes drawn by `hf_vpt.data.pretraining_shapes`.
    """
    return str(Path(__file__).parent / "vit_drawn")
