"""Where fromzero keeps files, and writing them so that a reader finds the old content or the new, never a part.

Order of `write_atomically`: write, flush, fsync the file, rename, fsync the folder. When it returns, the content
survives a power loss; when it raises, the old content is untouched.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import platformdirs


def home() -> Path:
    """Where fromzero keeps downloads, decoded pictures and compiled kernels: `FROMZERO_HOME`, else the platform's cache
    folder."""
    named = os.environ.get("FROMZERO_HOME")
    return Path(named) if named else Path(platformdirs.user_cache_dir("fromzero", appauthor=False))


def write_atomically(path: Path, data: bytes, *, alone: bool = True) -> None:
    """Replace `path` by `data`. Raises OSError, the old file whole, when the disk is full or fails.

    alone: no other process writes this file meanwhile. Else what is not whole yet has a name of this process's own,
    which a kill leaves behind; the name that all have is written over by the next."""
    partial = _partial(path) if alone else path.with_name(f"{path.name}.{os.getpid()}.partial")
    _write(path, partial, data)
    try:
        _rename(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, content: object, *, alone: bool = True) -> None:
    """Replace `path` by a JSON text of `content`, as `write_atomically` does."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode(), alone=alone)


def csv_text(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table as CSV, a row a line."""
    table, rows = io.StringIO(), [list(row) for row in rows]
    returns = any("\r" in value for row in rows for value in row)  # which csv does not quote by itself
    writer = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL)
    writer.writerow(columns)
    writer.writerows(rows)
    return table.getvalue()


def finite(value: Any) -> Any:
    """The same as plain lists and objects, with None for what is not finite, which JSON cannot say."""
    if hasattr(value, "_asdict"):  # a NamedTuple keeps the names of its values
        value = value._asdict()
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stage(path: Path, data: bytes) -> None:
    """Write `data` durably beside `path`, under the name that `publish` renames."""
    _write(path, _partial(path), data)


def publish(path: Path) -> None:
    """Rename what `stage` wrote to `path`, durably."""
    _rename(_partial(path), path)


def append_line(path: Path, line: str) -> None:
    """Append one line durably."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the platform lets a folder be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, partial: Path, data: bytes) -> None:
    """Write `data` durably to `partial`, which is to become `path`."""
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # an error of a full disk names none
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _rename(partial: Path, path: Path) -> None:
    os.replace(partial, path)
    sync_folder(path.parent)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
