"""CIFAR-10 and data sets in its layout: binary batches, python batches, or the published archives.

The python batches are pickles; they are read by an unpickler that admits plain data only, so no code in a file can
run. Archives are never unpacked as they say: the known members are read by name. CIFAR-10: Krizhevsky, "Learning
Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fromzero import files
from fromzero.data import download
from fromzero.data.images import Images, ImageSet, own_name
from fromzero.errors import InputError

RECORD_BYTES = 1 + 3 * 32 * 32
CIFAR10_FINGERPRINTS = {
    "train": "55a61f79a40ece2ceda9fb5f9f7078f6ea2fc4952489cef56682bcf92cfcc260",
    "test": "325704b01eb92e1e2a6215ae6a916bb7db7de054af0c496be1c7be2e0fcfbf5f",
}
# The order digest of the published batches, one after the other. It stands for every byte of them in their order, so
# the fingerprints follow from it, and 60,000 digests need not be taken.
CIFAR10_ORDER = "8b818dc7632c898cba85f29df82c399a5c3e56fceba3f162efaf4490a40ca959"
FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz", "cifar-10-batches-py.tar.gz")
LARGEST_MEMBER_BYTES = 10**9


class _Batch(NamedTuple):
    """A batch as its file has it: pixels uint8 (N, 3072) in the order C, H, W, and labels uint8 (N,)."""

    rows: np.ndarray
    labels: np.ndarray


class _Format(NamedTuple):
    """How one of the two layouts names and encodes its files."""

    train: re.Pattern[str]
    test: str
    names: str
    read_batch: Callable[[bytes, str], _Batch]
    read_names: Callable[[bytes, str], tuple[str, ...]]

    def members(self, names: Iterable[str]) -> list[str]:
        return sorted(n for n in names if self.train.fullmatch(n) or n in (self.test, self.names))


def load_cifar10(data_dir: str | Path | None = None, *, offline: bool = False) -> ImageSet:
    """CIFAR-10, from the first place that has it, else downloaded; refused if the images are not CIFAR-10's."""
    places = [Path(data_dir)] if data_dir is not None else usual_places()
    if data_dir is not None and not os.path.isdir(data_dir):
        raise InputError(f"data folder {data_dir} is not there or not a folder")
    found = next((path for place in places for path in _candidates(place)), None)
    if found is None:
        if data_dir is not None:
            raise InputError(
                f"no CIFAR-10 under {data_dir}: expected a folder {' or '.join(FOLDERS)},"
                f" or an archive {' or '.join(ARCHIVES[:2])}"
            )
        archive = download.fetch_cifar10(files.home(), offline=offline)
        found = unpack(archive)
    image_set = load_cifar(found, name="cifar10")
    for split, expected in CIFAR10_FINGERPRINTS.items():
        if image_set.fingerprints[split] != expected:
            raise InputError(
                f"{found}: the {split} images are not CIFAR-10's: expected fingerprint {expected[:12]}…, found"
                f" {image_set.fingerprints[split][:12]}…; put the published files there, or name the path itself"
                " as the data set to train on what it holds"
            )
    return image_set


def usual_places() -> list[Path]:
    """Folders where CIFAR-10 is looked for: fromzero's own, torchvision's usual ones, Keras's."""
    own = Path(os.path.expanduser("~"))  # Path.home() raises where there is none, as in some containers
    keras = Path(os.environ.get("KERAS_HOME") or own / ".keras") / "datasets"
    # Keras 3 unpacks into a folder named after its archive.
    return [files.home(), Path("data"), own / "data", keras, keras / "cifar-10-batches-py-target"]


def load_cifar(path: Path, name: str | None = None) -> ImageSet:
    """The image set in a folder or archive of CIFAR's layout, binary or python. Raises InputError, naming the file,
    what was expected and what was found, when it is damaged."""
    if path.is_dir():
        inside = next(iter(_candidates(path)), path)
        members = _folder_files(inside) if inside.is_dir() else _archive_files(inside)
    else:
        inside, members = path, _archive_files(path)
    layout, contents = _layout(members, inside)
    class_names = layout.read_names(contents[layout.names], f"{inside}/{layout.names}")
    batches = {
        member: layout.read_batch(data, f"{inside}/{member}")
        for member, data in contents.items()
        if member != layout.names
    }
    for member, batch in batches.items():
        if batch.labels.max() >= len(class_names):
            raise InputError(
                f"{inside}/{member}: damaged: expected labels 0 to {len(class_names) - 1}"
                f" ({layout.names} has {len(class_names)} names), found {batch.labels.max()}"
            )
    test, train = _images([batches.pop(layout.test)]), _images(list(batches.values()))
    source = str(inside.resolve())
    supposed = ImageSet(name or "cifar10", train, test, class_names, source, dict(CIFAR10_FINGERPRINTS))
    if supposed.order_digest == CIFAR10_ORDER:
        return supposed
    fingerprints = {"train": train.fingerprint(), "test": test.fingerprint()}
    own = "cifar10" if fingerprints == CIFAR10_FINGERPRINTS else own_name(path.name.split(".")[0], "images")
    return replace(supposed, name=name or own, fingerprints=fingerprints)


def is_cifar(path: Path) -> bool:
    """Whether it is meant as CIFAR's: a file, or a folder with one of its files or archives in it."""
    if not path.is_dir():
        return True
    try:
        names = [entry.name for entry in path.iterdir() if entry.is_file()]
        return bool(_candidates(path) or any(layout.members(names) for layout in LAYOUTS))
    except OSError:
        return False


def unpack(archive: Path) -> Path:
    """Write the known members of a published archive as a folder beside it, so that it is decompressed once. Returns
    the folder, or the archive where that cannot be done: it can be read as well."""
    layout, members = _layout(_archive_files(archive), archive)
    folder = archive.parent / FOLDERS[0 if layout is BINARY else 1]
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        for member, data in members.items():
            (partial / member).write_bytes(data)
        partial.rename(folder)
    except OSError:  # a full disk, another process that was faster, an incomplete folder in the way
        shutil.rmtree(partial, ignore_errors=True)
        return archive
    return folder


def _candidates(place: Path) -> list[Path]:
    """Paths under `place` that look like CIFAR data, the ones fastest to read first."""
    if any((place / layout.test).is_file() for layout in LAYOUTS):
        return [place]
    folders = [place / name for name in FOLDERS if any((place / name / fmt.test).is_file() for fmt in LAYOUTS)]
    return folders + [place / name for name in ARCHIVES if (place / name).is_file()]


def _folder_files(folder: Path) -> dict[str, Callable[[], bytes]]:
    return {path.name: path.read_bytes for path in sorted(folder.iterdir()) if path.is_file()}


def _archive_files(path: Path) -> dict[str, Callable[[], bytes]]:
    """The known members of a tar archive by their last name; nothing is written and no path in it is followed."""
    contents: dict[str, bytes] = {}
    known = [name for layout in LAYOUTS for name in (layout.test, layout.names)]
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if not 0 <= member.size <= LARGEST_MEMBER_BYTES:  # a size below zero would be read for ever
                    raise InputError(f"{path}: {member.name!r} claims {member.size:,} bytes, unlike any of CIFAR's")
                name = member.name.rpartition("/")[2]
                wanted = name in known or any(layout.train.fullmatch(name) for layout in LAYOUTS)
                if not (wanted and member.isreg()):
                    continue
                stream = archive.extractfile(member)
                contents[name] = stream.read() if stream else b""
            while archive.fileobj and archive.fileobj.read(2**20):
                pass  # to the very end, where the checksum of the compressed stream is
    except InputError:
        raise
    except Exception as error:  # a damaged archive can raise whatever tarfile and the decompressors have
        if isinstance(error, tarfile.ReadError) and not _looks_like_an_archive(path):
            raise InputError(
                f"{path}: neither a folder nor an archive: name a folder with a folder of pictures for each class"
            ) from None
        size = path.stat().st_size if path.exists() else 0
        raise InputError(
            f"{path}: damaged or truncated: expected a whole .tar.gz archive, found {size:,} bytes that end in"
            f" {_one_line(error)}; delete it and get it again"
        ) from None
    return {name: (lambda data=data: data) for name, data in contents.items()}  # type: ignore[misc]


def _looks_like_an_archive(path: Path) -> bool:
    """By its first bytes (gzip, bzip2, xz; tar has its mark at byte 257) or by its name, if those are damaged."""
    with open(path, "rb") as file:
        head = file.read(512)
    named = bool({".tar", ".tgz", ".gz", ".bz2", ".xz"} & set(path.suffixes))
    return named or head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")) or head[257:262] == b"ustar"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__} ({' '.join(str(error).split())[:200]})"


def _layout(files: Mapping[str, Callable[[], bytes]], where: Path) -> tuple[_Format, dict[str, bytes]]:
    """The layout that the files have, and the contents of those that belong to it. All must be there."""
    for layout in LAYOUTS:
        members = layout.members(files)
        train = [m for m in members if layout.train.fullmatch(m)]
        if not train and layout.test not in members:
            continue
        numbers = {int(m.removesuffix(".bin").rpartition("_")[2]) for m in train}
        suffix = ".bin" if layout is BINARY else ""
        expected = [f"data_batch_{n}{suffix}" for n in range(1, max(numbers, default=1) + 1)]
        missing = [m for m in (*expected, layout.test, layout.names) if m not in members]
        if missing:
            raise InputError(f"{where}: incomplete: {', '.join(missing)} not there (found {', '.join(members)})")
        try:
            return layout, {member: files[member]() for member in members}
        except OSError as error:
            raise InputError(f"{where}: cannot be read: {error}") from None
    unpack = "; an archive of pictures is to be unpacked, and its folder named" if where.is_file() else ""
    raise InputError(
        f"{where}: not a CIFAR folder or archive: expected data_batch_1.bin … and test_batch.bin, or the python"
        f" batches data_batch_1 … and test_batch; found {', '.join(sorted(files)[:6]) or 'no file'}{unpack}"
    )


def _read_binary_batch(data: bytes, label: str) -> _Batch:
    if not data or len(data) % RECORD_BYTES:
        raise InputError(
            f"{label}: damaged or truncated: expected a multiple of {RECORD_BYTES:,} bytes (a whole batch of"
            f" CIFAR-10 has {10_000 * RECORD_BYTES:,}), found {len(data):,}"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
    return _Batch(records[:, 1:], records[:, 0])


def _read_binary_names(data: bytes, label: str) -> tuple[str, ...]:
    return _names(data.decode("utf-8", "replace").split("\n"), label)


def _read_python_batch(data: bytes, label: str) -> _Batch:
    content = _unpickle(data, label)
    rows, labels = content.get("data"), content.get("labels")
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != RECORD_BYTES - 1:
        found = f"shape {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise InputError(f"{label}: damaged: expected uint8 rows (N, {RECORD_BYTES - 1}) under 'data', found {found}")
    if not isinstance(labels, list) or not labels or not all(type(n) is int and 0 <= n < 256 for n in labels):
        raise InputError(f"{label}: damaged: expected a list of class numbers under 'labels'")
    if len(labels) != len(rows):
        raise InputError(f"{label}: damaged: expected as many labels as images ({len(rows)}), found {len(labels)}")
    return _Batch(rows, np.array(labels, np.uint8))


def _read_python_names(data: bytes, label: str) -> tuple[str, ...]:
    return _names(_unpickle(data, label).get("label_names"), label)


def _names(lines: Any, label: str) -> tuple[str, ...]:
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise InputError(f"{label}: damaged: expected a list of class names")
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) < 2:
        raise InputError(f"{label}: expected at least two class names, found {len(names)}")
    return names


def _images(batches: Sequence[_Batch]) -> Images:
    """The batches as one, each pixel copied once: a channel at a time is several times as fast as a transposed copy."""
    labels = np.concatenate([batch.labels for batch in batches]).astype(np.int64)
    pixels = np.empty((len(labels), 32, 32, 3), np.uint8)
    start = 0
    for rows, _ in batches:
        channels = rows.reshape(-1, 3, 32, 32)
        for channel in range(3):
            pixels[start : start + len(rows), :, :, channel] = channels[:, channel]
        start += len(rows)
    return Images(pixels, labels)


class _Array:
    """What a pickled numpy array of bytes becomes: its shape and raw bytes are checked before numpy sees them."""

    def __init__(self, *ignored: Any):
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw
        if not isinstance(dtype, _DType) or dtype.code not in ("u1", "|u1") or fortran not in (False, 0):
            raise pickle.UnpicklingError("an array that is not of bytes in C order")
        if not all(type(n) is int and n >= 0 for n in shape) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array of no plain shape")
        self.array = np.frombuffer(raw, np.uint8).reshape(shape)


class _DType:
    """What a pickled numpy dtype becomes: the text of its code."""

    def __init__(self, code: Any, *ignored: Any):
        self.code = code.decode("latin-1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        pass


class _Encode:
    """What `_codecs.encode` becomes, by which Python 3 pickles bytes. Has no attributes that a pickle could change."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        return text.encode("latin-1")


class _PlainUnpickler(pickle.Unpickler):
    """Admits lists, dicts, strings, numbers and arrays of bytes; every other name in the file is an error."""

    ADMITTED: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("_codecs", "encode"): _Encode(),
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not plain data") from None


def _unpickle(data: bytes, label: str) -> dict[str, Any]:
    try:
        content = _PlainUnpickler(io.BytesIO(data), encoding="latin-1").load()
    except Exception as error:  # a damaged pickle can raise anything; nothing of it has run
        raise InputError(
            f"{label}: damaged or not a CIFAR batch: expected a pickle of plain data, found"
            f" {len(data):,} bytes that end in {_one_line(error)}"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{label}: damaged: expected a dict, found {type(content).__name__}")
    plain = {k.decode("latin-1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    return {k: v.array if isinstance(v, _Array) else v for k, v in plain.items()}


BINARY = _Format(
    re.compile(r"data_batch_\d{1,3}\.bin"),
    "test_batch.bin",
    "batches.meta.txt",
    _read_binary_batch,
    _read_binary_names,
)
PYTHON = _Format(
    re.compile(r"data_batch_\d{1,3}"), "test_batch", "batches.meta", _read_python_batch, _read_python_names
)
LAYOUTS = (BINARY, PYTHON)
