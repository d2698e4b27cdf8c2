"""The images of a training, split as its recipe says, as tensors on the device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fromzero import augment
from fromzero.data import Images, ImageSet, stratified_folds, stratified_split
from fromzero.errors import InputError, counted
from fromzero.evaluate import Normalise
from fromzero.networks import ImageShape, layers
from fromzero.recipe import Recipe


class Subset(NamedTuple):
    """Pixels uint8 (N, H, W, C) and labels int64 (N,) on the device."""

    pixels: Tensor
    labels: Tensor

    def take(self, indices: np.ndarray) -> Subset:
        """The images at `indices`, in that order (a copy, made by all threads)."""
        places = torch.from_numpy(indices)
        return Subset(self.pixels.index_select(0, places), self.labels[places])

    @classmethod
    def of(cls, images: Images) -> Subset:
        """The same memory as tensors."""
        return cls(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (images.pixels, images.labels)))

    def to(self, device: str) -> Subset:
        return Subset(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """What a training reads: the images it learns from, a fixed part of them for the clean train accuracy, the
    validation images, and the test images, which are scored once. held: of each validation image its place among
    the image set's train images, int64 (N,), where it was held out of them."""

    train: Subset
    clean_train: Subset
    validation: Subset
    test: Subset
    normalise: Normalise
    num_classes: int
    held: np.ndarray | None = None

    @property
    def image_shape(self) -> ImageShape:
        """(height, width, channels)."""
        height, width, channels = self.train.pixels.shape[1:]
        return height, width, channels

    @cached_property
    def log_shares(self) -> Tensor:
        """The log of each class's share of the train images, float32 (classes,); a class without one counts as having
        one."""
        labels = self.train.labels
        counts = labels.cpu().bincount(minlength=self.num_classes).clamp(min=1)
        return (counts / counts.sum()).log().to(labels.device)

    @property
    def validation_digest(self) -> str:
        """SHA-256 (hex) over the validation images and their labels."""
        digest = hashlib.sha256()
        for part in self.validation:
            digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @classmethod
    def of(cls, recipe: Recipe, images: ImageSet, device: str) -> Data:
        """Split as the recipe says. The splits depend on the images alone, not on the seed. Raises InputError where
        nothing can be held out."""
        train, test = Subset.of(images.train), Subset.of(images.test)
        validation, held = test, None
        if recipe.validation.source == "split" and images.validation is not None:
            validation = Subset.of(images.validation)
        elif recipe.validation.source != "test":
            kept, held = _held_out(recipe, images)
            if len(held) < 2 and recipe.validation.source == "fold":
                fold = f"fold {recipe.validation.fold} of {recipe.validation.folds}"
                raise InputError(
                    f"{images.source}: {fold} of its train images has {counted(len(held), 'image')}, where two are"
                    " needed: ask for fewer folds"
                )
            if len(held) < 2:  # of one, no spread can be told
                raise InputError(
                    f"{images.source}: copies within a class stay together, and so only"
                    f" {counted(len(held), 'image')} can be held out for validation, where two are needed: add pictures"
                )
            train, validation = train.take(kept), train.take(held)
        clean = train
        if recipe.clean_train_images < len(train.labels):
            share = recipe.clean_train_images / len(train.labels)
            some = stratified_split(train.labels.numpy(), share, "clean train")[1]
            clean = train.take(some) if len(some) else train  # no class can spare one
        parts = (train, clean, validation, test)
        there = {id(part): part.to(device) for part in parts}  # what is two of them is sent once
        train, clean, validation, test = (there[id(part)] for part in parts)
        normalise = Normalise.of(recipe, train.pixels)
        return cls(train, clean, validation, test, normalise, images.num_classes, held)


def _held_out(recipe: Recipe, images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Which train images a training keeps, and which it is validated on, int64 indices in ascending order."""
    train, validation = images.train, recipe.validation
    if validation.source == "fold":
        held_out = stratified_folds(train.labels, validation.folds, train.content_keys()) == validation.fold - 1
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)
    # Of a folder that pictures are added to or taken from, few others move: a training that starts from the weights of
    # an earlier one has hardly seen what it is validated on.
    by: str | np.ndarray = "validation" if train.file_digests is None else train.content_keys()
    if images.source == "memory":  # arrays, which may hold copies
        by = train.pixel_keys
    return stratified_split(train.labels, validation.fraction, by)


def validation_images(recipe: Recipe, images: ImageSet, held: np.ndarray | None) -> Images:
    """Those that a training validates on, with what is known of their files; held: as `Data` has it."""
    if held is not None:
        return images.train.take(held)
    if recipe.validation.source == "split" and images.validation is not None:
        return images.validation
    return images.test


def validation_label(recipe: Recipe, images: ImageSet) -> str:
    """What the validation figures of a run on these images are, to be said wherever they appear."""
    if recipe.validation.source == "test":
        return "validation = the test images"
    if recipe.validation.source == "fold":
        return f"validation = fold {recipe.validation.fold} of {recipe.validation.folds} of the train images, held out"
    if images.validation is not None:
        return "validation = the data set's own validation images"
    return f"validation = {100 * recipe.validation.fraction:.4g}% of the train images, held out"


def _check_arrays(part: Images, split: str, images: ImageSet) -> None:
    """Refuse arrays of other types and shapes than `Images` says: kernels read memory as these."""
    pixels, labels = part.pixels, part.labels
    found = f"{pixels.dtype} {pixels.shape} with labels {labels.dtype} {labels.shape}"
    if (pixels.dtype, labels.dtype, pixels.ndim, labels.shape) != (np.uint8, np.int64, 4, pixels.shape[:1]):
        raise InputError(f"{images.source}: {split} images: expected uint8 (N, H, W, C) with int64 (N,), found {found}")
    if pixels.shape[1:] != images.image_shape:
        raise InputError(
            f"{images.source}: {split} images are {pixels.shape[1:]} and train images {images.image_shape}"
        )


def check_image_set(recipe: Recipe, images: ImageSet) -> None:
    """Refuse what cannot be trained on. Raises InputError."""
    own = [("validation", images.validation)] if images.validation is not None else []
    if missing := {"train", "test"} - images.fingerprints.keys():  # by which a resume knows them again
        raise InputError(f"{images.name}: fingerprints has no {' and no '.join(sorted(missing))}: Images.fingerprint()")
    if images.num_classes < 2:
        raise InputError(f"{images.source}: expected two classes at least, found {images.num_classes}")
    for split, part in (("train", images.train), ("test", images.test), *own):
        if len(part) < 2:
            raise InputError(f"{images.source}: only {counted(len(part), f'{split} image')}")
        _check_arrays(part, split, images)
        if part.labels.min() < 0 or part.labels.max() >= images.num_classes:
            raise InputError(f"{images.source}: {split} labels are not all from 0 to {images.num_classes - 1}")
    height, width = images.image_shape[:2]
    for change in ("crop", "translate"):
        if (pixels := getattr(recipe.augment, change)) > min(height, width):
            raise InputError(f"augment.{change}: {pixels} is more than the {width}×{height} images have")
    smallest = augment.smallest_size(recipe.augment, height, width)
    if recipe.augment.cutout > min(smallest):
        as_what = "" if smallest == (height, width) else ", as they are cropped and scaled,"
        size = f"{smallest[1]}×{smallest[0]}"
        raise InputError(f"augment.cutout: {recipe.augment.cutout} is more than the {size} images{as_what} have")
    proxies = [recipe.proxy_network()] if recipe.hardest < 1 else []
    try:
        for network in (recipe.network, *proxies):
            layers(network, (*smallest, images.image_shape[2]), images.num_classes)
    except InputError as error:
        if smallest == (height, width):
            raise
        sizes = f"{width}×{height} images are trained on as {smallest[1]}×{smallest[0]}"
        raise InputError(f"{error}; {sizes}: see augment.scale and augment.crop") from None
    if recipe.validation.source == "split" and images.validation is None:
        present, counts = torch.from_numpy(images.train.labels).unique(return_counts=True)
        if (counts < 2).any():
            name = images.class_names[int(present[counts < 2][0])]
            raise InputError(
                f"{images.source}: class {name!r} has one train image left, too few to hold some out: add images of it"
            )
