"""Benchmarks, lists and shards in the layouts they are published in, built small and read by the code that is used."""

import errno
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from datasets import IterableDataset
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from scipy.io import savemat

from hf_vpt.data import load_image_dataset
from hf_vpt.data.sources import FGVC, VTAB, resolve_variant, shards, vtab
from hf_vpt.data.sources import fgvc as fgvc_module
from hf_vpt.training import DataArguments


CONFIGS = Path(__file__).parents[1] / "configs"
SPLITS = ("train", "validation", "test")


def jpeg(grey, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("L", (5, 4), grey).save(buffer, format=kind)
    return buffer.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def greys(data):
    return [np.asarray(image)[0, 0].item() for image in data["image"]]


def vtab_files(folder="dtd", num_classes=47):
    """The folder of a task as `vtab-1k.zip` has it: images, whose grey value is their class, and lists of them."""
    files, lists = {}, {}
    for name, numbers in {"train800": range(0, 60), "val200": range(60, 70), "test": range(70, 90)}.items():
        part = "test" if name == "test" else "train800val200"
        lines = [f"images/{part}/{number:06d}.png {number % num_classes}" for number in numbers]
        files |= {f"{folder}/{line.split()[0]}": jpeg(int(line.split()[1])) for line in lines}
        lists[name] = lines
    lists["train800val200"] = lists["train800"] + lists["val200"]
    return files | {f"{folder}/{name}.txt": "\n".join(lines) + "\n" for name, lines in lists.items()}


def write_zip(path, files, above=""):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(above + name, content)
    return path


def write_tar(path, images, kind="webp"):
    """Write a shard: `images` maps names to a grey value and a class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, (grey, label) in images.items():
            for ending, content in ((kind, jpeg(grey, kind.upper())), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def load(tmp_path):
    def load(name, **kwargs):
        return load_image_dataset(name, cache_dir=str(tmp_path / "cache"), **kwargs)

    return load


# --- names and variants


def test_every_data_set_that_a_configuration_names_has_a_source():
    named = {f"{file.parent.name}/{file.stem.partition('_')[0]}" for file in CONFIGS.glob("*/fgvc/*.yaml")}
    named |= {f"vtab/{file.stem}" for file in CONFIGS.glob("*/vtab/*.yaml")}
    assert named == {f"vtab/{task}" for task in VTAB} | {f"fgvc/{name}" for name in FGVC}
    assert len(VTAB) == 19


@pytest.mark.parametrize(
    ("name", "variant", "data_dir", "words"),
    [
        ("vtab/cifar", None, None, r"'vtab/cifar'.*vtab has caltech101, camelyon, cifar100.*choose one"),
        ("fgvc/birds", None, None, "fgvc has cub, nabirds, oxfordflower, stanfordcars, stanforddogs"),
        ("vtab/dtd", "hub", None, "dataset_variant is 'hub'.*zip, full.*choose one"),
        ("fgvc/nabirds", "hub", None, "No public copy.*pass the folder as dataset_dir"),
        ("fgvc/cub", "hub", "birds", "dataset_variant hub and dataset_dir 'birds'.*choose the variant official"),
        ("digits", "zip", None, "dataset_variant with the data set 'digits'.*leave it out"),
        ("digits", None, "birds", "dataset_dir with the data set 'digits'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(name, variant, data_dir, words):
    with pytest.raises(ValueError, match=words):
        DataArguments(dataset_name=name, dataset_variant=variant, dataset_dir=data_dir)


def test_variants_have_defaults_that_follow_the_folder():
    assert resolve_variant("vtab/dtd") == "zip"
    assert resolve_variant("fgvc/cub") == "hub"
    assert resolve_variant("fgvc/cub", None, "folder") == "official"
    assert resolve_variant("digits") is None


def test_a_set_without_a_public_copy_asks_for_its_folder(load):
    with pytest.raises(ValueError, match="fgvc/nabirds without dataset_dir.*download it from its authors"):
        load("fgvc/nabirds")


def test_benchmarks_are_not_streamed(load):
    with pytest.raises(ValueError, match="streaming and the benchmark 'vtab/dtd'.*leave streaming out"):
        load("vtab/dtd", streaming=True)


# --- the archive of VTAB-1k


@pytest.mark.parametrize("above", ["", "vtab-1k/"])
def test_the_archive_on_the_hub_gives_the_splits_its_lists_name(load, tmp_path, monkeypatch, above):
    path, asked = write_zip(tmp_path / "vtab-1k.zip", vtab_files(), above), []
    monkeypatch.setattr(vtab, "hf_hub_download", lambda *args, **kwargs: asked.append((args, kwargs)) or str(path))
    splits = load("vtab/dtd", revision="abc")
    ((args, kwargs),) = asked
    assert args == ("XiN0919/VTAB-1k", "vtab-1k.zip")
    assert (kwargs["repo_type"], kwargs["revision"]) == ("dataset", "abc")
    for split, numbers in zip(SPLITS, (range(60), range(60, 70), range(70, 90)), strict=True):
        assert splits[split]["label"][:] == [number % 47 for number in numbers]
        assert greys(splits[split]) == splits[split]["label"][:]
        assert splits[split].features["label"].names == [str(number) for number in range(47)]


def test_a_local_archive_and_its_unpacked_folder_are_the_same(load, tmp_path):
    path = write_zip(tmp_path / "vtab-1k.zip", vtab_files() | {"svhn/test.txt": "", "__MACOSX/dtd/test.txt": ""})
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    expected = load("vtab/dtd", data_dir=str(path))
    for folder in (tmp_path, tmp_path / "unpacked", tmp_path / "unpacked" / "dtd"):
        found = load("vtab/dtd", data_dir=str(folder))
        assert all(greys(found[split]) == greys(expected[split]) for split in SPLITS)


@pytest.mark.parametrize("variant", ["zip", "full"])
def test_the_folder_of_another_task_is_refused_although_its_classes_would_fit(load, tmp_path, monkeypatch, variant):
    # Regression: the ten classes of SVHN are in the range of DTD's 47, and were learned in their place.
    if variant == "zip":
        for name, content in vtab_files("svhn", 10).items():
            write(tmp_path / name, content)
        folder = tmp_path / "svhn"
    else:
        folder = tmp_path / "wds_vtab-svhn"
        write_tar(folder / "train" / "0.tar", {str(number): (1, number % 10) for number in range(30)}, "png")
    words = "for vtab/dtd, and it is that of vtab/svhn.*correct dataset_dir"
    with pytest.raises(ValueError, match=words):
        load("vtab/dtd", variant=variant, data_dir=str(folder))
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=words):
        load("vtab/dtd", variant=variant, data_dir=".")


def test_archives_are_unpacked_where_all_caches_lie(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_vpt.data.cache.HF_HOME", str(tmp_path / "home"))
    load_image_dataset("vtab/dtd", data_dir=str(write_zip(tmp_path / "vtab-1k.zip", vtab_files())))
    assert [path.parents[2] for path in (tmp_path / "home").rglob("test.txt")] == [tmp_path / "home/hf_vpt/vtab-1k"]


def test_of_two_folders_of_a_task_in_one_archive_every_process_takes_the_same(load, tmp_path):
    files = {f"{above}/{name}": content for above in "ba" for name, content in vtab_files().items()}
    files["a/dtd/test.txt"] = "images/test/000070.png 23\n"
    splits = load("vtab/dtd", data_dir=str(write_zip(tmp_path / "vtab-1k.zip", files)))
    assert len(splits["test"]) == 1


def test_an_archive_is_unpacked_once_and_another_one_is_not_mistaken_for_it(load, tmp_path, monkeypatch):
    path = write_zip(tmp_path / "vtab-1k.zip", vtab_files())
    load("vtab/dtd", data_dir=str(path))
    monkeypatch.setattr(zipfile.ZipFile, "extract", None)  # a second time would fail
    load("vtab/dtd", data_dir=str(path))
    monkeypatch.undo()
    files = vtab_files()
    write_zip(path, files | {name: jpeg(200) for name in files if name.endswith("000000.png")})
    assert greys(load("vtab/dtd", data_dir=str(path))["train"])[0] == 200


def test_an_archive_that_is_not_vtab_is_an_error_that_lists_what_is_missing(load, tmp_path):
    files = {name: content for name, content in vtab_files().items() if "val200.txt" not in name}
    with pytest.raises(ValueError, match=r"not VTAB-1k.*dtd/val200.txt, dtd/train800val200.txt cannot be found"):
        load("vtab/dtd", data_dir=str(write_zip(tmp_path / "some.zip", files)))
    with pytest.raises(ValueError, match=r"svhn/train800.txt, svhn/val200.txt, svhn/test.txt, svhn/train800val200"):
        load("vtab/svhn", data_dir=str(tmp_path / "some.zip"))
    with pytest.raises(ValueError, match=r"is no zip archive.*download it again"):
        load("vtab/dtd", data_dir=str(write(tmp_path / "page.zip", "<html>")))
    with pytest.raises(FileNotFoundError, match=r"not VTAB-1k.*dtd/train800.txt"):
        load("vtab/dtd", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"dtd/val200.txt cannot be found"):
        write(tmp_path / "half" / "dtd" / "test.txt", "")
        write(tmp_path / "half" / "dtd" / "train800.txt", "")
        write(tmp_path / "half" / "dtd" / "train800val200.txt", "")
        load("vtab/dtd", data_dir=str(tmp_path / "half"))


@pytest.mark.parametrize("trouble", ["interrupted", "damaged", "full"])
def test_an_extraction_that_fails_leaves_nothing_behind(load, tmp_path, monkeypatch, trouble):
    path = write_zip(tmp_path / "vtab-1k.zip", vtab_files())
    if trouble == "damaged":
        content = path.read_bytes()
        position = content.index(jpeg(0)) + 40
        path.write_bytes(content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :])
        expected = pytest.raises(ValueError, match="is damaged.*download it again")
    elif trouble == "full":
        usage = namedtuple("usage", "total used free")(10, 10, 1000)
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        expected = pytest.raises(OSError, match=r"has 0 MB left and '.*' needs .* MB there.*free some space")
    else:
        original, calls = zipfile.ZipFile.extract, []

        def extract(self, *args):
            calls.append(args)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return original(self, *args)

        monkeypatch.setattr(zipfile.ZipFile, "extract", extract)
        expected = pytest.raises(KeyboardInterrupt)
    with expected:
        load("vtab/dtd", data_dir=str(path))
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []
    assert list((tmp_path / "cache").rglob("dtd*")) == []
    if trouble != "damaged":
        monkeypatch.undo()
        assert len(load("vtab/dtd", data_dir=str(path))["train"]) == 60


def test_what_a_killed_process_left_is_not_used_and_goes_away_when_it_is_old(load, tmp_path):
    path = write_zip(tmp_path / "vtab-1k.zip", vtab_files())
    load("vtab/dtd", data_dir=str(path))
    (folder,) = (tmp_path / "cache").rglob("dtd")
    old, new = (folder.with_name(f"dtd.draft-{name}") for name in ("old", "new"))
    folder.rename(old)
    (old / "test.txt").unlink()
    shutil.copytree(old, new)
    os.utime(old, (0, 0))
    assert len(load("vtab/dtd", data_dir=str(path))["test"]) == 20
    assert (folder.is_dir(), old.exists(), new.exists()) == (True, False, True)


def test_a_disk_that_fills_up_while_unpacking_or_downloading_says_what_is_needed(load, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", fail)
    with pytest.raises(OSError, match="MB left and '.*' needs .*free some space, or set HF_HOME"):
        load("vtab/dtd", data_dir=str(write_zip(tmp_path / "vtab-1k.zip", vtab_files())))
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    monkeypatch.setattr(vtab, "hf_hub_download", fail)
    with pytest.raises(OSError, match="disk is full, and vtab-1k.zip .*4.66 GB.*set HF_HOME"):
        load("vtab/dtd")


def test_an_old_draft_that_another_process_removes_first_is_no_error(load, tmp_path, monkeypatch):
    path = write_zip(tmp_path / "vtab-1k.zip", vtab_files())
    load("vtab/dtd", data_dir=str(path))
    (folder,) = (tmp_path / "cache").rglob("dtd")
    shutil.rmtree(folder)
    original = Path.glob

    def glob(self, pattern):
        return [*original(self, pattern), *([self / "gone"] if "draft" in pattern else [])]

    monkeypatch.setattr(Path, "glob", glob)
    assert len(load("vtab/dtd", data_dir=str(path))["test"]) == 20


def test_names_in_an_archive_do_not_lead_outside_of_its_folder(load, tmp_path):
    files = vtab_files() | {"dtd/../../../../../evil.txt": "x", "dtd/images/../../../../evil.txt": "x"}
    load("vtab/dtd", data_dir=str(write_zip(tmp_path / "vtab-1k.zip", files)))
    (folder,) = (tmp_path / "cache").rglob("dtd")
    assert {path.is_relative_to(folder) for path in tmp_path.rglob("evil.txt")} == {True}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("images/test/000070.png 47", "'000070.png' the class 47. Classes from 0 to 46 are needed"),
        ("images/test/000070.png -1", "the class -1"),
        ("images/test/000070.png", "Line 1 of .*'images/test/000070.png'. 'path label' is needed"),
        ("images/test/nowhere.png 1", "names 1 images, of which '.*nowhere.png' cannot be found"),
        ("", "names no images"),
    ],
)
def test_a_wrong_list_is_an_error_that_names_line_or_image(load, tmp_path, line, words):
    files = vtab_files() | {"dtd/test.txt": line + "\n"}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load("vtab/dtd", data_dir=str(write_zip(tmp_path / "vtab-1k.zip", files)))


def test_an_archive_that_cannot_be_downloaded_says_what_to_do(load, monkeypatch):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(vtab, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match=r"nor can it be downloaded \(no network\).*4.66 GB.*dataset_dir"):
        load("vtab/dtd")


# --- VTAB-1k drawn from whole data sets


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """1,010 training and 20 test images, each of its own grey value and class, in shards as the Hub has them."""
    folder = tmp_path_factory.mktemp("full") / "wds_vtab-svhn"
    numbers = {f"s{number:07d}": (number % 251, number % 10) for number in range(1010)}
    names = list(numbers)
    write_tar(folder / "train" / "0.tar", {name: numbers[name] for name in names[:600]}, "png")
    write_tar(folder / "train" / "1.tar", {name: numbers[name] for name in names[600:]}, "png")
    write_tar(folder / "test" / "0.tar", {name: numbers[name] for name in names[:20]}, "png")
    write(folder / "train" / "nshards.txt", "2")
    write(folder / "classnames.txt", "\n".join(f"digit {number}" for number in range(10)) + "\n")
    return folder


def test_the_full_variant_draws_800_and_200_images_by_the_seed_alone(load, full):
    first, same, other = (load("vtab/svhn", variant="full", data_dir=str(full), seed=seed) for seed in (0, 0, 1))
    assert {split: len(data) for split, data in first.items()} == {"train": 800, "validation": 200, "test": 20}
    order = np.random.default_rng(0).permutation(1010)
    assert first["train"]["label"][:] == [int(number) % 10 for number in order[:800]]
    assert first["validation"]["label"][:] == [int(number) % 10 for number in order[800:1000]]
    assert greys(same["validation"]) == greys(first["validation"]) != greys(other["validation"])
    assert first["test"]["label"][:] == [number % 10 for number in range(20)]
    assert first["test"].features["label"].names[3] == "digit 3"


def test_the_full_variant_comes_from_the_hub(load, full, monkeypatch):
    original, asked = shards.load_dataset, []

    def load_dataset(repo, data_files, revision, cache_dir):
        asked.append((repo, revision))
        local = {split: str(full / pattern) for split, pattern in data_files.items()}
        return original("webdataset", data_files=local, cache_dir=cache_dir)

    monkeypatch.setattr(shards, "load_dataset", load_dataset)
    monkeypatch.setattr(shards, "hf_hub_download", lambda repo, name, **_: str(full / name))
    splits = load("vtab/svhn", variant="full", revision="abc")
    assert asked == [("clip-benchmark/wds_vtab-svhn", "abc")]
    assert splits["test"].features["label"].names[3] == "digit 3"

    def absent(*args, **kwargs):
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr(shards, "hf_hub_download", absent)
    assert load("vtab/svhn", variant="full")["test"].features["label"].names[3] == "3"


@pytest.mark.parametrize("num_values", [40, 16])
def test_values_of_dsprites_become_the_16_bins_of_vtab_unless_the_shards_hold_bins(load, tmp_path, num_values):
    folder = tmp_path / "wds_vtab-dsprites_label_orientation"
    for split, count in {"train": 1000, "test": 80}.items():
        images = {f"{split}{number}": (number % num_values, number % num_values) for number in range(count)}
        write_tar(folder / split / "0.tar", images, "png")
    write(folder / "classnames.txt", "\n".join(str(number) for number in range(40)))
    splits = load("vtab/dsprites_orientation", variant="full", data_dir=str(tmp_path))
    assert splits["test"].features["label"].names == [str(number) for number in range(16)]
    for data in splits.values():
        assert data["label"][:] == [int(value / (num_values / 16)) for value in greys(data)]


def test_a_full_set_with_too_little_in_it_is_an_error(load, tmp_path, full):
    folder = tmp_path / "wds_vtab-svhn"
    with pytest.raises(FileNotFoundError, match="holds no .tar files.*clip-benchmark/wds_vtab-svhn"):
        load("vtab/svhn", variant="full", data_dir=str(tmp_path))
    write_tar(folder / "train" / "0.tar", {str(number): (1, number % 10) for number in range(30)}, "png")
    with pytest.raises(ValueError, match=r"splits \['train'\] and no test"):
        load("vtab/svhn", variant="full", data_dir=str(tmp_path))
    write_tar(folder / "test" / "0.tar", {"a": (1, 1)}, "png")
    with pytest.raises(ValueError, match="has 30 training images.*draws 1000"):
        load("vtab/svhn", variant="full", data_dir=str(tmp_path))
    write_tar(folder / "test" / "0.tar", {"a": (1, 10)}, "png")
    with pytest.raises(ValueError, match="class 10 in its test split, and 10 classes.*from 0 to 9"):
        load("vtab/svhn", variant="full", data_dir=str(tmp_path))


# --- FGVC as the authors publish it


def write_birds(folder, gaps=False):
    """CUB-200-2011's layout with two classes of 20 training and 2 test images; NABirds' ids of classes have gaps."""
    images, classes, is_train = [], [], []
    for number in range(44):
        path = f"{number % 2:03d}.Bird_{number % 2}/Bird_{number:04d}.jpg"
        write(folder / "images" / path, jpeg(number, "PNG"))
        key = f"{number:08x}-0000" if gaps else str(number + 1)
        images.append(f"{key} {path}")
        classes.append(f"{key} {(817, 1010)[number % 2] if gaps else number % 2 + 1}")
        is_train.append(f"{key} {int(number < 40)}")
    names = ["0 Birds", "817 Snow Goose", "1010 Bald Eagle (Adult)"] if gaps else ["1 001.Auk", "2 002.Emu"]
    files = {"images": images, "image_class_labels": classes, "train_test_split": is_train, "classes": names}
    for name, lines in files.items():
        write(folder / f"{name}.txt", "\n".join(lines) + "\n")


def write_flowers(folder):
    for number in range(1, 31):
        write(folder / "jpg" / f"image_{number:05d}.jpg", jpeg(number))
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1 + number % 2 for number in range(30)]], np.uint8)})
    ids = np.random.default_rng(0).permutation(np.arange(1, 31, dtype=np.uint16))
    savemat(folder / "setid.mat", {"trnid": ids[None, :10], "valid": ids[None, 10:20], "tstid": ids[None, 20:]})
    return [int(number) for number in ids]


def mat_structs(rows):
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for index, row in enumerate(rows):
        array[0, index] = tuple(row.values())
    return array


def mat_cells(values):
    cells = np.empty((len(values), 1), dtype=object)
    cells[:, 0] = values
    return cells


def write_cars(folder, together):
    rows = {"train": [], "test": []}
    names = np.array([["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]], dtype=object)
    for number in range(1, 27):
        split = "train" if number <= 22 else "test"
        place = f"car_ims/{number:06d}.jpg" if together else f"{number:05d}.jpg"
        write(folder / (place if together else f"cars_{split}/{place}"), jpeg(number))
        row = {"relative_im_path" if together else "fname": place, "bbox_x1": 1, "class": 1 + number % 2}
        rows[split].append(row | ({"test": int(split == "test")} if together else {}))
    if together:
        annotations = mat_structs(rows["test"] + rows["train"])
        savemat(folder / "cars_annos.mat", {"annotations": annotations, "class_names": names})
    else:
        (folder / "devkit").mkdir()
        savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": mat_structs(rows["train"])})
        savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": mat_structs(rows["test"])})
        savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})


def write_dogs(folder, lists="lists/"):
    (folder / lists).mkdir(parents=True, exist_ok=True)
    for split, numbers in {"train": range(22), "test": range(22, 26)}.items():
        files = [f"n0208562{n % 2}-{('Chihuahua', 'Maltese_dog')[n % 2]}/n0208562{n % 2}_{n}.jpg" for n in numbers]
        for number, file in zip(numbers, files, strict=True):
            write(folder / "Images" / file, jpeg(number))
        labels = np.array([[1 + number % 2] for number in numbers], np.uint8)
        savemat(folder / lists / f"{split}_list.mat", {"file_list": mat_cells(files), "labels": labels})


@pytest.mark.parametrize(("name", "gaps"), [("cub", False), ("nabirds", True)])
def test_bird_folders_are_read_by_their_text_lists(load, tmp_path, name, gaps):
    write_birds(tmp_path / "CUB_200_2011", gaps)
    # The folder itself, or the one that it was unpacked to.
    for folder in (tmp_path / "CUB_200_2011", tmp_path):
        splits = load(f"fgvc/{name}", data_dir=str(folder))
        assert {split: len(data) for split, data in splits.items()} == {"train": 36, "validation": 4, "test": 4}
        assert greys(splits["test"]) == [40, 41, 42, 43]
        assert sorted(greys(splits["train"]) + greys(splits["validation"])) == list(range(40))
        for data in splits.values():
            assert data["label"][:] == [grey % 2 for grey in greys(data)]
    expected = ["Snow Goose", "Bald Eagle (Adult)"] if gaps else ["001.Auk", "002.Emu"]
    assert splits["train"].features["label"].names == expected


def test_the_validation_split_of_fgvc_is_a_tenth_of_train_whatever_the_fraction_says(load, tmp_path):
    write_birds(tmp_path)
    first, same, other = (
        load("fgvc/cub", data_dir=str(tmp_path), seed=seed, validation_fraction=fraction)
        for seed, fraction in ((0, 0.2), (0, 0.5), (3, 0.2))
    )
    assert len(first["validation"]) == 4
    assert first["validation"]["label"][:].count(0) == 2
    assert greys(first["validation"]) == greys(same["validation"]) != greys(other["validation"])


def test_oxford_flowers_keep_their_three_splits(load, tmp_path):
    ids = write_flowers(tmp_path)
    splits = load("fgvc/oxfordflower", data_dir=str(tmp_path))
    assert [greys(splits[split]) for split in SPLITS] == [ids[:10], ids[10:20], ids[20:]]
    assert splits["test"]["label"][:] == [(number - 1) % 2 for number in ids[20:]]
    assert splits["test"].features["label"].num_classes == 102


@pytest.mark.parametrize("together", [True, False])
def test_stanford_cars_are_read_with_one_list_or_two(load, tmp_path, together):
    write_cars(tmp_path, together)
    splits = load("fgvc/stanfordcars", data_dir=str(tmp_path))
    assert greys(splits["test"]) == [23, 24, 25, 26]
    assert splits["test"]["label"][:] == [1, 0, 1, 0]
    assert sorted(greys(splits["train"]) + greys(splits["validation"])) == list(range(1, 23))
    assert splits["test"].features["label"].names == ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]


def test_the_cars_list_without_classes_is_named(load, tmp_path):
    write_cars(tmp_path, together=False)
    rows = mat_structs([{"fname": "00023.jpg", "bbox_x1": 1}] * 2)
    savemat(tmp_path / "cars_test_annos_withlabels.mat", {"annotations": rows})
    with pytest.raises(ValueError, match="no 'class'.*get cars_test_annos_withlabels.mat"):
        load("fgvc/stanfordcars", data_dir=str(tmp_path))


@pytest.mark.parametrize("lists", ["", "lists/"])
def test_stanford_dogs_have_the_names_of_their_folders(load, tmp_path, lists):
    write_dogs(tmp_path, lists)
    splits = load("fgvc/stanforddogs", data_dir=str(tmp_path))
    assert greys(splits["test"]) == [22, 23, 24, 25]
    assert splits["test"]["label"][:] == [0, 1, 0, 1]
    assert splits["test"].features["label"].names == ["Chihuahua", "Maltese_dog"]


@pytest.mark.parametrize("inside", ["", "images/"])
def test_vpts_lists_decide_all_three_splits(load, tmp_path, inside):
    names = [f"{number:03d}.Bird/{number}.jpg" for number in range(30)]
    for number, name in enumerate(names):
        write(tmp_path / inside / name, jpeg(number))
    for file, part in {"train": range(20), "val": range(20, 24), "test": range(24, 30)}.items():
        classes = {names[number]: (295, 1010)[number % 2] for number in part}  # NABirds' numbers have gaps
        write(tmp_path / f"{file}.json", json.dumps(classes))
    splits = load("fgvc/nabirds", variant="lists", data_dir=str(tmp_path))
    assert [greys(splits[split]) for split in SPLITS] == [list(range(20)), list(range(20, 24)), list(range(24, 30))]
    assert all(data["label"][:] == [grey % 2 for grey in greys(data)] for data in splits.values())
    assert splits["test"].features["label"].names == ["295", "1010"]
    write(tmp_path / "val.json", '["a"]')
    with pytest.raises(ValueError, match="val.json' is no object from paths to numbers.*get the list anew"):
        load("fgvc/nabirds", variant="lists", data_dir=str(tmp_path))
    (tmp_path / "val.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no val.json.*VPT's three lists.*choose variant official"):
        load("fgvc/nabirds", variant="lists", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="fgvc/cub without dataset_dir. Its variant lists"):
        load("fgvc/cub", variant="lists")


def test_a_folder_of_another_set_is_an_error_that_lists_what_is_missing(load, tmp_path):
    write_dogs(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"not fgvc/cub.*images.txt, image_class_labels.txt, .*cannot be found"
    ):
        load("fgvc/cub", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder.*correct dataset_dir"):
        load("fgvc/cub", data_dir=str(tmp_path / "nowhere"))


def test_lists_of_different_releases_are_an_error(load, tmp_path):
    write_birds(tmp_path)
    lines = (tmp_path / "train_test_split.txt").read_text().splitlines()
    write(tmp_path / "train_test_split.txt", "\n".join(lines[1:]))
    with pytest.raises(ValueError, match="train_test_split.txt' does not know the image '1' of images.txt"):
        load("fgvc/cub", data_dir=str(tmp_path))


def test_a_set_with_the_classes_of_another_one_is_refused(load, tmp_path):
    # Regression: CUB's and NABirds' folders look alike, and so do VPT's lists of all sets.
    for number in range(240):
        write(tmp_path / f"{number}.jpg", jpeg(number))
    for file, part in {"train": range(120), "val": range(120), "test": range(120, 240)}.items():
        write(tmp_path / f"{file}.json", json.dumps({f"{number}.jpg": number % 120 + 1 for number in part}))
    with pytest.raises(ValueError, match="has 120 classes, as fgvc/stanforddogs has. The 200 classes of fgvc/cub"):
        load("fgvc/cub", variant="lists", data_dir=str(tmp_path))
    splits = load("fgvc/stanforddogs", variant="lists", data_dir=str(tmp_path))
    assert splits["test"].features["label"].num_classes == 120


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("train_test_split", "1 1", "1 2", "train_test_split.txt' has '2' for the image '1'. 0 .* or 1 .* is needed"),
        ("image_class_labels", "1 1", "1 auk", "image_class_labels.txt' has 'auk' for the image '1'. A number is"),
    ],
)
def test_a_wrong_value_in_the_lists_of_birds_is_named(load, tmp_path, file, old, new, words):
    # Regression: images with another flag than 0 and 1 were left out without a word.
    write_birds(tmp_path)
    lines = (tmp_path / f"{file}.txt").read_text().splitlines()
    assert lines[0] == old
    write(tmp_path / f"{file}.txt", "\n".join([new, *lines[1:]]))
    with pytest.raises(ValueError, match=words):
        load("fgvc/cub", data_dir=str(tmp_path))


def test_a_matlab_file_that_is_none_is_named(load, tmp_path):
    write_flowers(tmp_path)
    write(tmp_path / "setid.mat", "<html>not found</html>" * 20)
    with pytest.raises(ValueError, match="setid.mat' cannot be read as a MATLAB file.*get it anew"):
        load("fgvc/oxfordflower", data_dir=str(tmp_path))


def test_matlab_files_without_scipy_say_what_to_install(load, tmp_path, monkeypatch):
    write_flowers(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(ImportError, match="no SciPy.*pip install scipy.*variant hub"):
        load("fgvc/oxfordflower", data_dir=str(tmp_path))


def test_fgvc_on_the_hub_is_read_without_its_corrupted_copies(load, tmp_path, monkeypatch):
    from datasets import load_dataset

    for split, per_class in {"train": 20, "test": 2, "contrast": 2}.items():
        for number in range(2 * per_class):
            write(tmp_path / "repo" / split / f"car{number % 2}" / f"{number}.png", jpeg(number))
    asked = []

    def local(repo, revision, cache_dir):
        asked.append((repo, revision))
        files = {split: f"{tmp_path}/repo/{split}/**" for split in ("train", "test", "contrast")}
        return load_dataset("imagefolder", data_files=files, cache_dir=cache_dir)

    monkeypatch.setattr(fgvc_module, "load_dataset", local)
    splits = load("fgvc/stanfordcars", revision="abc")
    assert asked == [("tanganke/stanford_cars", "abc")]
    assert {split: len(data) for split, data in splits.items()} == {"train": 36, "validation": 4, "test": 4}


def test_a_repository_without_a_test_split_is_an_error(load, tmp_path, monkeypatch):
    from datasets import load_dataset

    for number in range(4):
        write(tmp_path / "repo" / "train" / f"car{number % 2}" / f"{number}.png", jpeg(number))
    monkeypatch.setattr(fgvc_module, "load_dataset", lambda *_, **__: load_dataset(str(tmp_path / "repo")))
    with pytest.raises(ValueError, match=r"has the splits \['train'\] and no test. A benchmark needs both"):
        load("fgvc/stanfordcars")


# --- lists of image files


@pytest.fixture
def images(tmp_path):
    for number in range(24):
        write(tmp_path / "pictures" / f"{number}.png", jpeg(number))
    return tmp_path


def write_list(folder, ending, rows):
    file = folder / f"list.{ending}"
    if ending == "json":
        text = json.dumps(rows)
    elif ending == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows)
    else:
        mark = "," if ending == "csv" else "\t"
        text = "\n".join(mark.join(map(str, values)) for values in [rows[0].keys(), *(row.values() for row in rows)])
    return str(write(file, text + "\n"))


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl"])
def test_a_list_of_paths_and_classes_is_a_data_set(load, images, ending):
    rows = [{"path": f"pictures/{number}.png", "species": ("ibis, red", "emu")[number % 2]} for number in range(24)]
    if ending == "csv":
        rows = [row | {"species": f'"{row["species"]}"'} for row in rows]
    splits = load(write_list(images, ending, rows))
    assert sum(len(data) for data in splits.values()) == 24
    assert splits["test"].features["label"].names == ["emu", "ibis, red"]
    for data in splits.values():
        assert data["label"][:] == [1 - grey % 2 for grey in greys(data)]
    stream = load(write_list(images, ending, rows), streaming=True)
    assert isinstance(stream["train"], IterableDataset)
    assert greys(stream["test"]) == greys(splits["test"])


def test_a_list_may_say_which_image_is_in_which_split(load, images):
    words = ["train"] * 16 + ["val"] * 4 + ["test"] * 4
    rows = [{"image": f"pictures/{n}.png", "label": (2, 10)[n % 2], "split": word} for n, word in enumerate(words)]
    splits = load(write_list(images, "csv", rows))
    assert [greys(splits[split]) for split in SPLITS] == [list(range(16)), list(range(16, 20)), list(range(20, 24))]
    assert splits["train"].features["label"].names == ["2", "10"]  # numbers, not text


@pytest.mark.parametrize(
    ("ending", "rows", "words"),
    [
        ("csv", [{"image": "pictures/1.png"}], r"no column that could hold the classes; it has 'image'.*add a col"),
        ("csv", [{"where": "pictures/1.png", "label": 1}], r"columns \['where', 'label'\] and none called image,"),
        ("csv", [{"image": "pictures/1.png", "label": ""}], r"Row 1 of .* has no label.*fill it in"),
        ("jsonl", [{"image": "pictures/1.png", "label": 1}, {"image": "pictures/1.png"}], r"Row 2 of .* has no label"),
        ("csv", [{"image": "a.png", "label": 1}, {"image": "b.png", "label": 1}], "'.*a.png' and 1 more cannot"),
        ("csv", [{"image": "pictures/1.png", "label": 1, "split": "tset"}], "Row 1 .* in the split 'tset'. There are"),
    ],
)
def test_a_wrong_list_of_paths_is_an_error_that_names_row_or_column(load, images, ending, rows, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load(write_list(images, ending, rows))


@pytest.mark.parametrize(("number", "label"), [(1, "ibis"), (2, "emu")])
def test_a_row_with_too_many_values_is_an_error_and_not_a_class_cut_short(load, images, number, label):
    # Regression: without quotes, "emu, red" was read as class "emu".
    rows = [{"path": f"pictures/{n}.png", "species": "ibis" if n % 2 else "emu"} for n in range(1, 9)]
    rows[number - 1]["species"] = f"{label}, red"
    with pytest.raises(ValueError, match=f"Row {number} of .* has 3 values for 2 columns.*needs quotes"):
        load(write_list(images, "csv", rows))


def test_a_list_in_another_encoding_is_an_error_that_says_so(load, images):
    (images / "list.csv").write_bytes("path,label\npictures/1.png,Würger\n".encode("latin-1"))
    with pytest.raises(ValueError, match="cannot be read as csv.*in UTF-8, is needed"):
        load(str(images / "list.csv"))


def test_a_list_that_is_missing_or_of_another_kind_is_an_error(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file.*list of images and classes"):
        load(str(tmp_path / "nowhere.csv"))
    with pytest.raises(ValueError, match="cannot be read as json"):
        load(str(write(tmp_path / "broken.json", "[{")))
    with pytest.raises(ValueError, match="no list of objects"):
        load(str(write(tmp_path / "other.json", '{"a": 1}')))
    with pytest.raises(ValueError, match="has no rows"):
        load(str(write(tmp_path / "empty.csv", "image,label\n")))


# --- shards in a folder


def test_a_folder_of_shards_is_a_data_set_and_a_stream(load, tmp_path):
    folder = tmp_path / "shards"
    for split, count in {"train": 24, "test": 6}.items():
        for part in range(2):
            images = {f"{split}{n}": (n, n % 2) for n in range(part, count, 2)}
            write_tar(folder / f"{split}-{part:05d}.tar", images, "png")
    splits = load(str(folder))
    assert {split: len(data) for split, data in splits.items()} == {"train": 19, "validation": 5, "test": 6}
    assert splits["test"].features["label"].names == ["0", "1"]
    with pytest.raises(ValueError, match="streams labels of type int64.*names of all classes"):
        load(str(folder), streaming=True)
    write(folder / "classnames.txt", "cat\ndog\n")
    assert load(str(folder))["test"].features["label"].names == ["cat", "dog"]
    stream = load(str(folder), streaming=True, num_held_out=4)
    assert isinstance(stream["train"], IterableDataset)
    assert stream["train"].features["label"].names == ["cat", "dog"]
    assert len(list(stream["train"])) == 20
    assert sorted(example["label"] for example in stream["test"]) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000.tar", "images-train-00001.tar", "val-00000.tar", "imagenet_test_0.tar"],
        ["train/000.tar", "train/001.tar", "validation/000.tar", "testing/000.tar"],
        ["train_images/0.tar", "Train-2/train.tar", "dev.set/0.tar", "images.test/0.tar"],
        ["00000.tar", "train2017-00000.tar", "val2017-00000.tar", "test2017-00000.tar"],
    ],
)
def test_any_word_of_a_shards_name_or_folder_tells_its_split(tmp_path, names):
    for name in names:
        write_tar(tmp_path / name, {"a": (1, 1)}, "png")
    found = {split: sorted(os.path.relpath(file, tmp_path) for file in files) for split, files in find(tmp_path)}
    assert found == {"train": sorted(names[:2]), "validation": names[2:3], "test": names[3:]}


def find(folder):
    return shards.find_shards(folder).items()


def test_a_shard_that_names_two_splits_is_an_error(tmp_path):
    write_tar(tmp_path / "train" / "val-000.tar", {"a": (1, 1)}, "png")
    with pytest.raises(ValueError, match="train/val-000.tar' names the splits train and validation.*rename"):
        shards.find_shards(tmp_path)
