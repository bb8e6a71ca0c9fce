import pytest
import torch

from hf_vpt.data.pretraining_shapes import POINTS, DrawnClasses, fit_to_square


@pytest.fixture(scope="module")
def drawn():
    return DrawnClasses(num_fractals=8, num_glyphs=8, num_contours=8, seed=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_batch_has_the_promised_shape_type_and_range(drawn):
    images = drawn.draw(torch.tensor([0, 8, 16, 23, 0]), generator())
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1


def test_same_seed_draws_the_same_images(drawn):
    labels = torch.arange(len(drawn))
    again = DrawnClasses(num_fractals=8, num_glyphs=8, num_contours=8, seed=0)
    assert torch.equal(drawn.draw(labels, generator(3)), again.draw(labels, generator(3)))


def test_another_seed_makes_other_classes(drawn):
    labels = torch.arange(len(drawn))
    other = DrawnClasses(num_fractals=8, num_glyphs=8, num_contours=8, seed=1)
    difference = (drawn.draw(labels, generator(3)) - other.draw(labels, generator(3))).abs().mean((1, 2, 3))
    assert (difference > 0).all()


def test_two_instances_of_a_class_differ(drawn):
    first, second = drawn.draw(torch.tensor([9, 9]), generator())
    assert (first - second).abs().mean() > 0.01


def test_every_class_draws_a_visible_shape(drawn):
    images = drawn.draw(torch.arange(len(drawn)).repeat_interleave(4), generator())
    contrast = (images.flatten(2).amax(2) - images.flatten(2).amin(2)).amax(1)
    assert (contrast > 0.15).all(), f"labels {(contrast <= 0.15).nonzero().flatten().tolist()} (times 4) show nothing"


def test_a_family_without_classes_is_left_out():
    # The packaged backbone was pre-trained this way, without glyphs.
    drawn = DrawnClasses(num_fractals=3, num_glyphs=0, num_contours=2, seed=0)
    images = drawn.draw(torch.arange(len(drawn)), generator())
    assert len(images) == 5 and (images.flatten(1).std(1) > 0.01).all()


@pytest.mark.parametrize("family", [0, 1, 2], ids=["fractals", "glyphs", "contours"])
def test_instances_are_closer_to_their_class_than_to_others(drawn, family):
    # Without pose and colour, point clouds of one class must be more alike than those of two classes.
    family = drawn.families[family]
    index = torch.arange(len(family)).repeat_interleave(6)
    cells = ((fit_to_square(family.points(index, generator())) + 1) * 3.999).long()
    cells = cells[..., 0] * 8 + cells[..., 1]
    maps = torch.zeros(len(index), 64).scatter_add_(1, cells, torch.ones_like(cells, dtype=torch.float32))
    distance = torch.cdist(maps, maps)
    same = index[:, None] == index
    assert distance[same].sum() / (same.sum() - len(index)) < 0.9 * distance[~same].mean()


def test_fractal_classes_fill_enough_of_the_square(drawn):
    fractals = drawn.families[0]
    cloud = fractals._chaos_game(fractals.matrix, fractals.offset, fractals.weight, generator())
    assert cloud.shape == (8, POINTS, 2)
    occupied = [len(torch.unique(((points + 1) * 7.999).long(), dim=0)) for points in fit_to_square(cloud)]
    assert min(occupied) > 0.7 * fractals.min_coverage * 256


def test_a_filled_disc_of_points_keeps_its_shape_when_it_is_fitted():
    points = torch.rand(2, 50, 2, generator=generator()) * torch.tensor([2.0, 5.0]) + 7
    fitted = fit_to_square(points)
    # One scale for both axes: the ratio of the sides stays.
    sides, fitted_sides = (cloud.amax(1) - cloud.amin(1) for cloud in (points, fitted))
    torch.testing.assert_close(fitted_sides[:, 0] / fitted_sides[:, 1], sides[:, 0] / sides[:, 1])
    torch.testing.assert_close(fitted_sides[:, 1], torch.full((2,), 2.0))
