"""Augmentation against plain loops, and that it is a function of (recipe, seed, step) alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fromzero import augment, machine, networks
from fromzero.evaluate import VIEWS, Normalise, evaluate
from fromzero.recipe import AugmentRecipe, NetworkRecipe


@pytest.fixture
def pixels():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 9, 8, 3), dtype=np.uint8))


def views(image, translate):
    """Every shifted view of an image (H, W, C), border mirrored, by numpy's own padding."""
    pad = ((translate, translate), (translate, translate), (0, 0))
    padded = np.pad(image.numpy(), pad, mode="reflect")
    height, width = image.shape[:2]
    steps = range(2 * translate + 1)
    return [padded[y : y + height, x : x + width] for y in steps for x in steps]


@pytest.mark.parametrize("translate", [0, 1, 3])
@pytest.mark.parametrize("flip", ["none", "random"])
def test_an_image_is_one_of_its_shifted_and_mirrored_views(pixels, flip, translate):
    recipe = AugmentRecipe(flip=flip, translate=translate)
    indices = torch.tensor([3, 3, 17, 0, 5, 5, 5, 11])
    seen = set()
    for step in range(200):
        batch = augment.gather(pixels, indices, recipe, 0, 0, step)
        assert batch.shape == (8, 9, 8, 3)
        assert batch.dtype == torch.uint8
        for image, index in zip(batch.numpy(), indices.tolist(), strict=True):
            straight = [number for number, view in enumerate(views(pixels[index], translate)) if (view == image).all()]
            mirrored = [
                number for number, view in enumerate(views(pixels[index], translate)) if (view == image[:, ::-1]).all()
            ]
            assert straight or (mirrored and flip == "random")
            seen.add((bool(straight), *(straight or mirrored)))
    assert len(seen) == (2 * translate + 1) ** 2 * (2 if flip == "random" else 1)  # all of them come up


def test_alternating_flips_show_an_image_both_ways_in_two_epochs(pixels):
    recipe, everything = AugmentRecipe(flip="alternating"), torch.arange(20)
    epochs = [augment.gather(pixels, everything, recipe, 4, epoch, 100 + epoch) for epoch in range(4)]
    mirrored = [torch.tensor([not torch.equal(a, b) for a, b in zip(e, pixels, strict=True)]) for e in epochs]
    assert 3 <= mirrored[0].sum() <= 17
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[3])
    other = augment.gather(pixels, everything, recipe, 5, 0, 100)
    assert not torch.equal(other, epochs[0])


def test_a_crop_is_a_part_of_the_image(pixels):
    recipe, everything = AugmentRecipe(crop=5), torch.arange(20)
    corners = set()
    for step in range(40):
        batch = augment.gather(pixels, everything, recipe, 0, 0, step)
        assert batch.shape == (20, 5, 5, 3)
        for crop, image in zip(batch, pixels, strict=True):
            places = [(y, x) for y in range(5) for x in range(4) if torch.equal(image[y : y + 5, x : x + 5], crop)]
            assert places
            corners.update(places)
    assert len(corners) == 20


@pytest.mark.parametrize(("factor", "size"), [(1.0, (9, 8)), (0.5, (4, 4)), (0.53, (5, 4)), (0.01, (1, 1))])
def test_scaled_images_are_smaller_means(pixels, factor, size):
    small = augment.scaled(pixels, factor)
    assert small.shape == (20, *size, 3)
    assert small.dtype == torch.uint8
    assert small.is_contiguous()
    in_double = F.interpolate(pixels.permute(0, 3, 1, 2).double(), size, mode="bilinear", antialias=True)
    assert (small.permute(0, 3, 1, 2) - in_double).abs().max() < 1.1  # both directions are rounded
    assert augment.smallest_size(AugmentRecipe(scale=factor, scale_epochs=0.5), 9, 8) == size
    assert augment.smallest_size(AugmentRecipe(scale=factor), 9, 8) == (9, 8)


def test_cutout_zeroes_a_square_around_any_pixel(pixels):
    images = torch.rand(500, 3, 9, 7) + 1
    assert augment.cut_out(images, AugmentRecipe(), 0, 0) is images
    cut = augment.cut_out(images, AugmentRecipe(cutout=4), 0, 3)
    holes = cut == 0
    assert torch.equal(cut[~holes], images[~holes])
    assert torch.equal(holes[:, 0], holes[:, 2])
    assert holes[:, 0].flatten(1).any(1).all()
    for hole in holes[:, 0]:
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        square = torch.zeros_like(hole)
        square[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        assert torch.equal(hole, square)
        assert max(len(rows), len(columns)) <= 4
    assert holes[:, 0].float().mean(0).min() > 0.05  # no pixel is safe


def test_cutmix_pastes_a_rectangle_of_the_image_before(pixels):
    images = torch.rand(2000, 3, 9, 7)
    mixed, own = augment.cut_mix(images, AugmentRecipe(cutmix=0.6), 0, 3)
    pasted = (mixed == images.roll(1, 0)).all(1)
    assert torch.equal(mixed, torch.where(pasted[:, None], images.roll(1, 0), images))
    torch.testing.assert_close(own, 1 - pasted.flatten(1).float().mean(1))
    for rectangle in pasted[pasted.flatten(1).any(1)]:
        rows, columns = rectangle.any(1).nonzero().flatten(), rectangle.any(0).nonzero().flatten()
        assert rectangle.sum() == len(rows) * len(columns)
        assert [len(rows), len(columns)] == [part.max() - part.min() + 1 for part in (rows, columns)]
    assert 0.54 < float((own < 1).float().mean()) < 0.62
    # Of sides s = √u, whose centre may be anywhere, s - s²/4 lies inside on average; the mean of its square is 0.32.
    assert float(own.mean()) == pytest.approx(1 - 0.6 * 0.32, abs=0.02)
    covered = pasted.float().mean(0)
    assert covered.min() > 0.08  # no pixel is safe
    assert covered.argmax() in (3 * 7 + 3, 4 * 7 + 3, 5 * 7 + 3)  # and the middle least
    everything, nothing = (augment.cut_mix(images, AugmentRecipe(cutmix=share), 0, 3)[1] for share in (1.0, 0.0))
    assert (everything < 1).float().mean() > 0.9
    assert (nothing == 1).all()


def test_images_turn_about_their_centre_by_angles_within_bounds():
    """A bright pixel 20 to the right of the centre, in images that are no squares: it is found again at the angle."""
    images = torch.zeros((2000, 61, 51, 1), dtype=torch.uint8)
    images[:, 30, 25 + 20] = 200
    seen = augment.turned(images, AugmentRecipe(rotate=30), 0, 3)
    assert seen.shape == images.shape
    light = seen[..., 0].double()
    total = light.sum((1, 2))
    down = (light.sum(2) * (torch.arange(61) - 30)).sum(1) / total
    right = (light.sum(1) * (torch.arange(51) - 25)).sum(1) / total
    assert (torch.hypot(down, right) - 20).abs().max() < 0.5
    angles = torch.rad2deg(torch.atan2(down, right))
    assert -31 < angles.min() < -29
    assert 29 < angles.max() < 31
    assert float(angles.mean()) == pytest.approx(0, abs=1.5)
    assert float(angles.std()) == pytest.approx(30 / 3**0.5, abs=1)

    flat = torch.full((5, 8, 8, 3), 77, dtype=torch.uint8)  # so no black corners
    assert torch.equal(augment.turned(flat, AugmentRecipe(rotate=180), 0, 0), flat)
    assert torch.equal(augment.turned(images, AugmentRecipe(rotate=30), 0, 3), seen)
    assert not torch.equal(augment.turned(images, AugmentRecipe(rotate=30), 0, 4), seen)
    assert augment.turned(images, AugmentRecipe(), 0, 3) is images


def test_colours_change_by_factors_within_bounds():
    flat = torch.full((4000, 2, 2, 3), 100, dtype=torch.uint8)
    flat[..., 2] = 40  # mean 80, and neither contrast nor saturation moves that
    seen = augment.recoloured(flat, AugmentRecipe(colour=0.2), 0, 3).float()
    assert (seen == seen[:, :1, :1]).all()  # each image as a whole
    brightness = seen.mean((1, 2, 3)) / 80
    assert 0.8 - 0.01 <= brightness.min() < 0.82
    assert 1.18 < brightness.max() <= 1.2 + 0.01
    assert float(brightness.mean()) == pytest.approx(1, abs=0.01)
    spread = (seen[:, 0, 0, 0] - seen[:, 0, 0, 2]) / 60 / brightness  # contrast times saturation
    assert 0.64 - 0.03 <= spread.min() < 0.7
    assert 1.35 < spread.max() <= 1.44 + 0.03

    grey = torch.zeros((4000, 2, 2, 3), dtype=torch.uint8)
    grey[:, 0], grey[:, 1] = 60, 100
    seen = augment.recoloured(grey, AugmentRecipe(colour=0.2), 0, 3).float()
    assert (seen == seen[..., :1]).all()  # grey stays grey
    contrast = (seen[:, 1, 0, 0] - seen[:, 0, 0, 0]) / 40 / (seen.mean((1, 2, 3)) / 80)
    assert 0.8 - 0.03 <= contrast.min() < 0.83
    assert 1.17 < contrast.max() <= 1.2 + 0.03
    ends = torch.tensor([0, 255], dtype=torch.uint8).repeat(2000, 6).reshape(-1, 2, 2, 3)
    cut = augment.recoloured(ends, AugmentRecipe(colour=1.0), 0, 3)
    assert (cut.min(), cut.max()) == (0, 255)
    assert torch.equal(augment.recoloured(ends, AugmentRecipe(colour=1.0), 0, 3), cut)
    assert not torch.equal(augment.recoloured(ends, AugmentRecipe(colour=1.0), 0, 4), cut)
    assert augment.recoloured(ends, AugmentRecipe(), 0, 3) is ends


def test_the_same_seed_and_step_give_the_same_images(pixels):
    recipe, indices = AugmentRecipe(flip="random", translate=2, cutout=3), torch.arange(20)
    one, same, other_step, other_seed = (
        augment.gather(pixels, indices, recipe, seed, 0, step) for seed, step in ((1, 7), (1, 7), (1, 8), (2, 7))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other_step)
    assert not torch.equal(one, other_seed)


def test_without_augmentation_images_are_as_they_are(pixels):
    indices = torch.tensor([4, 2, 2])
    assert torch.equal(augment.gather(pixels, indices, AugmentRecipe(), 0, 0, 0), pixels[indices])


def test_borders_are_mirrored_as_often_as_needed():
    places = augment._reflected(torch.arange(-9, 10), 4)
    expected = np.pad(np.arange(4), (9, 6), mode="reflect")
    assert places.tolist() == expected.tolist()
    assert augment._reflected(torch.arange(-3, 4), 1).tolist() == [0] * 7


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 1), (-1, -1), (2, -3)])
def test_a_view_is_shifted_then_mirrored(pixels, mirrored, down, right):
    found = augment.view(pixels, mirrored, down, right).numpy()
    padded = np.pad(pixels.numpy(), ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    expected = padded[:, 4 - down : 13 - down, 4 - right : 12 - right]
    assert (found == (expected[:, :, ::-1] if mirrored else expected)).all()


def test_views_are_averaged_with_weights_that_add_up(pixels):
    here = machine.prepare("float32", device="cpu", threads=1)
    network = NetworkRecipe(channels=[[4]], dense=[])
    model = networks.build(network, (9, 8, 3), 5).eval()
    normalise = Normalise(torch.zeros(3), torch.full((3,), 1 / 255))
    labels = torch.arange(20) % 5
    plain, mirrored = ((False, 0, 0), 0.25), ((True, 0, 0), 0.25)
    shifted = {((side, by, by), 0.125) for side in (False, True) for by in (-1, 1)}
    assert {name: set(views) for name, views in VIEWS.items()} == {
        "none": {((False, 0, 0), 1.0)},
        "mirror": {((False, 0, 0), 0.5), ((True, 0, 0), 0.5)},
        "multicrop": {plain, mirrored, *shifted},
    }
    for name, views in VIEWS.items():
        logits = sum(weight * model(normalise(augment.view(pixels, *how))) for how, weight in views)
        found = evaluate(model, pixels, labels, normalise, here, views=name)
        torch.testing.assert_close(found.losses, F.cross_entropy(logits, labels, reduction="none"))
        assert torch.equal(found.predictions, logits.argmax(1))
