"""Augmentation: what a train image looks like at a step.

Pure functions of (recipe, seed, step): nothing is remembered between steps. They work on whatever device the images
are on; the few random numbers a batch needs are drawn on the processor, so they are the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fromzero import kernels
from fromzero.recipe import AugmentRecipe
from fromzero.rng import generator


def gather(pixels: Tensor, indices: Tensor, recipe: AugmentRecipe, seed: int, epoch: int, step: int) -> Tensor:
    """The images at `indices` (B,) of `pixels` uint8 (N, H, W, C), shifted, cropped and flipped: uint8 (B, H', W', C),
    H' and W' being H and W where there is no crop.

    One gather does all: which row and which column of its image every pixel comes from.
    """
    if recipe.flip == "none" and recipe.translate == 0 and recipe.crop == 0:
        return pixels.index_select(0, indices)
    draws = generator(seed, "augment", step)
    places = (_places(size, len(indices), recipe, draws) for size in pixels.shape[1:3])
    rows, columns = (each.to(pixels.device, non_blocking=True) for each in places)
    flipped = _flips(indices, len(pixels), recipe, seed, epoch, step)
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    return kernels.gather(pixels, indices, rows, columns)


def scaled(pixels: Tensor, factor: float) -> Tensor:
    """Images uint8 (B, H, W, C) with sides times `factor`, to the nearest pixel, at least one: each pixel the mean of
    those under it, weighted by their distance."""
    size = _scaled_size(pixels.shape[1:3], factor)
    images = pixels.permute(0, 3, 1, 2)
    if images.device.type == "cpu":  # in bytes it is made for the processor's vectors
        small = F.interpolate(images, size, mode="bilinear", antialias=True)
    else:
        small = F.interpolate(images.float(), size, mode="bilinear", antialias=True).round_().to(torch.uint8)
    return small.permute(0, 2, 3, 1).contiguous()


def smallest_size(recipe: AugmentRecipe, height: int, width: int) -> tuple[int, int]:
    """The smallest size that images of this size are trained on in."""
    size = (recipe.crop or height, recipe.crop or width)
    return _scaled_size(size, recipe.scale) if recipe.scales else size


def _scaled_size(size: Sequence[int], factor: float) -> tuple[int, int]:
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


def view(pixels: Tensor, mirrored: bool, down: int, right: int) -> Tensor:
    """All images (N, H, W, C) shifted by so many pixels, the border filled by reflection, then perhaps mirrored."""
    height, width = pixels.shape[1:3]
    rows = _reflected(torch.arange(height) - down, height).to(pixels.device)
    columns = _reflected(torch.arange(width) - right, width).to(pixels.device)
    return pixels[:, rows][:, :, columns.flip(0) if mirrored else columns]


def turned(pixels: Tensor, recipe: AugmentRecipe, seed: int, step: int) -> Tensor:
    """Images uint8 (B, H, W, C) turned about their centres, each by an angle drawn for it; between pixels bilinear,
    what comes from outside filled by reflection."""
    if recipe.rotate == 0:
        return pixels
    draws = torch.rand((len(pixels), 1, 1), generator=generator(seed, "rotate", step))
    angle = math.radians(recipe.rotate) * (2 * draws - 1)
    cosine, sine = (each.to(pixels.device, non_blocking=True) for each in (angle.cos(), angle.sin()))
    height, width = pixels.shape[1:3]
    down, right = (torch.arange(size, device=pixels.device) - (size - 1) / 2 for size in (height, width))
    rows = cosine * down[:, None] + sine * right
    columns = cosine * right - sine * down[:, None]
    places = torch.stack((columns * 2 / width, rows * 2 / height), dim=3)  # -1 to 1 from edge to edge
    images = pixels.permute(0, 3, 1, 2).float()
    seen = F.grid_sample(images, places, mode="bilinear", padding_mode="reflection", align_corners=False)
    return seen.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def recoloured(pixels: Tensor, recipe: AugmentRecipe, seed: int, step: int) -> Tensor:
    """Images uint8 (B, H, W, C) with brightness, contrast (distances from the image's mean) and saturation (from the
    mean of the pixel's channels) times factors drawn for each; what leaves 0 to 255 is cut off at the end."""
    if recipe.colour == 0:
        return pixels
    draws = torch.rand((3, len(pixels), 1, 1, 1), generator=generator(seed, "colour", step))
    factors = (1 + recipe.colour * (2 * draws - 1)).to(pixels.device, non_blocking=True)
    brightness, contrast, saturation = factors
    images = pixels * brightness
    for kept, factor in (((1, 2, 3), contrast), ((3,), saturation)):
        mean = images.mean(kept, keepdim=True)
        images = mean + factor * (images - mean)
    return images.round_().clamp_(0, 255).to(torch.uint8)


def cut_out(images: Tensor, recipe: AugmentRecipe, seed: int, step: int) -> Tensor:
    """Set a square of `images` (B, C, H, W) to zero, its centre anywhere; what lies over the border is lost, as in
    DeVries and Taylor (2017). Zero is the mean where the recipe normalises to `standard`."""
    if recipe.cutout == 0:
        return images
    draws = generator(seed, "cutout", step)
    rows, columns = (_stretch(recipe.cutout, size, len(images), draws) for size in images.shape[2:])
    cut = images.masked_fill(_rectangle(rows, columns, images.device), 0.0)
    return cut.contiguous(memory_format=torch.channels_last)


def cut_mix(images: Tensor, recipe: AugmentRecipe, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Cover a rectangle of some of `images` (B, C, H, W) by the same part of the image before in the batch (of the
    first: of the last): as large a share of the image as is drawn between 0 and 1, its centre anywhere, what lies over
    the border lost, as in Yun et al. (2019), but drawn for every image. With the share of each image that is still its
    own, float32 (B,)."""
    draws = generator(seed, "cutmix", step)
    mixed = torch.rand((len(images), 1), generator=draws) < recipe.cutmix
    side = torch.rand((len(images), 1), generator=draws).sqrt() * mixed
    rows, columns = (_stretch((side * size).round().long(), size, len(images), draws) for size in images.shape[2:])
    own = 1 - rows.float().mean(1) * columns.float().mean(1)
    covered = _rectangle(rows, columns, images.device)
    mixed_images = torch.where(covered, images.roll(1, 0), images).contiguous(memory_format=torch.channels_last)
    return mixed_images, own.to(images.device, non_blocking=True)


def _stretch(length: int | Tensor, size: int, count: int, draws: torch.Generator) -> Tensor:
    """For `count` images which of `size` places lie within `length` of them (one, or int64 (count, 1)) around a centre
    drawn from all: bool (count, size)."""
    start = torch.randint(0, size, (count, 1), generator=draws) - length // 2
    place = torch.arange(size)
    return (place >= start) & (place < start + length)


def _rectangle(rows: Tensor, columns: Tensor, device: torch.device) -> Tensor:
    """The pixels in these rows bool (B, H) and columns bool (B, W): bool (B, 1, H, W)."""
    rows, columns = (part.to(device, non_blocking=True) for part in (rows, columns))
    return rows[:, None, :, None] & columns[:, None, None, :]


def _flips(indices: Tensor, num_images: int, recipe: AugmentRecipe, seed: int, epoch: int, step: int) -> Tensor:
    """Which images of a batch are mirrored, bool (B,).

    alternating: half of the images, by chance, in the first epoch, the other half in the second, and so on, so that
    two epochs in a row show an image both ways (Jordan, 2024), if neither skips it."""
    match recipe.flip:
        case "none":
            return torch.zeros(len(indices), dtype=torch.bool, device=indices.device)
        case "random":
            drawn = torch.randint(0, 2, (len(indices),), generator=generator(seed, "flip", step))
            return drawn.bool().to(indices.device, non_blocking=True)
        case "alternating":
            return (_first_flips(num_images, seed, indices.device)[indices] + epoch) % 2 == 1


@lru_cache(maxsize=1)
def _first_flips(num_images: int, seed: int, device: torch.device) -> Tensor:
    """By chance which of the train images the first epoch mirrors, 0 or 1 (N,). Read only."""
    return torch.randint(0, 2, (num_images,), generator=generator(seed, "first flip")).to(device)


def _places(size: int, count: int, recipe: AugmentRecipe, draws: torch.Generator) -> Tensor:
    """For `count` images, which of the `size` rows (or columns) is seen in each place: int64 (count, crop or size)."""
    crop = recipe.crop or size
    beyond = recipe.translate
    start = torch.randint(-beyond, size - crop + beyond + 1, (count, 1), generator=draws)
    reflected = _reflected(torch.arange(-beyond, size + beyond), size)  # of all places there are, and then looked up
    return reflected[start + torch.arange(beyond, beyond + crop)]


def _reflected(places: Tensor, size: int) -> Tensor:
    """Places outside 0 … size - 1 mirrored at the outermost pixel, as often as needed: -1 → 1, size → size - 2."""
    if size == 1:
        return torch.zeros_like(places)
    period = 2 * (size - 1)
    wrapped = places.remainder(period)
    return torch.minimum(wrapped, period - wrapped)
