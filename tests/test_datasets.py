"""Data sets of any layout become train, validation and test splits with the columns image and label."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from datasets.exceptions import DatasetNotFoundError
from PIL import Image as PILImage

from hf_vpt.data import load_image_dataset
from hf_vpt.data.splits import rename_splits


CLASSES = ("cat", "dog", "emu")


def write_images(folder, per_class=10, classes=CLASSES):
    """Write `per_class` images for each class, every one of its own grey value, in one subfolder a class."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            grey = np.full((4, 6), 20 * number + index, dtype=np.uint8)
            PILImage.fromarray(grey).save(folder / name / f"{index}.png")
    return folder


def save_parquet_splits(folder, columns, features=None, splits=("train",), repeat=10):
    """Write a data set with one parquet file a split; each column's values are repeated `repeat` times."""
    folder.mkdir()
    num_rows = len(next(iter(columns.values()))) * repeat
    picture = PILImage.new("L", (4, 4))
    rows = {"picture": [picture] * num_rows} | {name: values * repeat for name, values in columns.items()}
    types = {"picture": Image()} | (features or {name: Value("string") for name in columns})
    for split in splits:
        Dataset.from_dict(rows, features=Features(types)).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def load(folder, tmp_path, **kwargs):
    return load_image_dataset(str(folder), cache_dir=str(tmp_path / "cache"), **kwargs)


def grey_values(data):
    return sorted(np.asarray(image)[0, 0].item() for image in data["image"])


def test_folder_without_splits_is_divided_in_three_disjoint_parts(tmp_path):
    splits = load(write_images(tmp_path / "animals"), tmp_path)
    assert {split: len(data) for split, data in splits.items()} == {"train": 19, "validation": 5, "test": 6}
    # Every image has a grey value of its own, so equality with the full list means nothing is lost or used twice.
    together = sorted(sum((grey_values(data) for data in splits.values()), []))
    assert together == sorted(20 * number + index for number in range(3) for index in range(10))


def test_columns_and_class_names_are_the_same_in_every_split(tmp_path):
    for data in load(write_images(tmp_path / "animals"), tmp_path).values():
        assert data.column_names == ["image", "label"]
        assert isinstance(data.features["image"], Image)
        assert data.features["label"].names == list(CLASSES)


def test_drawn_splits_hold_every_class_in_proportion(tmp_path):
    splits = load(write_images(tmp_path / "animals"), tmp_path)
    assert [splits["test"]["label"][:].count(number) for number in range(3)] == [2, 2, 2]
    assert set(splits["validation"]["label"]) == {0, 1, 2}


def test_drawn_splits_depend_on_the_seed_alone(tmp_path):
    folder = write_images(tmp_path / "animals")
    first, same, other = (load(folder, tmp_path, seed=seed)["test"] for seed in (0, 0, 1))
    assert grey_values(first) == grey_values(same)
    assert grey_values(first) != grey_values(other)


def test_published_splits_are_kept_as_they_are(tmp_path):
    for split, per_class in (("train", 5), ("validation", 2), ("test", 3)):
        write_images(tmp_path / "animals" / split, per_class)
    splits = load(tmp_path / "animals", tmp_path)
    assert {split: len(data) for split, data in splits.items()} == {"train": 15, "validation": 6, "test": 9}


def test_validation_is_drawn_from_train_where_only_test_is_published(tmp_path):
    write_images(tmp_path / "animals" / "train", 10)
    write_images(tmp_path / "animals" / "test", 3)
    splits = load(tmp_path / "animals", tmp_path, validation_fraction=0.3)
    assert {split: len(data) for split, data in splits.items()} == {"train": 21, "validation": 9, "test": 9}


def test_published_validation_becomes_the_test_split_where_there_is_no_other(tmp_path):
    write_images(tmp_path / "animals" / "train", 10)
    write_images(tmp_path / "animals" / "val", 3)
    splits = load(tmp_path / "animals", tmp_path)
    assert {split: len(data) for split, data in splits.items()} == {"train": 24, "validation": 6, "test": 9}


def test_string_labels_become_class_labels(tmp_path):
    folder = save_parquet_splits(tmp_path / "data", {"species": ["dog", "cat"]}, splits=("train", "test"))
    splits = load(folder, tmp_path)
    assert splits["test"].features["label"].names == ["cat", "dog"]
    assert splits["test"]["label"][:2] == [1, 0]


def test_integer_labels_are_sorted_as_numbers(tmp_path):
    folder = save_parquet_splits(tmp_path / "data", {"year": [2, 10]}, {"year": Value("int64")})
    splits = load(folder, tmp_path)
    assert splits["train"].features["label"].names == ["2", "10"]


def test_class_label_column_is_preferred_to_other_columns(tmp_path):
    columns = {"photographer": ["x", "y"], "breed": [1, 0]}
    types = {"photographer": Value("string"), "breed": ClassLabel(names=["pug", "husky"])}
    splits = load(save_parquet_splits(tmp_path / "data", columns, types), tmp_path)
    assert splits["train"].features["label"].names == ["pug", "husky"]


def test_ambiguous_label_columns_are_an_error_that_lists_them(tmp_path):
    columns = {"fine": [0, 1], "coarse": [0, 1]}
    types = {name: ClassLabel(num_classes=2) for name in columns}
    folder = save_parquet_splits(tmp_path / "data", columns, types)
    with pytest.raises(ValueError, match=r"2 columns.*'fine', 'coarse'.*label_column"):
        load(folder, tmp_path)
    assert load(folder, tmp_path, label_column="coarse")["train"].column_names == ["image", "label"]


def test_missing_column_is_an_error_that_lists_what_there_is(tmp_path):
    folder = save_parquet_splits(tmp_path / "data", {"species": ["dog", "cat"]})
    with pytest.raises(ValueError, match=r"no column 'kind' among 'picture' \(Image\), 'species' \(Value\)"):
        load(folder, tmp_path, label_column="kind")


def test_data_without_images_is_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"label": [0, 1]}).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match="0 columns of type Image.*image_column"):
        load(tmp_path / "data", tmp_path)


def test_unlabelled_test_split_is_not_used_for_scoring(tmp_path):
    picture, features = PILImage.new("L", (4, 4)), Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    labelled = Dataset.from_dict({"image": [picture] * 20, "label": [0, 1] * 10}, features=features)
    unlabelled = Dataset.from_dict({"image": [picture] * 4, "label": [-1] * 4}, features=features)
    DatasetDict(train=labelled, test=unlabelled).save_to_disk(tmp_path / "data")
    splits = load(tmp_path / "data", tmp_path)
    assert set(splits["test"]["label"]) == {0, 1}


def test_class_with_one_image_cannot_be_split_and_is_named(tmp_path):
    write_images(tmp_path / "animals", 5, ["cat", "dog"])
    write_images(tmp_path / "more", 1, ["emu"])
    (tmp_path / "more" / "emu").rename(tmp_path / "animals" / "emu")
    with pytest.raises(ValueError, match="smallest class: 'emu', 1.*At least two images a class"):
        load(tmp_path / "animals", tmp_path)


def test_folder_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder.*correct the path"):
        load_image_dataset(str(tmp_path / "nowhere"))


def test_data_without_a_train_split_is_an_error(tmp_path):
    write_images(tmp_path / "animals" / "test", 3)
    with pytest.raises(ValueError, match=r"splits \['test'\].*train is needed"):
        load(tmp_path / "animals", tmp_path)


def test_fraction_outside_zero_to_one_is_refused():
    with pytest.raises(ValueError, match="validation_fraction is 1.5"):
        load_image_dataset("digits", validation_fraction=1.5)


def test_class_names_that_differ_between_splits_are_an_error(tmp_path):
    # Regression: the names of train were given to the numbers of test, so that all cats were scored as dogs.
    for number, names in enumerate([["dog", "cat"], ["cat", "dog", "emu"]]):
        parts = {}
        for split, own in {"train": ["cat", "dog"], "test": names}.items():
            features = Features({"image": Image(), "label": ClassLabel(names=own)})
            rows = {"image": [PILImage.new("L", (4, 4))] * 20, "label": [0, 1] * 10}
            parts[split] = Dataset.from_dict(rows, features=features)
        DatasetDict(parts).save_to_disk(tmp_path / str(number))
        with pytest.raises(ValueError, match=r"in its test split and \['cat', 'dog'\] in its train split.*same"):
            load(tmp_path / str(number), tmp_path)


def test_labels_that_are_numbers_in_one_split_and_words_in_another_are_an_error(tmp_path):
    picture = [PILImage.new("L", (4, 4))] * 20
    parts = {
        split: Dataset.from_dict(
            {"image": picture, "label": [0, 1] * 10 if kind == "int64" else ["0", "1"] * 10},
            features=Features({"image": Image(), "label": Value(kind)}),
        )
        for split, kind in {"train": "int64", "test": "string"}.items()
    }
    DatasetDict(parts).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="labels string in its test split and integers in its train split"):
        load(tmp_path / "data", tmp_path)


def test_boolean_labels_become_class_labels(tmp_path):
    # Regression: the names were True and False, and the labels, as Arrow writes them, true and false.
    folder = save_parquet_splits(tmp_path / "data", {"is_ill": [True, False]}, {"is_ill": Value("bool")})
    splits = load(folder, tmp_path)
    assert splits["train"].features["label"].names == ["false", "true"]
    assert sorted(set(splits["train"]["label"])) == [0, 1]


def test_a_split_without_the_label_column_is_named(tmp_path):
    picture, features = PILImage.new("L", (4, 4)), Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    train = Dataset.from_dict({"image": [picture] * 20, "label": [0, 1] * 10}, features=features)
    DatasetDict(train=train, test=train.remove_columns("label")).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="test split: there is no column 'label' among 'image'"):
        load(tmp_path / "data", tmp_path)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"label_column": "weight"}, "train split: 'weight' holds no classes.*name another column with label_column"),
        ({"label_column": "boxes"}, "'boxes' holds no classes"),
        ({"image_column": "weight"}, "'weight' holds no images.*name another one with image_column"),
    ],
)
def test_a_column_that_cannot_be_what_it_is_named_for_is_an_error(tmp_path, option, words):
    columns = {"weight": [1.5, 2.5], "boxes": [[1, 2], [3, 4]], "kind": ["a", "b"]}
    types = {"weight": Value("float32"), "boxes": List(Value("int32")), "kind": Value("string")}
    folder = save_parquet_splits(tmp_path / "data", columns, types)
    with pytest.raises(ValueError, match=words):
        load(folder, tmp_path, **option)


def test_of_two_names_for_one_split_the_usual_one_is_used():
    # Regression: the one that came last took the other's place without a word.
    parts = {}
    for number, split in enumerate(["train", "validation", "dev", "test", "eval"]):
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
        rows = {"image": [PILImage.new("L", (4, 4), number)] * 4, "label": [0, 1] * 2}
        parts[split] = Dataset.from_dict(rows, features=features)
    splits = rename_splits(DatasetDict(parts), "birds")
    assert {split: grey_values(data)[0] for split, data in splits.items()} == {"train": 0, "validation": 1, "test": 3}


def test_one_split_that_was_saved_alone_is_training_data(tmp_path):
    picture, features = PILImage.new("L", (4, 4)), Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict({"image": [picture] * 20, "label": [0, 1] * 10}, features=features).save_to_disk(tmp_path / "d")
    assert sum(len(data) for data in load(tmp_path / "d", tmp_path).values()) == 20


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed of the splits is -1. It must be at least 0"):
        load_image_dataset("digits", seed=-1)


@pytest.mark.parametrize("above", ["", "train"])
def test_classes_whose_names_tell_of_splits_are_classes(tmp_path, above):
    # Regression: `datasets` looks for these words in every part of a path. Images of a class "test strip" were in the
    # test split too, and of the classes "bus", "train" and "train station" the first was left out.
    names = ["bus", "test strip", "train", "train station", "validation-stamp"]
    write_images(tmp_path / "pictures" / above, 10, names)
    splits = load(tmp_path / "pictures", tmp_path)
    assert splits["train"].features["label"].names == names
    together = sorted(sum((grey_values(data) for data in splits.values()), []))
    assert together == sorted(20 * number + index for number in range(5) for index in range(10))


def test_names_of_split_folders_may_begin_with_a_capital_and_lack_a_class(tmp_path):
    write_images(tmp_path / "animals" / "Train", 10)
    write_images(tmp_path / "animals" / "Test", 3, ["dog"])
    splits = load(tmp_path / "animals", tmp_path)
    assert {split: len(data) for split, data in splits.items()} == {"train": 24, "validation": 6, "test": 3}
    assert set(splits["test"]["label"]) == {1}


@pytest.mark.parametrize("above", ["", "train"])
def test_the_folder_of_a_class_without_images_is_named(tmp_path, above):
    write_images(tmp_path / "animals" / above, 10)
    (tmp_path / "animals" / above / "yak").mkdir()
    with pytest.raises(ValueError, match="yak' has nothing in it.*add images, or remove the folder"):
        load(tmp_path / "animals", tmp_path)


def test_images_in_folders_of_splits_without_classes_are_an_error(tmp_path):
    write_images(tmp_path / "animals", 10, ["train", "test"])
    with pytest.raises(ValueError, match="image 0 of the train split has the class None"):
        load(tmp_path / "animals", tmp_path)


def test_a_folder_whose_images_are_described_by_a_file_is_left_to_datasets(tmp_path):
    folder = write_images(tmp_path / "animals", 10, ["cat", "dog"])
    rows = [f"{name}/{index}.png,{index % 2}" for name in ("cat", "dog") for index in range(10)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,is_ill", *rows]))
    splits = load(folder, tmp_path)
    assert splits["train"].features["label"].names == ["0", "1"]
    assert sum(len(data) for data in splits.values()) == 20


@pytest.mark.parametrize("error", [ConnectionError, DatasetNotFoundError])
def test_a_name_that_neither_the_disk_nor_the_hub_knows_is_an_error_that_says_what_names_are(error, monkeypatch):
    def refuse(name, *args, **kwargs):
        raise error(f"no {name}")

    monkeypatch.setattr("hf_vpt.data.datasets.load_dataset", refuse)
    with pytest.raises(error, match=r"'digit' is no folder.*\(no digit\).*data set is 'digits'.*correct the name"):
        load_image_dataset("digit")
