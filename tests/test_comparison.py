"""Results say which images they are on, and those on different ones do not stand in one table."""

import io
import json
import shutil
import sys
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
    with pytest.raises(ValueError, match=f"'vtab/cifar100' with .*{words}.*must be on the same images.*two tables"):
        check_comparable({"first": RESULT, "second": RESULT | changed})
    other = RESULT | changed | {"dataset_name": "vtab/dtd"}
    check_comparable({"first": RESULT, "second": RESULT, "third": other})


def test_the_results_table_refuses_to_mix_variants(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import results_table

    numbers = {"test_accuracy": 0.5, "method": "vpt", "trained_parameters": 9, "trained_parameters_without_head": 4}
    for name, fingerprint_ in (("vpt/digits", "1"), ("vapt/digits", "1"), ("bpt/digits", "1")):
        folder = tmp_path / name / "seed0"
        folder.mkdir(parents=True)
        result = RESULT | numbers | {"dataset_fingerprint": {"test": fingerprint_}}
        (folder / "metrics.json").write_text(json.dumps(result))
        (folder / "timings.json").write_text(json.dumps({"train_cpu_seconds": 3.0}))
    monkeypatch.setattr(sys, "argv", ["results_table.py", str(tmp_path)])
    results_table.main()
    assert capsys.readouterr().out.count("| 50.0 |") == 3
    (folder / "metrics.json").write_text(json.dumps(result | {"dataset_variant": "full"}))
    with pytest.raises(ValueError, match="dataset_variant zip .*vpt/digits/seed0/metrics.json.* and full"):
        results_table.main()
    assert "50.0" not in capsys.readouterr().out
    sys.modules.pop("results_table")


def test_digits_have_one_fingerprint_for_each_seed():
    first, same, other = (fingerprint(load_image_dataset("digits", seed=seed)["test"]) for seed in (0, 0, 1))
    assert first == same != other
