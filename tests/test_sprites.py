"""Drawn benchmarks: the same pixels everywhere, balanced, never twice, with labels that the pixels confirm."""

import hashlib
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from sklearn.ensemble import RandomForestClassifier

from hf_vpt.data import load_image_dataset
from hf_vpt.data.sprites import TASKS, load_drawn
from hf_vpt.data.sprites.integers import Integers
from hf_vpt.data.sprites.shapes import ANGLES, PIXEL, SHAPES, TRIG_SCALE, coverage, reach
from hf_vpt.data.sprites.single import LOCATION_SIDES, ORIENTATION_SHAPES, ORIENTATION_SIDES
from hf_vpt.data.sprites.tasks import Task, _draw_unseen
from hf_vpt.training import BASELINES, parse_arguments
from hf_vpt.tuners import METHODS


CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = {"train": 800, "validation": 200, "test": 2000}
NUM_CLASSES = {"sprite_location": 16, "sprite_orientation": 16, "counting": 8}


def as_arrays(data):
    return np.stack([np.asarray(image) for image in data["image"]]), np.array(data["label"])


@pytest.fixture(scope="module")
def drawn():
    """Pixels and labels of every split of every task, with seed 0."""
    return {task: {split: as_arrays(data) for split, data in load_drawn(task).items()} for task in TASKS}


def everything(splits):
    return tuple(np.concatenate(column) for column in zip(*splits.values()))


def centres_of_mass(images):
    """Return mass in pixels and centre of mass (x, y) in pixels from the upper left corner, of grey images."""
    mass = images / 255
    axis = np.arange(64) + 0.5
    total = mass.sum((1, 2))
    return total, (mass.sum(1) * axis).sum(1) / total, (mass.sum(2) * axis).sum(1) / total


FINGERPRINTS = {
    "sprite_location": "2092fd6783a53a6ea2719b4933e1beed07b32f8110c9096c2bfa0ec97b470539",
    "sprite_orientation": "c36e025fa556157b97d37551e3a8b5c646cc0d668d6b4affd94aa31bfb30deb0",
    "counting": "4b8a17c476eacd455ce10b75ce10ca1e03fd477be06523a620c5ea96aa46f559",
}


@pytest.mark.parametrize("task", TASKS)
def test_all_pixels_and_labels_are_those_of_every_other_machine(drawn, task):
    digest = hashlib.sha256()
    for images, labels in drawn[task].values():
        digest.update(images.tobytes() + labels.astype("<i8").tobytes())
    assert digest.hexdigest() == FINGERPRINTS[task]


@pytest.mark.parametrize("task", TASKS)
def test_splits_have_their_sizes_and_every_class_its_share(drawn, task):
    assert {split: len(labels) for split, (_, labels) in drawn[task].items()} == SIZES
    for split, (_, labels) in drawn[task].items():
        counts = np.bincount(labels, minlength=NUM_CLASSES[task])
        assert len(counts) == NUM_CLASSES[task] == len(TASKS[task].classes)
        assert counts.max() - counts.min() <= (SIZES[split] % NUM_CLASSES[task] > 0), f"{split}: {counts}"
        # One class after the other would spoil a stream, which shuffles only what is near.
        assert len(set(labels[: len(counts)])) > 1


@pytest.mark.parametrize("task", TASKS)
def test_no_image_comes_twice_in_a_split_or_in_two(drawn, task):
    images, _ = everything(drawn[task])
    assert len({image.tobytes() for image in images}) == sum(SIZES.values())


def test_images_are_64_by_64_grey_or_colour(drawn):
    assert drawn["sprite_location"]["train"][0].shape == drawn["sprite_orientation"]["train"][0].shape == (800, 64, 64)
    assert drawn["counting"]["train"][0].shape == (800, 64, 64, 3)


def test_the_centre_of_mass_of_every_sprite_lies_in_the_column_of_its_label(drawn):
    images, labels = everything(drawn["sprite_location"])
    _, x, _ = centres_of_mass(images)
    assert ((x - 32) // 2.5 + 8 == labels).all()


def test_the_tip_of_every_sprite_points_where_its_label_says(drawn):
    images, labels = (
        np.concatenate(column)
        for column in zip(*(drawn["sprite_orientation"][name] for name in ("train", "validation")))
    )
    mass, centre_x, centre_y = centres_of_mass(images)
    axis = np.arange(64) + 0.5
    right = axis[None, None, :] - centre_x[:, None, None]
    up = centre_y[:, None, None] - axis[None, :, None]
    # Third moments point to the tip of teardrops and triangles, and hardly anywhere for hearts.
    distance = np.hypot(right, up)
    weight = images / 255 * distance**2
    sideways, upwards = (weight * right).sum((1, 2)), (weight * up).sum((1, 2))
    is_heart = np.hypot(sideways, upwards) < 0.08 * (weight * distance).sum((1, 2))
    assert abs(is_heart.mean() - 1 / 3) < 0.02
    turns = np.arctan2(sideways, upwards) / (2 * np.pi)
    for index in np.flatnonzero(is_heart):
        turns[index] = _turn_of_heart(images[index], right[index], up[index], mass[index])
    points = np.round(turns * 16).astype(int) % 16
    assert (points == labels).all(), np.flatnonzero(points != labels)


def _turn_of_heart(image, right, up, area):
    """Try the 48 turns of the curve (x² + y² - 1)³ = x² y³ and return the one that covers the image best."""
    turns = np.arange(ANGLES)[:, None, None] / ANGLES
    sine, cosine = np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)
    scale = math.sqrt(area / 3.662)  # area of the curve
    x = (right * cosine - up * sine) / scale
    y = (
        -(right * sine + up * cosine) / scale + 0.2935
    )  # the tip is the lower end; the curve's centre of mass is higher
    beyond = x * x + y * y - 1
    inside = beyond * beyond * beyond <= x * x * y * y * y
    return turns.ravel()[abs(inside - image / 255).sum((1, 2)).argmin()]


@pytest.mark.parametrize(
    ("task", "sides", "step", "axes"),
    [("sprite_location", LOCATION_SIDES, 1.25, "y"), ("sprite_orientation", ORIENTATION_SIDES, 0.75, "xy")],
)
def test_scale_and_place_are_dealt_evenly_within_each_class(drawn, task, sides, step, axes):
    for split, (images, labels) in drawn[task].items():
        area, x, y = centres_of_mass(images)
        factors = {"side": abs(np.sqrt(area)[:, None] - np.array(sides) / PIXEL).argmin(1)}
        factors |= {axis: np.round((place - 32) / step + 15.5) for axis, place in (("x", x), ("y", y)) if axis in axes}
        for factor, values in factors.items():
            num_values = 6 if factor == "side" else 32
            for label in range(16):
                counts = Counter(values[labels == label])
                size = (labels == label).sum()
                bounds = {size // num_values, -(-size // num_values)} - {0}
                assert set(counts.values()) <= bounds, f"{split}, class {label}, {factor}: {counts}"


def test_each_coloured_region_is_one_object_and_their_number_is_the_label(drawn):
    images, labels = everything(drawn["counting"])
    coloured = images.max(-1) != images.min(-1)
    counts = [ndimage.label(mask, structure=np.ones((3, 3)))[1] for mask in coloured]
    assert (np.array(counts) == labels + 1).all()


def test_objects_neither_touch_one_another_nor_the_grey_ones(drawn):
    images, labels = drawn["counting"]["validation"]
    background = np.median(images.reshape(len(images), -1, 3), axis=1).astype(int)
    foreground = (images != background[:, None, None]).any(-1)
    num_grey = np.array([ndimage.label(mask, structure=np.ones((3, 3)))[1] for mask in foreground]) - labels - 1
    assert {0, 1, 2, 3, 4} == set(num_grey)
    for label in range(8):
        assert (np.bincount(num_grey[labels == label]) == 5).all()


def test_objects_are_as_large_whatever_their_number_is(drawn):
    images, labels = everything(drawn["counting"])
    area = (images.max(-1) != images.min(-1)).sum((1, 2)) / (labels + 1)
    means = np.array([area[labels == label].mean() for label in range(8)])
    assert abs(means / means.mean() - 1).max() < 0.1, means


def test_brightness_gives_the_number_of_objects_away_in_a_third_of_the_images_at_most(drawn):
    def summaries(split):
        images, labels = drawn["counting"][split]
        pixels = images.reshape(len(images), -1, 3).astype(float)
        return np.stack([pixels.mean((1, 2)), pixels.std((1, 2))], axis=1), labels

    forest = RandomForestClassifier(100, min_samples_leaf=5, random_state=0).fit(*summaries("train"))
    assert forest.score(*summaries("test")) < 0.4  # chance is 0.125


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_the_area_centre_and_reach_that_were_asked_for(shape):
    num, side = ANGLES, 14 * PIXEL
    place = np.full(num, 33 * PIXEL + 5)
    covered = coverage(shape, np.full(num, side), np.arange(num), place, place + 3, 64)
    mass, x, y = centres_of_mass(covered * (255 / 4))
    assert abs(mass - 14**2).max() < 5  # points on an edge count as covered
    assert abs(x - (33 + 5 / 16)).max() < 0.26 and abs(y - (33 + 8 / 16)).max() < 0.26  # half a sample at most
    rows, columns = np.nonzero(covered.any(0))
    assert np.hypot(rows - 33, columns - 33).max() < reach(shape, side) / PIXEL + 1


@pytest.mark.parametrize("shape", ORIENTATION_SHAPES)
def test_no_two_orientations_of_the_smallest_sprite_look_the_same(shape):
    side, place = np.full(ANGLES, ORIENTATION_SIDES[0]), np.full(ANGLES, 32 * PIXEL)
    covered = coverage(shape, side, np.arange(ANGLES), place, place, 64)
    assert len({image.tobytes() for image in covered}) == ANGLES


def test_sines_are_far_enough_from_a_tie_for_every_library_to_round_them_alike():
    for angle in range(ANGLES):
        for function in (math.sin, math.cos):
            value = TRIG_SCALE * function(2 * math.pi * angle / ANGLES)
            assert abs(value - math.floor(value) - 0.5) > 1e-3, angle


def test_values_are_dealt_evenly_and_in_random_order():
    dealt = Integers(0).dealt(6, 50)
    assert sorted(np.bincount(dealt)) == [8, 8, 8, 8, 9, 9]
    assert (np.bincount(Integers(0).dealt(6, 60)) == 10).all()
    assert len(set(Integers(0).dealt(32, 12))) == 12
    assert (dealt == Integers(0).dealt(6, 50)).all() and (dealt != Integers(1).dealt(6, 50)).any()


def test_integers_stay_in_their_range_and_reach_both_ends():
    assert set(Integers(0).between(-1, 3, 200)) == {-1, 0, 1, 2, 3}


def test_images_of_a_class_are_drawn_anew_until_none_was_seen_before():
    draws = iter([[1, 1], [2, 3], [4, 5]])
    task = Task(lambda integers, label, count: np.array(next(draws), dtype=np.uint8), ["a"])
    seen = {np.uint8(3).tobytes()}
    assert _draw_unseen(task, 0, 2, Integers(0), seen).tolist() == [4, 5]
    assert len(seen) == 3


def test_the_seed_of_the_splits_decides_what_is_drawn(drawn):
    splits = load_image_dataset("drawn/counting", seed=1)
    images, _ = as_arrays(splits["validation"])
    known = {image.tobytes() for image in everything(drawn["counting"])[0]}
    assert not known & {image.tobytes() for image in images}


def test_a_drawn_data_set_is_loaded_by_its_name_and_can_be_streamed(drawn):
    splits = load_image_dataset("drawn/sprite_orientation")
    assert splits["test"].column_names == ["image", "label"]
    assert splits["test"].features["label"].names[:3] == ["N", "NNE", "NE"]
    assert (as_arrays(splits["test"])[0] == drawn["sprite_orientation"]["test"][0]).all()
    stream = load_image_dataset("drawn/sprite_orientation", streaming=True)["train"]
    assert len({example["label"] for example in stream.take(50)}) > 8


def test_an_unknown_task_is_refused_with_the_names_of_the_known_ones():
    with pytest.raises(ValueError, match=r"no drawn data set 'drawn/colour'.*'drawn/counting'\] is needed: correct"):
        load_image_dataset("drawn/colour")


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed of a drawn data set is -1.*at least 0"):
        load_drawn("counting", seed=-1)


@pytest.mark.parametrize("method", [*METHODS, *BASELINES])
def test_every_method_has_a_config_for_drawn_data_whose_task_can_be_replaced(method):
    config = ["--config", str(CONFIGS / method / "drawn.yaml"), "--use_cpu"]
    settings = parse_arguments(config)
    assert (settings.model.method, settings.data.dataset_name) == (method, "drawn/sprite_location")
    assert parse_arguments([*config, "--dataset_name", "drawn/counting"]).data.dataset_name == "drawn/counting"
