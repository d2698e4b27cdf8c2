"""Which pictures a folder has, by class and split, and what lies among them that is none: names and places alone, no
picture is opened."""

from __future__ import annotations

import contextlib
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fromzero.errors import InputError, counted, one_line, some

SPLITS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff")
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw")
# What systems leave among pictures, in lower case; names that begin with a dot are hidden, too.
HIDDEN = (
    *("thumbs.db", "desktop.ini", "__macosx", "__pycache__", "$recycle.bin", "system volume information"),
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),  # of disks in a network
)


class File(NamedTuple):
    split: str
    label: int
    path: Path


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise InputError, naming the file, where something at `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror}") from None


def spelled(name: str) -> str:
    """A class's name in one of the ways in which systems write the same letters."""
    return unicodedata.normalize("NFC", name)


def labelled_pictures(path: Path, class_names: Sequence[str]) -> tuple[list[Path], np.ndarray, list[str]]:
    """The pictures under a folder with a folder for each of these classes, or for some of them; their labels int64
    (N,); and notes on what is not read. Raises InputError where it has other folders, or no pictures."""
    expected = f"expected a folder for each class, called as the run's classes are ({some(class_names)})"
    if not path.is_dir():
        raise InputError(f"{path}: no folder; {expected}")
    known = {spelled(name): label for label, name in enumerate(class_names)}
    listed = []
    with readable(path):
        left_out = [entry for entry in _shown(path) if not entry.is_dir()]
        for folder in _folders(path):
            if (name := spelled(_class_name(folder))) not in known:
                splits = [
                    one for names in reversed(SPLITS.values()) for one in _folders(path) if one.name.lower() in names
                ]
                meant = f"; if that is a split, name it: {splits[0]}" if folder in splits and _folders(folder) else ""
                raise InputError(f"{path}: {expected}; found {folder.name}{meant}")
            pictures, others, _ = _under(folder)
            listed += [(picture, known[name]) for picture in pictures]
            left_out += others
    if not listed:
        loose = sum(_is_picture(entry) for entry in left_out)
        found = f"{counted(loose, 'picture')} in it, and in no class folder" if loose else "no pictures in it"
        own = spelled(path.resolve().name)
        meant = f"; {own} is a class: name the folder that it lies in, {path.resolve().parent}" if own in known else ""
        raise InputError(f"{path}: {found}; {expected}{meant}")
    paths, labels = zip(*listed, strict=True)
    return list(paths), np.array(labels, np.int64), _not_read(left_out, path)


def pictures_at(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The pictures named, there or not, and those in and under the folders named; and notes on what else is in those.
    Raises InputError for a folder with none."""
    found: list[Path] = []
    notes: list[str] = []
    for path in paths:
        with readable(path):
            pictures, others, _ = _under(path) if path.is_dir() else ([path], [], [])
        said = _not_read(others, path)
        if not pictures:
            raise InputError("; ".join([f"{path}: no pictures ({', '.join(ENDINGS)}) in it", *said]))
        found += pictures
        notes += [f"{path}: {note}" for note in said]
    return found, notes


def list_pictures(path: Path) -> tuple[tuple[str, ...], list[File], list[str]]:
    """The class names, all pictures in a fixed order, and notes on what lies elsewhere. Raises InputError when the
    folder has another shape."""
    found: dict[str, Path] = {}
    loose, split_like = [], []
    for folder in _folders(path):
        split = next((split for split, names in SPLITS.items() if folder.name.lower() in names), None)
        if split is None or not _folders(folder):  # else a class that is called like a split
            loose.append(folder)
        elif split in found:
            raise InputError(f"{path}: has {found[split].name} and {folder.name}, which mean the same; keep one")
        else:
            found[split] = folder
    if "train" in found:
        for folder in loose:
            if folder.name.lower() in itertools.chain(*SPLITS.values()):
                raise InputError(f"{folder}: expected a folder for each class; found {_inside(folder)}")
    elif found:
        raise InputError(f"{path}: has {' and '.join(f.name for f in found.values())}, but no train with class folders")
    else:
        split_like = [one.name for one in loose if one.name.lower() in itertools.chain(*SPLITS.values())]
        found, loose = {"train": path}, []
    class_names = tuple(folder.name for folder in _folders(found["train"]))
    if len(class_names) < 2:
        below = [folder for folder in _folders(found["train"]) if len(_folders(folder)) > 1]
        are = "the splits or the classes"
        meant = f"; {below[0]} has folders in it: if those are {are}, name that" if below else ""
        raise InputError(
            f"{found['train']}: expected a folder for each of at least two classes with its pictures in it, or train,"
            f" val and test with such, or CIFAR's data_batch files; found {_inside(found['train'])}{meant}"
        )
    labels: dict[str, int] = {}
    for label, name in enumerate(class_names):
        if (same := labels.setdefault(spelled(name), label)) != label:
            both = f"{class_names[same]!r} and {name!r} are one name, written in two ways"
            raise InputError(f"{found['train']}: {both}: rename one, or put both together")
    listed, left_out, deeper = [], list(loose), []
    for split, root in found.items():
        left_out += [entry for entry in _shown(root) if not entry.is_dir()]
        for folder in _folders(root):
            if spelled(folder.name) not in labels:
                raise InputError(f"{folder}: a class that {found['train']} does not have")
            pictures, others, within = _under(folder)
            if not pictures and split == "train":
                raise InputError(
                    f"{folder}: expected the pictures of a class ({', '.join(ENDINGS)}); found {_inside(folder)}; put"
                    " some there, or remove the folder"
                )
            if len(within) > 1 and folder not in {picture.parent for picture in pictures}:
                raise InputError(
                    f"{folder}: has no pictures of its own but folders with such, {some([x.name for x in within])}; if"
                    f" those are classes, name {folder} as the data set, and if {folder.name} is one, put its pictures"
                    " into it"
                )
            listed += [File(split, labels[spelled(folder.name)], picture) for picture in pictures]
            left_out += others
            deeper += within
    notes = [f"the folder {name}, without folders in it, is a class here and no split" for name in split_like]
    if deeper:
        notes.append(f"pictures in a folder within a class are of that class: {some(names_under(deeper, path))}")
    notes += _not_read(left_out, path)
    return tuple(_class_name(folder) for folder in _folders(found["train"])), listed, notes


def _not_read(left_out: Sequence[Path], path: Path) -> list[str]:
    """Notes on files under a folder of pictures that are none of its pictures."""
    notes = []
    if unread := [entry for entry in left_out if entry.suffix.lower() in UNREAD]:
        kinds = " and ".join(sorted({entry.suffix.lower() for entry in unread}))
        named = some(names_under(unread, path))
        notes.append(f"not read, {len(unread):,} of {kinds}: {named}; as JPEG or PNG they would be")
    if others := [entry for entry in left_out if entry not in unread]:
        notes.append(f"not read, being no pictures by their names or places: {some(names_under(others, path))}")
    return notes


def _class_name(folder: Path) -> str:
    """Whatever the locale makes of its bytes: a run may be looked at under another one."""
    return os.fsencode(folder.name).decode("utf-8", "surrogateescape")


def _shown(folder: Path) -> list[Path]:
    """What is in it, but for what systems leave there."""
    return sorted(entry for entry in folder.iterdir() if not _is_hidden(entry.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HIDDEN


def _folders(path: Path) -> list[Path]:
    """The folders in it; not those that runs are kept in, which may be here because the training began here."""
    return [folder for folder in _shown(path) if folder.is_dir() and not _holds_runs(folder)]


def _holds_runs(folder: Path) -> bool:
    os.scandir(folder).close()  # raises, where it cannot be read, by its own name
    return any(folder.glob("studies/*/study.json")) or any(folder.glob("*/provenance.json"))


def _under(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The pictures in and under it, what else there is, and the folders in it with such pictures."""
    pictures: list[Path] = []
    others: list[Path] = []
    to_read = [folder]
    while to_read:
        for entry in _shown(to_read.pop()):
            if _is_picture(entry):
                pictures.append(entry)
            elif entry.is_dir() and not entry.is_symlink() and not _holds_runs(entry):  # a link may lead back here
                to_read.append(entry)
            else:
                others.append(entry)
    within = {folder / picture.relative_to(folder).parts[0] for picture in pictures if picture.parent != folder}
    return sorted(pictures), sorted(others), sorted(within)


def _is_picture(path: Path) -> bool:
    """By its name; a link to nothing is meant as one, and is named as what cannot be read; pipes and devices are none,
    as they may never end."""
    named = path.suffix.lower() in ENDINGS and not _is_hidden(path.name)
    return named and (path.is_file() or (path.is_symlink() and not path.exists()))


def names_under(entries: Iterable[Path], path: Path) -> list[str]:
    """Their paths from there."""
    return [one_line(str(entry.relative_to(path))) for entry in entries]


def _inside(folder: Path) -> str:
    """What is in it, in words."""
    return some([entry.name for entry in _shown(folder)]) or "nothing"
