"""Loading holds a buffer and a batch in memory, however many images a data set has."""

import io

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from hf_vpt.data import AugmentedImages, ImageTransform, StreamedImages, collate_images


NUM_IMAGES, DISTINCT, SIZE = 200_000, 500, 16
BOUND = 100 * 2**20  # bytes
# All pixels in float32, as they leave the transform: 586 MiB.
assert NUM_IMAGES * 3 * SIZE**2 * 4 > 5 * BOUND
FEATURES = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A parquet file of 200,000 small images, some hundred different ones again and again."""
    generator, encoded = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        buffer = io.BytesIO()
        PILImage.fromarray(generator.integers(0, 256, (6, 8), dtype=np.uint8)).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    part = pa.table({"image": encoded, "label": [index % 2 for index in range(DISTINCT)]}, FEATURES.arrow_schema)
    path = tmp_path_factory.mktemp("images") / "train.parquet"
    with pq.ParquetWriter(path, FEATURES.arrow_schema) as writer:
        for _ in range(NUM_IMAGES // DISTINCT):
            writer.write_table(part)
    return str(path)


@pytest.fixture(params=["map-style", "streaming"])
def images(request, file, tmp_path):
    transform = ImageTransform(ViTImageProcessor(size={"height": SIZE, "width": SIZE}))
    if request.param == "streaming":
        stream = load_dataset("parquet", data_files=file, split="train", streaming=True)
        return StreamedImages(stream.cast_column("image", Image(decode=False)), transform, shuffle_buffer_size=1000)
    return AugmentedImages(Dataset.from_parquet(file, cache_dir=str(tmp_path)), transform)


def load(images, keep):
    """Go through a data loader until memory has grown beyond the bound; return images seen and bytes grown."""
    process = psutil.Process()
    loader = DataLoader(images, batch_size=500, shuffle=isinstance(images, AugmentedImages), collate_fn=collate_images)
    seen, kept, start, growth = 0, [], process.memory_info().rss, 0
    for batch in loader:
        seen += len(batch["labels"])
        growth = max(growth, process.memory_info().rss - start)
        if growth > BOUND:
            break
        if keep:
            kept.append(batch)
    return seen, growth


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(images):
    seen, growth = load(images, keep=False)
    assert (seen, growth < BOUND) == (NUM_IMAGES, True), f"{growth / 2**20:.0f} MiB after {seen} images"


def test_memory_would_be_seen_to_grow_if_images_were_kept(images):
    seen, growth = load(images, keep=True)
    assert growth > BOUND
    # Long before the end; memory that earlier tests gave back to the process is filled first.
    assert seen < NUM_IMAGES
