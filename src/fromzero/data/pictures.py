"""Folders of pictures, a folder a class, as one array of small images.

Pictures are decoded once: the array is kept under `files.home()` and taken from there for as long as the folder lists
the same files with the same sizes and times. What is not a whole picture is left out and named, as long as that is few.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from fromzero import files
from fromzero.data.images import Images, ImageSet, own_name
from fromzero.errors import InputError, counted, some
from fromzero.resources import check_memory, num_threads

SPLITS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # other decoders are not tried on anybody's file
ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff")
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw")
USUAL_SIDE, LARGEST_AS_IT_IS, LARGEST_SIDE = 32, 64, 512  # pixels
TEST_SHARE = 0.2
DAMAGED_SHARE = 0.05  # of the pictures; more of them are no accident, but a folder that is not what it seems
TOO_MANY = f"more than {DAMAGED_SHARE:.0%}, too many to leave out"
KEPT_AS = "pictures-3"  # raised when the same files would give other arrays
HIDDEN = (".", "__", "@", "Thumbs.db", "desktop.ini")  # how names begin that systems leave among pictures
UNREADABLE_NAMED = 50  # so that all can be removed before the next try


class _File(NamedTuple):
    split: str
    label: int
    path: Path


class Wrong(NamedTuple):
    """Why a picture cannot be read, and whether its contents are to blame: anything else may pass."""

    why: str
    damaged: bool


_Outcome = tuple[np.ndarray, int] | Wrong  # pixels and digest of a file, or what is wrong with it


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
    with _readable(path):
        class_names, listed, notes = _listed(path)
        pixels, digests, whole, said = _kept_or_decoded(path, listed, side)
    listed = [listed[index] for index in whole]
    labels = np.array([file.label for file in listed], np.int64)
    splits = np.array([file.split for file in listed])
    notes = said + notes + _contradictions(listed, digests, path)
    if "test" not in splits:
        if "validation" in splits:
            splits[splits == "validation"] = "test"
            notes.append("no folder test: val is kept for the test")
        else:
            if alone := [name for name, count in zip(class_names, np.bincount(labels), strict=True) if count < 2]:
                raise InputError(f"{path}: class {alone[0]!r} has one picture, too few to keep some for the test")
            splits[_fifth(labels, digests)] = "test"
            if "test" not in splits:
                raise InputError(f"{path}: each class has copies of one picture only; none is left for the test")
            notes.append("no folder test: a fifth of each class, copies together, is kept for it")
    for split in np.unique(splits):
        present = set(labels[splits == split].tolist())
        if absent := [name for label, name in enumerate(class_names) if label not in present]:
            notes.append(f"no {split} picture of {some(absent)}")
    for split, seen_in in (("validation", "train"), ("test", "train"), ("test", "validation")):
        here = np.flatnonzero(splits == split)
        copies = here[np.isin(digests[here], digests[splits == seen_in])]
        if len(copies):
            named = some(_names([listed[index].path for index in copies], path))
            notes.append(
                f"{len(copies)} of the {len(here):,} {split} pictures are in {seen_in} too, to the byte: {named}"
            )

    def part(split: str) -> Images:
        chosen = np.flatnonzero(splits == split)
        names = tuple(str(listed[index].path.relative_to(path)) for index in chosen)
        return Images(pixels[chosen], labels[chosen], names, digests[chosen])

    parts = {split: part(split) for split in SPLITS if split in splits}
    stem = own_name(path.resolve().name, "pictures")
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


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise InputError, naming the file, where something at `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror}") from None


def _contradictions(listed: Sequence[_File], digests: np.ndarray, path: Path) -> list[str]:
    """A note on pictures that are in two classes, if there are any: they cannot be right twice."""
    of: dict[int, list[_File]] = {}
    for file, digest in zip(listed, digests.tolist(), strict=True):
        of.setdefault(digest, []).append(file)
    one_a_class = [list({file.label: file for file in files}.values()) for files in of.values()]
    double = [files for files in one_a_class if len(files) > 1]
    if not double:
        return []
    named = [" and ".join(_names([file.path for file in files], path)) for files in double]
    are = f"{len(double):,} pictures are" if len(double) > 1 else "1 picture is"
    return [f"{are} in two classes, to the byte: {some(named, between='; ')}"]


def labelled_pictures(path: Path, class_names: Sequence[str]) -> tuple[list[Path], np.ndarray, list[str]]:
    """The pictures under a folder with a folder for each of these classes, or for some of them; their labels int64
    (N,); and notes on what is not read. Raises InputError where it has other folders, or no pictures."""
    expected = f"expected a folder for each class, called as the run's classes are ({some(class_names)})"
    if not path.is_dir():
        raise InputError(f"{path}: no folder; {expected}")
    # Systems write the same letters in different ways.
    known = {unicodedata.normalize("NFC", name): label for label, name in enumerate(class_names)}
    listed = []
    with _readable(path):
        left_out = [entry for entry in _shown(path) if not entry.is_dir()]
        for folder in _folders(path):
            if (name := unicodedata.normalize("NFC", _class_name(folder))) not in known:
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
        own = unicodedata.normalize("NFC", path.resolve().name)
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
        with _readable(path):
            pictures, others, _ = _under(path) if path.is_dir() else ([path], [], [])
        said = _not_read([entry for entry in others if entry.suffix.lower() in UNREAD], path)
        if not pictures:
            raise InputError("; ".join([f"{path}: no pictures ({', '.join(ENDINGS)}) in it", *said]))
        found += pictures
        notes += [f"{path}: {note}" for note in said]
    return found, notes


def _listed(path: Path) -> tuple[tuple[str, ...], list[_File], list[str]]:
    """The class names, all pictures in a fixed order, and notes on what lies elsewhere. Raises InputError when the
    folder has another shape."""
    found: dict[str, Path] = {}
    loose = []
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
        found, loose = {"train": path}, []
    class_names = tuple(folder.name for folder in _folders(found["train"]))
    if len(class_names) < 2:
        below = [folder for folder in _folders(found["train"]) if len(_folders(folder)) > 1]
        meant = f"; {below[0]} has folders in it: if those are the classes, name that" if below else ""
        raise InputError(
            f"{found['train']}: expected a folder for each of at least two classes with its pictures in it, or train,"
            f" val and test with such, or CIFAR's data_batch files; found {_inside(found['train'])}{meant}"
        )
    listed, left_out, deeper = [], list(loose), []
    for split, root in found.items():
        left_out += [entry for entry in _shown(root) if not entry.is_dir()]
        for folder in _folders(root):
            if folder.name not in class_names:
                raise InputError(f"{folder}: a class that {found['train']} does not have")
            pictures, others, within = _under(folder)
            if not pictures and split == "train":
                raise InputError(
                    f"{folder}: expected the pictures of a class ({', '.join(ENDINGS)}); found {_inside(folder)}"
                )
            if len(within) > 1 and folder not in {picture.parent for picture in pictures}:
                raise InputError(
                    f"{folder}: has no pictures of its own but folders with such, {some([x.name for x in within])}; if"
                    f" those are classes, name {folder} as the data set, and if {folder.name} is one, put its pictures"
                    " into it"
                )
            listed += [_File(split, class_names.index(folder.name), picture) for picture in pictures]
            left_out += others
            deeper += within
    notes = []
    if deeper:
        notes.append(f"pictures in a folder within a class are of that class: {some(_names(deeper, path))}")
    notes += _not_read(left_out, path)
    return tuple(_class_name(folder) for folder in _folders(found["train"])), listed, notes


def _not_read(left_out: Sequence[Path], path: Path) -> list[str]:
    """Notes on files under a folder of pictures that are none of its pictures."""
    notes = []
    if unread := [entry for entry in left_out if entry.suffix.lower() in UNREAD]:
        kinds = " and ".join(sorted({entry.suffix.lower() for entry in unread}))
        named = some(_names(unread, path))
        notes.append(f"not read, {len(unread):,} of {kinds}: {named}; as JPEG or PNG they would be")
    if others := [entry for entry in left_out if entry not in unread]:
        notes.append(f"not read, being no picture in a class folder: {some(_names(others, path))}")
    return notes


def _class_name(folder: Path) -> str:
    """Whatever the locale makes of its bytes: a run may be looked at under another one."""
    return os.fsencode(folder.name).decode("utf-8", "surrogateescape")


def _shown(folder: Path) -> list[Path]:
    """What is in it, but for what systems leave there."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith(HIDDEN))


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
    """By its name; a link to nothing is meant as one, and is named as what cannot be read."""
    named = path.suffix.lower() in ENDINGS and not path.name.startswith(HIDDEN)
    return named and (path.is_symlink() or path.is_file())


def _names(entries: Iterable[Path], path: Path) -> list[str]:
    return [str(entry.relative_to(path)) for entry in entries]


def _inside(folder: Path) -> str:
    """What is in it, in words."""
    return some([entry.name for entry in _shown(folder)]) or "nothing"


_Decoded = tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]


def _kept_or_decoded(path: Path, listed: Sequence[_File], side: int | None) -> _Decoded:
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


def _decoded(path: Path, listed: Sequence[_File], side: int | None) -> _Decoded:
    """As `_kept_or_decoded`, from the files."""
    paths = [file.path for file in listed]
    with _pool() as pool:
        size_of = list(pool.map(_size, paths))

    def scaled_to(sizes: set[tuple[int, int]]) -> tuple[int, int]:
        if side is None and len(sizes) == 1 and max(next(iter(sizes))) <= LARGEST_AS_IT_IS:
            return next(iter(sizes))
        return side or USUAL_SIDE, side or USUAL_SIDE

    width, height = scaled_to({size for size in size_of if size})
    of = f"{path}: {len(paths):,} pictures of {width}×{height} pixels"
    # Once as they are read and once as parts, or as parts and as a training has them.
    check_memory(2 * len(paths) * height * width * 3, of, f"{path}@{max(width // 2, 1)} makes them smaller")
    pixels, digests, wrong = read_pictures(paths, height, width, f"reading {path}")
    sizes = {size for index, size in enumerate(size_of) if size and index not in wrong}
    if scaled_to(sizes) != (width, height) and sizes:  # what is left out says nothing about the rest
        width, height = scaled_to(sizes)
        pixels, digests, wrong = read_pictures(paths, height, width, f"reading {path} once more")
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
    larger = "" if side else f" ({path.resolve().name}@64: to 64×64, best with --recipe few64)"
    notes.append(f"pictures of {of} pixels, cut to squares and scaled to {width}×{height}{larger}")
    return pixels, digests, whole, notes


def read_pictures(
    paths: Sequence[Path], height: int, width: int, doing: str
) -> tuple[np.ndarray, np.ndarray, dict[int, Wrong]]:
    """The pictures in these files, cut to their middle and scaled: RGB pixels uint8 (N, height, width, 3); uint64 (N,),
    eight bytes of each file's SHA-256; and what is wrong with those that cannot be read, by their place, where the rest
    is zeros. `doing` is what a terminal shows meanwhile."""
    pixels, digests = np.zeros((len(paths), height, width, 3), np.uint8), np.zeros(len(paths), np.uint64)
    wrong: dict[int, Wrong] = {}
    with _pool() as pool:
        found = pool.map(lambda picture: _decode(picture, width, height), paths)
        for index, outcome in enumerate(_watched(found, len(paths), doing)):
            if isinstance(outcome, Wrong):
                wrong[index] = outcome
            else:
                pixels[index], digests[index] = outcome
    return pixels, digests, wrong


def unreadable(paths: Sequence[Path], wrong: Mapping[int, Wrong]) -> str:
    """What `read_pictures` found wrong, in words: the first files by name, after what they have in common."""
    named: dict[str, list[str]] = {}
    for index in list(wrong)[:UNREADABLE_NAMED]:
        named.setdefault(wrong[index].why, []).append(str(paths[index]))
    reasons = [f"{why}: {', '.join(files)}" for why, files in named.items()]
    if len(wrong) > UNREADABLE_NAMED:
        reasons.append(f"and {len(wrong) - UNREADABLE_NAMED} more")
    of = "1 picture" if len(paths) == 1 else f"{len(paths):,} pictures"
    return f"{len(wrong)} of {of} cannot be read ({'; '.join(reasons)})"


@contextlib.contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that decode, stopped with what they have not begun when anything stops the one that waits for them."""
    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads()) as pool:
        warnings.simplefilter("ignore")  # of large pictures, odd metadata: what cannot be read is an error of its own
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _watched(found: Iterable[_Outcome], count: int, doing: str) -> Iterable[_Outcome]:
    """The same, on a terminal with a bar while it lasts."""
    console = Console(stderr=True)
    quiet = not console.is_terminal
    return track(found, escape(doing), count, console=console, transient=True, disable=quiet)


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height as the picture is meant to be looked at; None where that cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            size = image.size
            # Pillow turns a TIFF itself, and decodes the whole of a PNG to look for what it mostly has not.
            looked_for = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            with contextlib.suppress(Exception):  # damaged EXIF data turn nothing
                if looked_for and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
                    size = size[::-1]
            return size
    except Exception:  # decoders raise all kinds of errors at damaged files; `_decode` says which
        return None


def preparation(height: int, width: int) -> str:
    """How pictures become pixels of that size, for those who prepare them elsewhere."""
    draft = f"draft('RGB', ({2 * width}, {2 * height}))"
    return (
        f"RGB, a JPEG of {4 * width}×{4 * height} or more decoded smaller by Pillow's {draft}, turned as EXIF says, on"
        " white where transparent, cut to the largest part in the middle of the same shape, scaled by Pillow's Lanczos"
        f" to {width}×{height}"
    )


def _decode(path: Path, width: int, height: int) -> _Outcome:
    """RGB pixels uint8 (height, width, 3), from the middle of the picture and on white where it is transparent, and
    eight bytes of the file's SHA-256 as a number; or what is wrong."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return Wrong(error.strerror or type(error).__name__, damaged=False)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.draft("RGB", (2 * width, 2 * height))  # a large JPEG is not decoded in full only to be made small
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith(("I", "F")):
                return Wrong("more than 8 bits a channel", damaged=True)
            if image.has_transparency_data:
                over = image.convert("RGBA")
                plain = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
            else:
                plain = image.convert("RGB")
            if plain.size != (width, height):
                plain = ImageOps.fit(plain, (width, height), Image.Resampling.LANCZOS)
            return np.asarray(plain), int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        return Wrong("too many pixels to be safely decoded", damaged=True)
    except UnidentifiedImageError:
        return Wrong(f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}" if content else "empty", damaged=True)
    except Exception as error:  # whatever decoders raise at damaged files
        return Wrong(" ".join(str(error).split())[:120] or type(error).__name__, damaged=True)


def _fifth(labels: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """The pictures kept for the test: of each class those whose digests are the lowest, copies together, and at least
    one picture with its copies; none of a class that is one picture."""
    kept = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        values, counts = np.unique(digests[members], return_counts=True)
        room, chosen = max(round(TEST_SHARE * len(members)), 1), []
        for value, count in zip(values, counts, strict=True):
            if count <= room:
                chosen.append(value)
                room -= count
        if not chosen and len(values) > 1:
            chosen.append(values[counts.argmin()])
        kept.append(members[np.isin(digests[members], chosen)])
    return np.concatenate(kept)
