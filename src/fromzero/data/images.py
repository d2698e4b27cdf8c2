"""The one form that images take: uint8 arrays with labels, class names and a fingerprint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from fromzero.errors import InputError
from fromzero.rng import permutation

NAMED = ("cifar10", "digits")  # data sets that are known by name
NAME_BYTES = 200  # of a file's or folder's name; systems allow 255, and there is something to come behind it
RECORDS_AT_ONCE = 250  # of the fingerprint: small enough to stay in the processor's cache


@dataclass(frozen=True, repr=False)
class Images:
    """Pixels uint8 (N, H, W, C), labels int64 (N,), and, where each has a file of its own, that under the
    image set's `source`, and eight bytes of the SHA-256 of each file, uint64 (N,)."""

    pixels: np.ndarray
    labels: np.ndarray
    files: tuple[str, ...] = ()
    file_digests: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"<{len(self):,} images {'×'.join(map(str, self.pixels.shape[1:]))}>"

    def take(self, indices: np.ndarray) -> Images:
        """The images at `indices`, in that order (a copy)."""
        files = tuple(self.files[index] for index in indices) if self.files else ()
        digests = None if self.file_digests is None else self.file_digests[indices]
        return Images(self.pixels[indices], self.labels[indices], files, digests)

    def content_keys(self) -> np.ndarray:
        """uint64 (N,), of each image its file's digest, where it has one, else that of its pixels; of those of a class
        that have the same pixels that of the first. They are like random numbers, and of pictures do not depend on the
        size that they are scaled to."""
        first: dict[bytes, int] = {}
        records, of_files = self.record_digests, self.file_digests
        digests = [int.from_bytes(r[:8], "little") for r in records] if of_files is None else of_files.tolist()
        keys = zip(records, digests, strict=True)
        return np.array([first.setdefault(record, digest) for record, digest in keys], np.uint64)

    @cached_property
    def pixel_keys(self) -> np.ndarray:
        """uint64 (N,), eight bytes of the SHA-256 of each image's pixels, whatever its label."""
        digests = replace(self, labels=np.zeros_like(self.labels)).record_digests
        return np.array([int.from_bytes(digest[:8], "little") for digest in digests], np.uint64)

    @property
    def file_hashes(self) -> list[str]:
        """How the SHA-256 (hex) of each file begins; empty texts of images that are from none."""
        if self.file_digests is None:
            return [""] * len(self)
        return [int(digest).to_bytes(8, "little").hex() for digest in self.file_digests]

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the sorted SHA-256 digests of the records, each one label byte (two, little-endian,
        where there are more than 256 classes) and the pixels in the order C, H, W. It does not depend on the order of
        the images or on the file format."""
        return hashlib.sha256(b"".join(sorted(self.record_digests))).hexdigest()

    @cached_property
    def record_digests(self) -> list[bytes]:
        """SHA-256 of each image with its label, of which `fingerprint` is made."""
        label_type = "u1" if self.labels.max() < 256 else "<u2"
        labels = self.labels.astype(label_type)[:, None].view(np.uint8)
        digests = []
        for start in range(0, len(self), RECORDS_AT_ONCE):
            part = slice(start, start + RECORDS_AT_ONCE)
            pixels = self.pixels[part].transpose(0, 3, 1, 2).reshape(len(labels[part]), -1)
            records = np.concatenate([labels[part], pixels], axis=1)
            digests += [hashlib.sha256(record.data).digest() for record in records]
        return digests


@dataclass(frozen=True, repr=False)
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

    @classmethod
    def of(
        cls,
        class_names: Sequence[str],
        train: Images | tuple[ArrayLike, ArrayLike],
        test: Images | tuple[ArrayLike, ArrayLike],
        validation: Images | tuple[ArrayLike, ArrayLike] | None = None,
        name: str = "arrays",
    ) -> ImageSet:
        """Of arrays, or of images of another set: pixels (N, H, W, C) as bytes, labels (N,) as places in class_names.
        Raises InputError for pixels that are none: who has shares from 0 to 1 multiplies by 255 and rounds."""
        one, two, own = _images(train), _images(test), None if validation is None else _images(validation)
        fingerprints = {"train": one.fingerprint(), "test": two.fingerprint()}
        if own is not None:
            fingerprints["validation"] = own.fingerprint()
        known, notes = set(one.pixel_keys.tolist()), []
        for split, part in (("test", two), *([("validation", own)] if own is not None else [])):
            if copies := sum(key in known for key in part.pixel_keys.tolist()):
                notes.append(f"{copies:,} of the {len(part):,} {split} images are train images too, to the byte")
        if more := len(one) - len(known):
            notes.append(f"{more:,} of the {len(one):,} train images are copies of others")
        names = tuple(class_names)
        return cls(own_name(name, "arrays"), one, two, names, "memory", fingerprints, own, tuple(notes))

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} {split}" for split, count in self.counts.items())
        return f"<{self.name}: {counts} images {'×'.join(map(str, self.image_shape))}, {self.num_classes} classes>"

    @cached_property
    def order_digest(self) -> str:
        """SHA-256 (hex) over all images and labels in their order: splits and the order of training depend on it."""
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
            notes=() if self.source == "memory" else self.notes,  # how many copies there are of all
            fingerprints=self.fingerprints | {"train": train.fingerprint()},
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many images each split has."""
        own = {} if self.validation is None else {"validation": len(self.validation)}
        return {"train": len(self.train), "test": len(self.test), **own}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.train.pixels.shape[1:]
        return height, width, channels

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def _images(of: Images | tuple[ArrayLike, ArrayLike]) -> Images:
    """Images of what can be made arrays of bytes and of whole numbers without loss. Raises InputError."""
    pixels, labels = (of.pixels, of.labels) if isinstance(of, Images) else of
    of_pixels, of_labels = np.asarray(pixels), np.asarray(labels)
    if of_pixels.dtype != np.uint8 or of_pixels.ndim != 4 or of_labels.dtype.kind not in "iu":
        found = f"{of_pixels.dtype} {of_pixels.shape} with labels {of_labels.dtype}"
        hint = "; of grey images pixels[..., None]" if of_pixels.ndim == 3 else ""
        raise InputError(
            f"expected pixels uint8 (N, H, W, C) with labels that are whole numbers (N,), found {found}{hint}"
        )
    if of_pixels.shape[1] in (1, 3) and of_pixels.shape[3] > 8:
        raise InputError(
            f"expected pixels (N, H, W, C), found {of_pixels.shape}, where channels seem to come first:"
            " pixels.transpose(0, 2, 3, 1)"
        )
    if of_labels.shape != of_pixels.shape[:1] or not len(of_labels):
        raise InputError(f"expected a label for each of {len(of_pixels):,} images, (N,), found {of_labels.shape}")
    return Images(np.ascontiguousarray(of_pixels), of_labels.astype(np.int64))


def own_name(stem: str, otherwise: str) -> str:
    """What an image set is called after its file or folder, unlike those that are known by name."""
    name = re.sub(r"[^\w-]+", "-", stem).encode()[:NAME_BYTES].decode(errors="ignore").strip("-_") or otherwise
    return f"{name}-{otherwise}" if name in NAMED else name


def stratified_split(labels: np.ndarray, fraction: float, by: str | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): int64 indices in ascending order, with `round(fraction × count)` of each class held out, at
    least one and never all. Never depends on a recipe's seed.

    by: a purpose, from which a fixed order is drawn; or a key for each image (N,), of which the lowest are held out.
    Images of one key stay together, so that a little fewer may be held out, and none of a class that has one key only.
    Those of a key that is in several classes are kept: they could only be scored by one of their labels."""
    keys = np.argsort(permutation(len(labels), 0, by)) if isinstance(by, str) else by
    different, places = np.unique(keys, return_inverse=True)
    in_classes = np.unique(np.column_stack((places, labels)), axis=0)[:, 0]
    is_in_one = np.bincount(in_classes, minlength=len(different)) == 1
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = labels == label
        own, counts = np.unique(places[members], return_counts=True)
        room = max(round(fraction * np.count_nonzero(members)), 1)
        chosen: list[int] = []
        for place, count in zip(own.tolist(), counts.tolist(), strict=True):
            if count <= room and is_in_one[place] and len(chosen) < len(own) - 1:
                chosen.append(place)
                room -= count
        if not chosen and len(own) > 1:
            chosen = own[is_in_one[own]][counts[is_in_one[own]].argsort(kind="stable")][:1].tolist()
        held_out |= members & np.isin(places, chosen)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def stratified_folds(labels: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Of each image to which of `count` folds it belongs, int64 (N,), from 0: each class is spread evenly over them.
    -1, in none, are the images of a class that has one key only, as whoever trains without its fold would not know that
    class. keys (N,): by which they are dealt; images of one key stay together, and of a class count once."""
    folds, dealt = np.full(len(labels), -1, np.int64), 0
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        different, places = np.unique(keys[members], return_inverse=True)
        if len(different) > 1:
            folds[members] = (dealt + places) % count
            dealt += len(different)
    different, places = np.unique(keys, return_inverse=True)
    lowest = np.full(len(different), count)
    np.minimum.at(lowest, places, folds)  # of a picture that is in two classes
    folds = lowest[places]
    for label in np.unique(labels):
        if len(np.unique(folds[labels == label])) == 1:
            folds[labels == label] = -1
    return folds
