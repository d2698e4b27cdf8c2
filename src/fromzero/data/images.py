"""The one form that images take: uint8 arrays with labels, class names and a fingerprint."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fromzero.errors import InputError
from fromzero.rng import permutation

NAMED = ("cifar10", "digits")  # data sets that are known by name
RECORDS_AT_ONCE = 250  # of the fingerprint: small enough to stay in the processor's cache


@dataclass(frozen=True)
class Images:
    """Pixels uint8 (N, H, W, C), labels int64 (N,), and the file that each came from, where each has one of its
    own, under the image set's `source`."""

    pixels: np.ndarray
    labels: np.ndarray
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Images:
        """The images at `indices`, in that order (a copy)."""
        files = tuple(self.files[index] for index in indices) if self.files else ()
        return Images(self.pixels[indices], self.labels[indices], files)

    def first_copies(self) -> np.ndarray:
        """int64 (N,): for each image the place of the first one of its class with the same pixels, its own if there is
        none before it."""
        first: dict[bytes, int] = {}
        return np.array([first.setdefault(digest, place) for place, digest in enumerate(self._digests)], np.int64)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the sorted SHA-256 digests of the records, each one label byte (two, little-endian, from
        256 classes on) and the pixels in the order C, H, W. It does not depend on the order of the images or on the
        file format."""
        return hashlib.sha256(b"".join(sorted(self._digests))).hexdigest()

    @cached_property
    def _digests(self) -> list[bytes]:
        """Of each image's record, as `fingerprint` says."""
        label_type = "u1" if self.labels.max() < 256 else "<u2"
        labels = self.labels.astype(label_type)[:, None].view(np.uint8)
        digests = []
        for start in range(0, len(self), RECORDS_AT_ONCE):
            part = slice(start, start + RECORDS_AT_ONCE)
            pixels = self.pixels[part].transpose(0, 3, 1, 2).reshape(len(labels[part]), -1)
            records = np.concatenate([labels[part], pixels], axis=1)
            digests += [hashlib.sha256(record.data).digest() for record in records]
        return digests


@dataclass(frozen=True)
class ImageSet:
    """Train and test images, and perhaps validation images of their own, with what identifies them. `source` says where
    they were read from, `notes` what whoever trains on them should know."""

    name: str
    train: Images
    test: Images
    class_names: tuple[str, ...]
    source: str
    fingerprints: dict[str, str]
    validation: Images | None = None
    notes: tuple[str, ...] = ()

    def order_digest(self) -> str:
        """SHA-256 (hex) over all images and labels in their order: splits and the order of training depend on it."""
        return self._order_digest

    @cached_property
    def _order_digest(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.test, *([self.validation] if self.validation else [])):
            digest.update(np.ascontiguousarray(part.pixels).data)
            digest.update(np.ascontiguousarray(part.labels, dtype="<i8").data)
        return digest.hexdigest()

    def subset(self, count: int) -> ImageSet:
        """The same with only about `count` of the train images, a fixed stratified choice (exactly `count` where it
        divides evenly among the classes); the test images stay. Named `NAME:count`. Raises InputError when there are
        not that many."""
        if not 2 * self.num_classes <= count <= len(self.train):
            raise InputError(
                f"{self.name}:{count}: a part of the {len(self.train):,} train images has from {2 * self.num_classes}"
                f" to {len(self.train):,} of them"
            )
        train = self.train
        if count < len(train):
            train = train.take(stratified_split(train.labels, count / len(train), "subset")[1])
            if lost := set(self.train.labels) - set(train.labels):
                name = self.class_names[min(lost)]
                raise InputError(f"{self.name}:{count}: would have no image of {name!r}, of which there is only one")
        return replace(
            self,
            name=f"{self.name}:{count}",
            train=train,
            fingerprints=self.fingerprints | {"train": train.fingerprint()},
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.train.pixels.shape[1:]
        return height, width, channels

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def own_name(stem: str, otherwise: str) -> str:
    """What an image set is called after its file or folder, unlike those that are known by name."""
    name = re.sub(r"[^\w-]+", "-", stem).strip("-_") or otherwise
    return f"{name}-{otherwise}" if name in NAMED else name


def stratified_split(
    labels: np.ndarray, fraction: float, purpose: str, first_copies: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): int64 indices in ascending order, with `round(fraction × count)` of each class held out, at
    least one and never all. Depends on the labels, the fraction and the purpose alone, never on a recipe's seed. With
    `first_copies`, of `Images`, pictures are counted and not their copies, which go where the first of them goes; of a
    class whose images are all copies of one, none is held out."""
    if first_copies is not None:
        pictures = np.flatnonzero(first_copies == np.arange(len(labels)))
        goes = np.zeros(len(labels), bool)
        goes[pictures[stratified_split(labels[pictures], fraction, purpose)[1]]] = True
        return np.flatnonzero(~goes[first_copies]), np.flatnonzero(goes[first_copies])
    order = permutation(len(labels), 0, purpose)
    held = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held.append(members[:count])
    held_out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
