"""Folders of pictures, a folder a class, as one array of small images.

Pictures are decoded once: the array is kept under `files.home()` and taken from there for as long as the folder lists
the same files with the same sizes and times. What is not a whole picture is left out and named, as long as that is few.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fromzero import files
from fromzero.data.decoding import Wrong, pool_of_threads, read_pictures, size_of_picture, unreadable
from fromzero.data.images import Images, ImageSet, own_name, stratified_split
from fromzero.data.listing import SPLITS, File, list_pictures, names_under, readable
from fromzero.errors import InputError, some
from fromzero.resources import check_memory

USUAL_SIDE, LARGEST_AS_IT_IS, LARGEST_SIDE = 32, 64, 512  # pixels
TEST_SHARE = 0.2
DAMAGED_SHARE = 0.05  # of the pictures; more of them are no accident, but a folder that is not what it seems
TOO_MANY = f"more than {DAMAGED_SHARE:.0%}, too many to leave out"
KEPT_AS = "pictures-5"  # raised when the same files would give other arrays or notes


def load_pictures(path: Path, side: int | None = None) -> ImageSet:
    """The pictures under `path`, which has a folder for each class, or `train` and perhaps `val` and `test` with a
    folder for each class in them. Folders within a class's are of that class.

    They are cut to the square in their middle and scaled to side × side. Without a side they stay as they are if all
    have one size, up to LARGEST_AS_IT_IS pixels, and else become USUAL_SIDE pixels wide and high. Without a test
    folder `val` is the test set; without both a fifth of each class is, chosen by the files' contents: copies in a
    class stay together, and pictures that are added later move few others. Files that are no whole pictures are left
    out, which a note says. Raises InputError, naming the files, when more than DAMAGED_SHARE of them or all of a class
    are so, or any cannot be opened, and when the folder has another shape.
    """
    if side is not None and not 1 <= side <= LARGEST_SIDE:
        raise InputError(f"{path}@{side}: images are from 1 to {LARGEST_SIDE} pixels wide")
    with readable(path):
        class_names, listed, notes = list_pictures(path)
        pixels, digests, whole, said = _kept_or_decoded(path, listed, side)
    listed = [listed[index] for index in whole]
    labels = np.array([file.label for file in listed], np.int64)
    splits = np.array([file.split for file in listed])
    notes = said + notes + _contradictions(listed, digests, path) + _doubles(listed, digests, path)
    if "test" not in splits:
        if "validation" in splits:
            splits[splits == "validation"] = "test"
            notes.append("no folder test: val is kept for the test")
        else:
            if alone := [name for name, count in zip(class_names, np.bincount(labels), strict=True) if count < 2]:
                raise InputError(f"{path}: class {alone[0]!r} has one picture, too few to keep some for the test")
            splits[stratified_split(labels, TEST_SHARE, digests)[1]] = "test"
            if "test" not in splits:
                raise InputError(f"{path}: each class has copies of one picture only; none is left for the test")
            notes.append("no folder test: a fifth of each class is kept for it (identical files stay together)")
    for split in np.unique(splits):
        present = set(labels[splits == split].tolist())
        if absent := [name for label, name in enumerate(class_names) if label not in present]:
            notes.append(f"no {split} picture of {some(absent)}")
    for split, seen_in in (("validation", "train"), ("test", "train"), ("test", "validation")):
        here = np.flatnonzero(splits == split)
        copies = here[np.isin(digests[here], digests[splits == seen_in])]
        if len(copies):
            named = some(names_under([listed[index].path for index in copies], path))
            notes.append(
                f"{len(copies)} of the {len(here):,} {split} pictures are in {seen_in} too, to the byte: {named}"
            )

    def part(split: str) -> Images:
        chosen = np.flatnonzero(splits == split)
        names = tuple(str(listed[index].path.relative_to(path)) for index in chosen)
        return Images(pixels[chosen], labels[chosen], names, digests[chosen])

    parts = {split: part(split) for split in SPLITS if split in splits}
    asked = path if path.name not in ("", "..") else path.resolve()  # so that a link keeps its name
    stem = own_name(asked.name, "pictures")
    return ImageSet(
        name=stem if side is None else f"{stem}@{side}",
        train=parts["train"],
        test=parts["test"],
        validation=parts.get("validation"),
        class_names=class_names,
        source=str(path.resolve()),
        fingerprints={split: images.fingerprint() for split, images in parts.items()},
        notes=tuple(notes),
    )


def _doubles(listed: Sequence[File], digests: np.ndarray, path: Path) -> list[str]:
    """A note on pictures that are twice in a class of a split, if there are any: they count twice."""
    of: dict[tuple[str, int, int], list[Path]] = {}
    for file, digest in zip(listed, digests.tolist(), strict=True):
        of.setdefault((file.split, file.label, digest), []).append(file.path)
    double = [paths for paths in of.values() if len(paths) > 1]
    if not double:
        return []
    more = sum(len(paths) - 1 for paths in double)
    named = []
    for paths in double:
        first, second, *others = names_under(paths, path)
        named.append(f"{first} and {second}{f' and {len(others)} more' if others else ''}")
    are = f"{more:,} pictures are copies" if more > 1 else "1 picture is a copy"
    return [f"{are} of others in their class, to the byte, and each counts in all figures: {some(named, between='; ')}"]


def _contradictions(listed: Sequence[File], digests: np.ndarray, path: Path) -> list[str]:
    """A note on pictures that are in two classes, if there are any: they cannot be right twice."""
    of: dict[int, list[File]] = {}
    for file, digest in zip(listed, digests.tolist(), strict=True):
        of.setdefault(digest, []).append(file)
    one_a_class = [list({file.label: file for file in files}.values()) for files in of.values()]
    double = [files for files in one_a_class if len(files) > 1]
    if not double:
        return []
    named = [" and ".join(names_under([file.path for file in files], path)) for files in double]
    are = f"{len(double):,} pictures are" if len(double) > 1 else "1 picture is"
    return [f"{are} in two classes, to the byte, so a label of each is wrong: {some(named, between='; ')}"]


_Decoded = tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]


def _kept_or_decoded(path: Path, listed: Sequence[File], side: int | None) -> _Decoded:
    """pixels uint8 (N, H, W, 3), digests uint64 (N,) of the files, the places (N,) in the list of those that are whole
    pictures, and notes on what was done."""
    listing = hashlib.sha256(KEPT_AS.encode())
    for file in listed:
        name, state = str(file.path.relative_to(path)), file.path.stat()
        listing.update(repr((name, file.split, file.label, state.st_size, state.st_mtime_ns)).encode())
    of_path = hashlib.sha256(os.fsencode(f"{path.resolve()}@{side}")).hexdigest()[:24]
    place = files.home() / "pictures" / f"{of_path}.npz"
    # Not there, of other files, or damaged in whatever way: decoded again.
    with contextlib.suppress(Exception), open(place, "rb") as kept_file, np.load(kept_file) as kept:
        if str(kept["listing"]) == listing.hexdigest():
            return kept["pixels"], kept["digests"], kept["whole"], kept["notes"].tolist()
    pixels, digests, whole, notes = _decoded(path, listed, side)
    partial = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            np.savez(
                out,
                listing=listing.hexdigest(),
                pixels=pixels,
                digests=digests,
                whole=whole,
                notes=np.array(notes, np.str_),
            )
        os.replace(partial, place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if not isinstance(error, OSError):  # a full disk or a folder that is not ours costs the next start some time
            raise
    return pixels, digests, whole, notes


def _decoded(path: Path, listed: Sequence[File], side: int | None) -> _Decoded:
    """As `_kept_or_decoded`, from the files."""
    paths = [file.path for file in listed]
    with pool_of_threads() as pool:
        size_of = list(pool.map(size_of_picture, paths))

    def scaled_to(sizes: set[tuple[int, int]]) -> tuple[int, int]:
        if side is None and len(sizes) == 1 and max(next(iter(sizes))) <= LARGEST_AS_IT_IS:
            return next(iter(sizes))
        return side or USUAL_SIDE, side or USUAL_SIDE

    def read(width: int, height: int, again: str = "") -> tuple[np.ndarray, np.ndarray, dict[int, Wrong]]:
        of = f"{path}: {len(paths):,} pictures of {width}×{height} pixels"
        # Once as they are read and once as parts, or as parts and as a training has them.
        check_memory(2 * len(paths) * height * width * 3, of, f"{path}@{max(width // 2, 1)} makes them smaller")
        return read_pictures(paths, height, width, f"reading {path}{again}")

    width, height = scaled_to({size for size in size_of if size})
    pixels, digests, wrong = read(width, height)
    sizes = {size for index, size in enumerate(size_of) if size and index not in wrong}
    if scaled_to(sizes) != (width, height) and sizes:  # what is left out says nothing about the rest
        width, height = scaled_to(sizes)
        del pixels
        pixels, digests, wrong = read(width, height, " once more")
    whole, notes = np.delete(np.arange(len(paths)), list(wrong)), []
    if wrong:
        left = {file[:2] for index, file in enumerate(listed) if index not in wrong}  # classes of the splits
        too_many = ""
        if not all(of.damaged for of in wrong.values()):
            too_many = "some could not be opened, which may be otherwise the next time"
        elif len(wrong) > DAMAGED_SHARE * len(paths):
            too_many = TOO_MANY
        elif left != {file[:2] for file in listed}:
            too_many = "all pictures of a class, too many to leave out"
        if too_many:
            raise InputError(f"{path}: {unreadable(paths, wrong)}; {too_many}: repair or remove them")
        notes.append(f"left out: {unreadable([file.path.relative_to(path) for file in listed], wrong)}")
        pixels, digests = pixels[whole], digests[whole]
    if sizes <= {(width, height)}:
        return pixels, digests, whole, notes
    widths, heights = zip(*sizes, strict=True)
    smallest, largest = f"{min(widths)}×{min(heights)}", f"{max(widths)}×{max(heights)}"
    of = smallest if smallest == largest else f"{smallest} to {largest}"
    are_larger = np.median([min(size) for size in size_of if size]) >= 1.5 * USUAL_SIDE
    larger = "; as FOLDER@64, with --recipe few64, to 64×64" if are_larger and not side else ""
    notes.append(f"pictures of {of} pixels, cut to squares and scaled to {width}×{height}{larger}")
    return pixels, digests, whole, notes
