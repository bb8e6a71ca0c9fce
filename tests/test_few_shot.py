"""Few images of each class, drawn by a seed; and classes that are missing, empty or out of range."""

import shutil

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, Value
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from hf_vpt.data import AugmentedImages, ImageTransform, load_image_dataset
from hf_vpt.training import DataArguments, build_trainer, parse_arguments


def save(folder, label_type=None, **splits):
    """Write splits, lists of labels, whose images have grey values of their own."""
    features = Features({"image": Image(), "label": label_type or ClassLabel(names=["a", "b", "c"])})
    data = {}
    for number, (split, labels) in enumerate(splits.items()):
        images = [PILImage.new("L", (2, 2), 80 * number + index) for index in range(len(labels))]
        data[split] = Dataset.from_dict({"image": images, "label": labels}, features=features)
    DatasetDict(data).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    # Classes of different size, in no order.
    labels = np.random.default_rng(0).permutation([0] * 20 + [1] * 10 + [2] * 5).tolist()
    return save(tmp_path / "data", train=labels, validation=[0, 1, 2] * 4, test=[0, 1, 2] * 3)


def greys(data):
    return {np.asarray(image)[0, 0].item() for image in data["image"]}


@pytest.mark.parametrize("number", [1, 5])
def test_so_many_images_of_each_class_are_left_in_train_and_all_in_the_others(folder, number):
    splits = load_image_dataset(folder, images_per_class=number)
    assert np.bincount(splits["train"]["label"]).tolist() == [number] * 3
    assert len(greys(splits["train"])) == 3 * number
    assert (len(splits["validation"]), len(splits["test"])) == (12, 9)


def test_the_seed_decides_which_and_few_images_are_among_more(folder):
    few, same, more, other = (
        greys(load_image_dataset(folder, images_per_class=number, seed=seed)["train"])
        for number, seed in ((2, 0), (2, 0), (4, 0), (2, 1))
    )
    assert few == same < more
    assert few != other


def test_validation_may_be_cut_as_well(folder):
    splits = load_image_dataset(folder, images_per_class=2, validation_images_per_class=3)
    assert np.bincount(splits["validation"]["label"]).tolist() == [3] * 3
    assert len(load_image_dataset(folder, validation_images_per_class=3)["train"]) == 35


def test_a_drawn_validation_split_is_drawn_before_images_are_few(tmp_path):
    folder = save(tmp_path / "data", train=[0, 1, 2] * 20, test=[0, 1, 2])
    whole, few = (load_image_dataset(folder, images_per_class=number) for number in (None, 4))
    assert greys(few["validation"]) == greys(whole["validation"])
    assert greys(few["train"]) < greys(whole["train"])


def test_a_class_with_fewer_images_is_named_with_their_number(folder):
    with pytest.raises(ValueError, match=r"train split.* fewer than 6 images of 1 of its 3 classes: 'c' \(5\).*fewer"):
        load_image_dataset(folder, images_per_class=6)
    with pytest.raises(ValueError, match=r"validation split.* fewer than 5 .*'a' \(4\), 'b' \(4\), 'c' \(4\)"):
        load_image_dataset(folder, validation_images_per_class=5)


def test_numbers_below_one_are_refused(folder):
    with pytest.raises(ValueError, match="Found 0 images a class.*At least 1"):
        load_image_dataset(folder, images_per_class=0)
    with pytest.raises(ValueError, match="validation_images_per_class is 0. It must be at least 1"):
        DataArguments(validation_images_per_class=0)


def test_what_lies_on_the_disk_streams_few_images_and_what_is_not_counted_refuses(folder, tmp_path):
    stream = load_image_dataset(folder, images_per_class=2, streaming=True)["train"]
    assert isinstance(stream, IterableDataset)
    assert sorted(example["label"] for example in stream) == [0, 0, 1, 1, 2, 2]
    (tmp_path / "parquet").mkdir()
    DatasetDict.load_from_disk(folder)["train"].to_parquet(tmp_path / "parquet" / "train.parquet")
    with pytest.raises(ValueError, match="streaming and images_per_class.*leave streaming out"):
        load_image_dataset(str(tmp_path / "parquet"), images_per_class=2, streaming=True)


def test_a_run_takes_the_number_from_its_settings_and_does_not_go_on_with_another(folder, tmp_path):
    options = ["--dataset_name", folder, "--output_dir", str(tmp_path / "out"), "--use_cpu", "--images_per_class"]
    trainers = {}
    for number in ("3", "4"):
        trainers[number], data = build_trainer(parse_arguments(["--method", "linear_probe", *options, number]))
        assert len(data["train"]) == 3 * int(number)
    identities = [
        next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "RunIdentity")
        for trainer in trainers.values()
    ]
    with pytest.raises(ValueError, match="images_per_class 3, and a run with images_per_class 4"):
        identities[1].load_state_dict(identities[0].state_dict())


@pytest.fixture
def broken(tmp_path):
    """Ten images of each of two classes; of class a all are broken but three, of class b one."""
    for number in range(20):
        name = "ab"[number % 2]
        (tmp_path / "files" / name).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "files" / name / f"{number:02d}.png"
        PILImage.new("L", (2, 2), 10 * number).save(path)
        if (name == "a" and number >= 6) or number == 7:
            path.write_bytes(b"broken")
    for split in ("train", "validation", "test"):
        shutil.copytree(tmp_path / "files", tmp_path / "images" / split)
    return str(tmp_path / "images")


def test_few_images_are_drawn_among_those_that_can_be_read(broken):
    # Regression: so many images of each class were drawn first, and the broken ones among them were missing then.
    for number in (1, 3):
        splits = load_image_dataset(broken, images_per_class=number, broken_images="skip")
        images = AugmentedImages(splits["train"], transform(), broken_images="skip")
        assert np.bincount([example["labels"] for example in images]).tolist() == [number] * 2
        assert images.num_broken == len(splits["train"]) - 2 * number
    assert images.num_broken > 0


def test_few_readable_images_are_among_more(broken):
    few, more = (
        paths(load_image_dataset(broken, images_per_class=number, broken_images="skip")["train"]) for number in (1, 2)
    )
    assert few < more


def test_a_class_with_fewer_images_that_can_be_read_is_named_with_their_number(broken):
    with pytest.raises(ValueError, match=r"fewer than 4 images that can be read of 1 of its 2 classes: 'a' \(3\)"):
        load_image_dataset(broken, images_per_class=4, broken_images="skip")


def test_a_run_has_so_many_images_of_each_class_and_counts_the_broken_ones_it_met(broken, tmp_path):
    options = f"--dataset_name {broken} --output_dir {tmp_path}/out --use_cpu --method linear_probe".split()
    options += ["--images_per_class", "3", "--broken_images", "skip"]
    trainer, data = build_trainer(parse_arguments(options))
    labels = [data["train"].images[index]["label"] for index in range(len(data["train"]))]
    assert np.bincount(labels).tolist() == [3, 3]
    assert data["train"].num_broken > 0


def test_a_class_that_loses_its_only_images_because_they_are_broken_is_named(broken, tmp_path):
    for path in (tmp_path / "images" / "train" / "a").iterdir():
        path.write_bytes(b"broken")
    options = f"--dataset_name {broken} --output_dir {tmp_path}/out --use_cpu --method linear_probe".split()
    with pytest.raises(ValueError, match="no training images of 1 of its 2 classes: 'a'"):
        build_trainer(parse_arguments([*options, "--broken_images", "skip"]))


def paths(data):
    return {image["path"] for image in data.cast_column("image", Image(decode=False))["image"]}


def transform():
    return ImageTransform(ViTImageProcessor(size={"height": 2, "width": 2}))


# --- validation images that are trained on


def test_validation_images_join_train_and_stay_in_validation(folder, tmp_path):
    apart, together = (load_image_dataset(folder, train_on_validation=joined) for joined in (False, True))
    assert greys(together["train"]) == greys(apart["train"]) | greys(apart["validation"])
    assert len(together["train"]) == len(apart["train"]) + len(apart["validation"])
    assert greys(together["validation"]) == greys(apart["validation"])
    assert greys(together["test"]) == greys(apart["test"])
    stream = load_image_dataset(folder, train_on_validation=True, streaming=True)
    assert len(list(stream["train"])) == len(together["train"])
    (tmp_path / "parquet").mkdir()
    apart["train"].to_parquet(tmp_path / "parquet" / "train.parquet")
    with pytest.raises(ValueError, match="streaming and train_on_validation"):
        load_image_dataset(str(tmp_path / "parquet"), train_on_validation=True, streaming=True)


def test_images_that_are_trained_on_do_not_choose_the_epoch(folder, tmp_path):
    options = ["--method", "linear_probe", "--dataset_name", folder, "--use_cpu", "--train_on_validation"]
    options += ["--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="cannot tell the best epoch: add --no_load_best_model_at_end"):
        build_trainer(parse_arguments(options))
    _, data = build_trainer(parse_arguments([*options, "--no_load_best_model_at_end"]))
    assert (len(data["train"]), len(data["validation"])) == (47, 12)


# --- classes that cannot be right


def test_classes_without_training_images_are_named(tmp_path):
    folder = save(tmp_path / "data", train=[0] * 5 + [2] * 5, test=[0, 1, 2])
    with pytest.raises(ValueError, match="no training images of 1 of its 3 classes: 'b'. Each class needs some"):
        load_image_dataset(folder)
    names = ClassLabel(names=[f"class {number}" for number in range(30)])
    folder = save(tmp_path / "many", names, train=[0] * 5, test=[0])
    with pytest.raises(ValueError, match=r"29 of its 30 classes: 'class 1', .*'class 10', \.\.\.\. Each"):
        load_image_dataset(folder)


@pytest.mark.parametrize("label", [-1, None])
def test_an_image_without_a_class_is_named_by_its_position(tmp_path, label):
    folder = save(tmp_path / "data", train=[0, 1, 2, label] + [0, 1, 2] * 5, test=[0, 1, 2])
    with pytest.raises(ValueError, match=f"image 3 of the train split has the class {label}. Classes from 0 to 2"):
        load_image_dataset(folder)


@pytest.mark.parametrize(("kind", "absent"), [("int64", -1), ("int64", None), ("string", None)])
def test_a_test_split_without_classes_is_not_used_whatever_type_its_column_has(tmp_path, kind, absent):
    # Regression: -1 became a class of its own where labels are plain integers, and None could not be sorted.
    labels = [3, 5] * 20 if kind == "int64" else ["3", "5"] * 20
    folder = save(tmp_path / "data", Value(kind), train=labels, test=[absent] * 4)
    splits = load_image_dataset(folder)
    assert splits["train"].features["label"].names == ["3", "5"]
    assert len(splits["test"]) == 8


def test_a_class_outside_the_names_is_an_error(tmp_path):
    folder = save(tmp_path / "data", Value("int64"), train=[0, 1, 2, 7] * 5, test=[0])
    data = DatasetDict.load_from_disk(folder)
    # As files of other origin may have it: types say three classes, values say more.
    info = {split: part.info.features.copy() for split, part in data.items()}
    for split, part in data.items():
        part.info.features = Features(info[split] | {"label": ClassLabel(names=["a", "b", "c"])})
    data.save_to_disk(tmp_path / "wrong")
    with pytest.raises(ValueError, match="image 3 of the train split has the class 7. Classes from 0 to 2"):
        load_image_dataset(str(tmp_path / "wrong"))
