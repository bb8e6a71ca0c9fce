"""Results say which images they are on, and those on different ones do not stand in one table."""

import io
import shutil
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_vpt.data import load_image_dataset
from hf_vpt.data.fingerprint import fingerprint, fingerprint_splits
from hf_vpt.training import check_comparable


ROOT = Path(__file__).parents[1]
FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})


def png(grey):
    buffer = io.BytesIO()
    Image.new("L", (3, 2), grey).save(buffer, format="PNG")
    return buffer.getvalue()


def data(contents, labels, paths=None):
    rows = [{"bytes": c, "path": p} for c, p in zip(contents, paths or [None] * len(contents), strict=True)]
    return Dataset.from_dict({"image": rows, "label": labels}, features=FEATURES)


def test_a_fingerprint_depends_on_images_and_classes_and_not_on_their_order():
    original = data([png(n) for n in range(6)], [0, 1] * 3)
    expected = fingerprint(original)
    assert len(expected) == 16
    assert fingerprint(original.shuffle(seed=3)) == expected
    assert fingerprint(original.cast_column("image", ImageFeature(decode=False))) == expected
    assert fingerprint(original.select(range(5))) != expected
    assert fingerprint(data([png(n) for n in range(6)], [1, 0] * 3)) != expected
    assert fingerprint(data([png(n) for n in (0, 1, 2, 3, 4, 9)], [0, 1] * 3)) != expected
    # One image twice is not another one twice, and not no image.
    assert fingerprint(original.select([0, 0])) != fingerprint(original.select([1, 1])) != fingerprint(data([], []))


def test_a_fingerprint_of_a_selection_is_that_of_the_same_images_alone():
    contents = [png(n) for n in range(6)]
    chosen = data(contents, [0, 1] * 3).select([4, 1, 5])
    assert fingerprint(chosen) == fingerprint(data([contents[n] for n in (4, 1, 5)], [0, 1, 1]))


def test_a_fingerprint_of_files_is_the_same_in_another_folder_and_opens_no_file(tmp_path, monkeypatch):
    for number in range(20):
        folder = tmp_path / "here" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(number))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    cache = str(tmp_path / "cache")
    here, there = (load_image_dataset(str(tmp_path / name), cache_dir=cache) for name in ("here", "there"))
    expected = fingerprint_splits(here)
    assert fingerprint_splits(there) == expected
    assert len(set(expected.values())) == 3
    path = tmp_path / "there" / "a" / "0.png"
    path.write_bytes(path.read_bytes() + b"\0")  # encoded in another way
    changed = fingerprint_splits(there)
    assert [split for split in expected if changed[split] != expected[split]] == [
        split for split, part in there.items() if str(path) in [image["path"] for image in undecoded(part)]
    ]


def test_a_fingerprint_does_not_know_the_folder_that_all_images_lie_in(tmp_path):
    # Regression: of images beside their list, the name of the data set's own folder counted.
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        rows = []
        for number in range(20):
            (tmp_path / name / f"{number}.png").write_bytes(png(number))
            rows.append(f"{number}.png,{'ab'[number % 2]}")
        (tmp_path / name / "list.csv").write_text("\n".join(["image,label", *rows]))
    here, there = (load_image_dataset(str(tmp_path / name / "list.csv")) for name in ("here", "there"))
    assert fingerprint_splits(here) == fingerprint_splits(there)


def test_a_fingerprint_changes_with_names_folders_sizes_and_classes():
    contents, labels = [png(n) for n in range(4)], [0, 1] * 2
    paths = ["/data/s1/1.png", "/data/s1/2.png", "/data/s2/1.png", "/data/s2/2.png"]
    expected = fingerprint(data(contents, labels, paths))
    assert fingerprint(data(contents, labels, [path.replace("/data", "hf://x/y") for path in paths])) == expected
    others = [
        data(contents, labels, [path.replace("2.png", "3.png") for path in paths]),
        data(contents, labels, [*paths[:2], "/data/s3/1.png", "/data/s3/2.png"]),
        data([*contents[:3], contents[3] + b"\0"], labels, paths),
        data(contents, labels, paths).cast_column("label", ClassLabel(names=["a", "c"])),
        data(contents, labels, paths).cast_column("label", ClassLabel(names=["a", "b", "c"])),
    ]
    assert len({expected, *map(fingerprint, others)}) == 6


def undecoded(part):
    return part.cast_column("image", ImageFeature(decode=False))["image"]


def test_a_stream_has_no_fingerprint():
    splits = load_image_dataset("digits", streaming=True)
    whole = load_image_dataset("digits")
    assert fingerprint_splits(splits) == fingerprint_splits(whole) | {"train": None}


RESULT = {
    "dataset_name": "vtab/cifar100",
    "dataset_variant": "zip",
    "dataset_fingerprint": {"train": "1", "test": "2"},
    "preprocessing": "processor",
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dataset_variant": "full"}, r"dataset_variant zip \('first'\) and full \('second'\)"),
        ({"dataset_fingerprint": {"train": "1", "test": "3"}}, r"fingerprint {'test': '2'} .* and {'test': '3'}"),
        ({"preprocessing": "published"}, "preprocessing processor .* and published"),
        ({"preprocessing": None}, "preprocessing processor .* and unknown"),
    ],
)
def test_results_on_different_data_are_not_compared(changed, words):
    with pytest.raises(
        ValueError, match=f"'vtab/cifar100' with .*{words}.*must be on the same images.*one of them at a time"
    ):
        check_comparable({"first": RESULT, "second": RESULT | changed})
    other = RESULT | changed | {"dataset_name": "vtab/dtd"}
    check_comparable({"first": RESULT, "second": RESULT, "third": other})


def test_digits_have_one_fingerprint_for_each_seed():
    first, same, other = (fingerprint(load_image_dataset("digits", seed=seed)["test"]) for seed in (0, 0, 1))
    assert first == same != other
