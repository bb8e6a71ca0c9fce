"""Streams give every image once a pass, to one split and one worker, and never hold more than a buffer."""

import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from hf_vpt.data import ImageTransform, StreamedImages, collate_images, load_image_dataset


CLASSES = ["cat", "dog"]


def png_bytes(pixels):
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def rows(greys, label=None):
    """Images of 4 by 6 pixels, each of its own grey value, whose last bit is the class."""
    labels = [grey % 2 if label is None else label for grey in greys]
    return {
        "image": [{"bytes": png_bytes(np.full((4, 6), g, np.uint8)), "path": None} for g in greys],
        "label": labels,
    }


def write_parquet(folder, files, label_type=None, label=None):
    """Write files of images; `files` maps names without number to lists of grey values, one list a file."""
    folder.mkdir(exist_ok=True)
    features = Features({"image": Image(), "label": label_type or ClassLabel(names=CLASSES)})
    for split, parts in files.items():
        for number, greys in enumerate(parts):
            data = Dataset.from_dict(rows(greys, label), features=features)
            data.to_parquet(folder / f"{split}-{number:05d}-of-{len(parts):05d}.parquet")
    return str(folder)


def load(folder, tmp_path, **kwargs):
    return load_image_dataset(str(folder), cache_dir=str(tmp_path / "cache"), streaming=True, **kwargs)


@pytest.fixture(autouse=True)
def short_passes_end_at_once(monkeypatch):
    # `datasets` waits five seconds after each pass over several parquet files, which is nothing in passes of hours.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)


@pytest.fixture
def transform():
    # Pixel values are grey values then, so that images can be told apart behind it.
    size = {"height": 4, "width": 6}
    return ImageTransform(ViTImageProcessor(size=size, do_resize=False, do_rescale=False, do_normalize=False))


def greys(images, num_images=None, batch_size=3, **loading):
    """Grey values of the images, in the order in which a data loader gives them."""
    loader = DataLoader(images, batch_size=batch_size, collate_fn=collate_images, **loading)
    values = (int(value) for batch in loader for value in batch["pixel_values"][:, 0, 0, 0])
    return list(itertools.islice(values, num_images))


def test_published_splits_of_parquet_files_are_streams_with_the_columns_and_classes(tmp_path, transform):
    files = {"train": [range(8), range(8, 20)], "validation": [range(30, 36)], "test": [range(40, 44)]}
    splits = load(write_parquet(tmp_path / "data", files), tmp_path)
    assert set(splits) == {"train", "validation", "test"}
    for split, expected in {"train": range(20), "validation": range(30, 36), "test": range(40, 44)}.items():
        assert isinstance(splits[split], IterableDataset)
        assert splits[split].column_names == ["image", "label"]
        assert splits[split].features["label"].names == CLASSES
        assert greys(StreamedImages(splits[split], transform)) == list(expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("published", [[], ["test"], ["validation"]])
def test_images_held_out_of_a_stream_are_never_trained_on(tmp_path, transform, published, num_workers):
    # Regression: `take` and `skip` count the images of each worker's own files, so splits would overlap.
    files = {"train": [range(20), range(20, 40), range(40, 60)]} | {split: [range(90, 95)] for split in published}
    splits = load(write_parquet(tmp_path / "data", files), tmp_path, num_held_out=7)
    held_out = [split for split in ("validation", "test") if isinstance(splits[split], Dataset)]
    assert len(held_out) == 2 - len(published)
    train = StreamedImages(splits["train"], transform, shuffle_buffer_size=10)
    apart = [greys(train, num_workers=num_workers), *(greys(splits[s].with_transform(transform)) for s in held_out)]
    assert [len(values) for values in apart[1:]] == [7] * len(held_out)
    assert sorted(sum(apart, [])) == list(range(60))
    if published == ["validation"]:
        # Nobody may have chosen on the test split.
        assert greys(StreamedImages(splits["test"], transform)) == list(range(90, 95))


def test_images_held_out_depend_on_the_seed_alone(tmp_path, transform):
    folder = write_parquet(tmp_path / "data", {"train": [range(30), range(30, 60)]})
    drawn = [load(folder, tmp_path, num_held_out=7, seed=seed)["test"] for seed in (0, 0, 1)]
    first, same, other = (greys(data.with_transform(transform)) for data in drawn)
    assert first == same != other


def test_folder_of_image_files_streams_the_splits_it_has_without_streaming(tmp_path, transform):
    for grey in range(40):
        folder = tmp_path / "animals" / CLASSES[grey % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{grey:02d}.png").write_bytes(png_bytes(np.full((4, 6), grey, np.uint8)))
    whole = load_image_dataset(str(tmp_path / "animals"), cache_dir=str(tmp_path / "cache"))
    splits = load(tmp_path / "animals", tmp_path)
    for split in ("validation", "test"):
        assert greys(splits[split].with_transform(transform)) == greys(whole[split].with_transform(transform))
    assert isinstance(splits["train"], IterableDataset)
    found = StreamedImages(splits["train"], transform)
    assert sorted(greys(found)) == sorted(greys(whole["train"].with_transform(transform)))
    # One class after the other could not be mixed by a buffer.
    assert len(list(itertools.groupby(value % 2 for value in greys(found)))) > 2
    assert sorted(greys(found, num_workers=2)) == sorted(greys(found))


def test_packaged_digits_and_saved_data_sets_can_be_streamed(tmp_path):
    assert isinstance(load_image_dataset("digits", streaming=True)["train"], IterableDataset)
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    DatasetDict(train=Dataset.from_dict(rows(range(30)), features=features)).save_to_disk(tmp_path / "data")
    splits = load(tmp_path / "data", tmp_path)
    assert isinstance(splits["train"], IterableDataset)
    assert (len(splits["validation"]), len(splits["test"])) == (5, 6)


def test_stream_that_does_not_name_its_classes_is_refused_with_what_to_do(tmp_path):
    folder = write_parquet(tmp_path / "data", {"train": [range(9)]}, Value("string"), label="cat")
    with pytest.raises(ValueError, match="streams labels of type string.*must be known.*ClassLabel.*leave streaming"):
        load(folder, tmp_path)


def test_stream_too_small_to_hold_out_from_is_refused(tmp_path):
    folder = write_parquet(tmp_path / "data", {"train": [range(9)]})
    with pytest.raises(ValueError, match="has 9 images to train on, of which 9 are.*hold out fewer"):
        load(folder, tmp_path, num_held_out=9)


def test_stream_sorted_by_class_gets_a_warning_that_names_the_class(tmp_path, caplog):
    folder = write_parquet(tmp_path / "data", {"train": [[*range(0, 60, 2), *range(1, 60, 2)]]})
    load(folder, tmp_path, num_held_out=5)
    assert "all 5 images held out are of class" in caplog.text


def test_unlabelled_test_split_of_a_stream_is_not_used(tmp_path, transform):
    folder = tmp_path / "data"
    write_parquet(folder, {"train": [range(20)], "validation": [range(20, 24)]})
    splits = load(write_parquet(folder, {"test": [range(30, 34)]}, label=-1), tmp_path, num_held_out=5)
    assert greys(StreamedImages(splits["test"], transform)) == list(range(20, 24))


@pytest.fixture
def stream():
    """Sixty images in three shards."""
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    data = Dataset.from_dict(rows(range(60)), features=features).cast_column("image", Image(decode=False))
    return data.to_iterable_dataset(num_shards=3)


@pytest.mark.parametrize(
    ("num_workers", "context"), [(0, None), (5, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_no_image_is_lost_or_seen_twice_in_a_pass_with_any_number_of_workers(stream, transform, num_workers, context):
    images = StreamedImages(stream, transform, shuffle_buffer_size=8)
    loading = {"num_workers": num_workers, "multiprocessing_context": context}
    assert sorted(greys(images, **loading)) == list(range(60))


def test_repeated_stream_gives_whole_passes_in_another_order_each(stream, transform):
    values = greys(StreamedImages(stream, transform, seed=1, shuffle_buffer_size=8, repeat=True), num_images=180)
    passes = [values[:60], values[60:120], values[120:]]
    assert all(sorted(values) == list(range(60)) for values in passes)
    assert len({tuple(values) for values in passes}) == 3


def test_workers_that_repeat_do_not_disturb_each_other(stream, transform):
    # Regression: workers share the epoch of a stream, so the one that ended its pass first moved the others' on.
    images = StreamedImages(stream, transform, shuffle_buffer_size=8, repeat=True)
    values = greys(images, 300, num_workers=2)
    assert greys(images, 300, num_workers=2) == values
    # Two shards for one worker, one for the other, which therefore repeats more often.
    assert np.bincount(values, minlength=60).min() >= 3


def test_workers_without_files_do_not_go_round_for_ever(stream, transform):
    images = StreamedImages(stream, transform, repeat=True)
    assert set(greys(images, 120, num_workers=4, timeout=60)) == set(range(60))


def test_pass_can_be_chosen_and_seeds_give_other_orders(stream, transform):
    def order(seed, epoch=0):
        images = StreamedImages(stream, transform, seed=seed, shuffle_buffer_size=8)
        images.set_epoch(epoch)
        return greys(images)

    repeated = greys(StreamedImages(stream, transform, seed=1, shuffle_buffer_size=8, repeat=True), num_images=120)
    assert repeated == order(1) + order(1, epoch=1)
    assert order(2) != order(1)


def test_augmentation_of_a_stream_differs_between_passes_and_leaves_the_random_state_alone(stream):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    encoded = {"image": {"bytes": png_bytes(noise), "path": None}, "label": 0}
    data = Dataset.from_list([encoded] * 4, features=stream.features).to_iterable_dataset()
    images = StreamedImages(data, ImageTransform(processor, augmentation="affine"), repeat=True)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again = ([e["pixel_values"] for e in itertools.islice(images, 12)] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(first, 2))


def test_streamed_images_survive_pickling(stream, transform):
    images = StreamedImages(stream, transform, seed=4, shuffle_buffer_size=8)
    images.set_epoch(2)
    assert greys(pickle.loads(pickle.dumps(images))) == greys(images)
