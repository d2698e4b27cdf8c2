"""Where images come from: one `ImageSet`, whatever the source.

`load_images` hides formats, caches, downloads and checks. To add a source, write a function that returns an
`ImageSet` and give it a line in `load_images`.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from fromzero.data.cifar import is_cifar, load_cifar, load_cifar10
from fromzero.data.digits import load_digits
from fromzero.data.images import NAMED, Images, ImageSet, stratified_folds, stratified_split
from fromzero.errors import InputError, checking_types, nearest

__all__ = [
    "NAMED",
    "ImageSet",
    "Images",
    "load_images",
    "split_name",
    "split_recorded",
    "stratified_folds",
    "stratified_split",
]


def split_name(name: str) -> tuple[str, str]:
    """The name of an image set, or its path, and the options at its end: `("photos", "@64:500")`. A path may have an @
    or : of its own, even at its end: the longest one that is there is meant."""
    stem = name
    while not os.path.exists(stem) and (part := re.fullmatch(r"(.+)(?:@\d{1,4}|:\d{1,9})", stem, re.DOTALL)):
        stem = part[1]
    return stem, name[len(stem) :]


def split_recorded(name: str, source: str) -> tuple[str, str]:
    """The same of the name of an image set that was read from `source`, whatever is there by now."""
    stem = Path(source).name
    options = r"((?:@\d{1,4})?(?::\d{1,9})?)"
    if stem and name.startswith(stem) and re.fullmatch(options, name[len(stem) :]):
        return stem, name[len(stem) :]
    part = re.fullmatch(f"(.+?){options}", name, re.DOTALL)
    return (part[1], part[2]) if part else (name, "")


@checking_types
def load_images(
    dataset: str | Path = "cifar10", *, data_dir: str | Path | None = None, offline: bool = False
) -> ImageSet:
    """The image set called `dataset`: "cifar10", "digits", or the path of a folder of pictures or of a CIFAR folder or
    archive; each may end in `:N` for a fixed stratified N of its train images, as in "cifar10:10000", and a folder of
    pictures before that in `@S`, for pictures of S × S pixels (see `load_pictures`).

    cifar10 is looked for under `data_dir`, under `FROMZERO_HOME` and where torchvision and Keras keep it, and is
    downloaded if it is nowhere and `offline` is not set. Raises InputError when there is no such data set, when a
    file is damaged (which, what was expected, what was found), when it cannot be had, or when `data_dir` is given for
    what is not looked for: digits, and whatever is named by its path.
    """
    if str(dataset) in NAMED and os.path.isdir(dataset):
        warnings.warn(f"{dataset} is the data set of that name; for the folder: ./{dataset}", stacklevel=2)
    match str(dataset):
        case "cifar10":
            return load_cifar10(data_dir, offline=offline)
        case "digits" if data_dir is not None:
            raise InputError(
                f"data folder {data_dir}: digits come with scikit-learn and are not looked for; leave it out"
            )
        case "digits":
            return load_digits()
        case path if data_dir is not None and (stem := split_name(path)[0]) not in NAMED and os.path.exists(stem):
            raise InputError(
                f"data folder {data_dir}: where {path} is, its own path says; leave it out (it is for cifar10, or for a"
                " run whose images have moved)"
            )
        case path if os.path.exists(path) and not (os.path.isdir(path) or os.path.isfile(path)):
            raise InputError(f"{path}: is neither a folder nor a file; name a folder of pictures, or CIFAR's archive")
        case path if os.path.exists(path):
            return load_cifar(Path(path)) if is_cifar(Path(path)) else _load_pictures(Path(path))
        case name if (part := re.fullmatch(r"(.+):(\d{1,9})", name)) and (
            os.path.exists(part[1]) or not re.search(r":\d{1,9}$", part[1])
        ):
            return load_images(part[1], data_dir=data_dir, offline=offline).subset(int(part[2]))
        case name if (part := re.fullmatch(r"(.+)@(\d{1,4})", name)) and os.path.isdir(part[1]):
            return _load_pictures(Path(part[1]), int(part[2]))
        case name if (part := re.match(r"(.+?)(?=[@:])", name)) and os.path.exists(part[1]):
            raise InputError(
                f"data set {name!r}: behind {part[1]} may come @PIXELS, if it is a folder of pictures, and then :COUNT,"
                f" as in {part[1]}@64:5000"
            )
        case name if (parts := name.partition(":"))[0] in NAMED:
            raise InputError(f"data set {name!r}: {parts[2]!r} is no number of train images, as in {parts[0]}:5000")
        case name:
            instead = "; a path given beside a recipe that names it counts: fromzero train FOLDER --recipe FILE"
            also = instead if os.path.isabs(name) else ""  # as a run's recipe has it
            raise InputError(f"unknown data set {name!r}: not a path that exists{nearest(name, NAMED)}{also}")


def _load_pictures(path: Path, side: int | None = None) -> ImageSet:
    from fromzero.data.pictures import load_pictures  # with Pillow, which nothing else needs before the end of a run

    return load_pictures(path, side)
