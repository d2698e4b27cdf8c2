"""Checkpoints: one safetensors file each, written atomically, checksummed, with a format version.

A folder holds `last.safetensors`, the ones before it as `step-N.safetensors`, and `best.safetensors`. The file's
metadata holds the JSON state and a SHA-256 over the whole file, so that any flipped byte is found. A damaged file is
named and the one before it is used. No code can run: safetensors and JSON only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from fromzero.errors import FromzeroError, ReadError, command_line, is_passing
from fromzero.files import publish, stage, write_atomically

FORMAT = "1"
LAST = "last.safetensors"
BEST = "best.safetensors"
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_NO_DIGEST = b"0" * 64
_MAX_HEADER_BYTES = 10_000_000


class DamagedCheckpointError(FromzeroError):
    """A checkpoint that does not read as it was written; the message names the file and what was found."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds: tensors by name, and the rest of the state as plain JSON data."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path | None = None

    @property
    def epochs(self) -> int:
        """How many epochs are behind it."""
        return int(self.state.get("epoch", 0))

    @property
    def file(self) -> Path:
        """The file that it was read from."""
        assert self.path is not None
        return self.path


def encode(checkpoint: Checkpoint) -> bytes:
    """The file's bytes, the same for equal checkpoints: safetensors whose metadata has `format`, `state` (JSON) and
    `sha256`, which is taken over the file with the digits of the sum itself as zeros."""
    metadata = {
        "format": FORMAT,
        "sha256": _NO_DIGEST.decode(),
        "state": json.dumps(checkpoint.state, sort_keys=True),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    data = bytearray(safetensors.torch.save(tensors, metadata))
    # Its metadata come in any order; in one, equal checkpoints are equal files.
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    header["__metadata__"] = metadata
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(end - 8)
    data[:end] = struct.pack("<Q", len(text)) + text
    start = _digest_position(data)
    data[start : start + 64] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def decode(data: bytes, path: Path | None = None) -> Checkpoint:
    """The checkpoint in these bytes. Raises DamagedCheckpointError when a single byte is not as it was written."""
    label = path or "checkpoint"
    try:
        start = _digest_position(data)
        stored = bytes(data[start : start + 64])
        digest = hashlib.sha256(data[:start])
        digest.update(_NO_DIGEST)
        digest.update(memoryview(data)[start + 64 :])
        if digest.hexdigest().encode() != stored:
            raise ValueError("its checksum does not match its content")
        header_bytes = struct.unpack("<Q", data[:8])[0]
        metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']}, this version reads format {FORMAT}")
        return Checkpoint(safetensors.torch.load(data), json.loads(metadata["state"]), path)
    except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise DamagedCheckpointError(
            f"{label}: damaged checkpoint ({len(data):,} bytes): {error or type(error).__name__}"
        ) from None


def save(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> None:
    """Write `checkpoint` as the last one of `folder`, and keep the `keep` newest.

    The new file is durable before the old one is renamed, and the old one is removed last; at every moment a whole
    checkpoint is there. Raises OSError, all earlier checkpoints whole, when the disk is full or fails.
    """
    last = folder / LAST
    stage(last, encode(checkpoint))
    if last.exists() and keep > 1:
        os.replace(last, folder / f"step-{_step_of(last):09d}.safetensors")
    publish(last)
    for old in _older(folder)[max(keep - 1, 0) :]:
        old.unlink(missing_ok=True)


def save_best(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` as the best one of `folder`."""
    write_atomically(folder / BEST, encode(checkpoint))


def load(path: Path) -> Checkpoint:
    """The checkpoint in a file. Raises DamagedCheckpointError, also where it cannot be read, ReadError where it may be
    the next time, and FileNotFoundError where there is none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        kind = ReadError if is_passing(error) else DamagedCheckpointError
        raise kind(f"{path}: cannot be read: {error.strerror}") from None
    return decode(data, path)


def load_last(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of `folder`, or None if none was ever written. Damaged ones are named in a warning
    and passed over. Raises DamagedCheckpointError when there are some and all are damaged; ReadError where one
    may be read the next time."""
    damaged = []
    for path in [folder / LAST, *_older(folder)]:
        try:
            found = load(path)
        except FileNotFoundError:
            continue
        except DamagedCheckpointError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            warnings.warn(f"{message}; using {path.name} instead", stacklevel=2)
        return found
    if damaged:
        raise DamagedCheckpointError("; ".join(damaged) + f"; no whole checkpoint is left{best_left(folder)}")
    return None


def best_left(folder: Path) -> str:
    """Where no other checkpoint is left, what can be said of the best one; nothing where that is damaged or gone."""
    try:
        epoch = load(folder / BEST).state["epoch"]
    except (FileNotFoundError, KeyError, FromzeroError):
        return ""
    score = command_line("fromzero", "evaluate", folder.parent, "--checkpoint", "best")
    return f"; the weights of its best epoch, {epoch}, are: {score}"


def set_aside_damaged(folder: Path, used: Checkpoint) -> None:
    """Keep the checkpoints newer than `used`, which are damaged, under names that nothing reads."""
    for path in [folder / LAST, *_older(folder)]:
        if path == used.path:
            return
        if path.exists():
            os.replace(path, path.with_suffix(".damaged"))


def set_aside_newer_best(folder: Path, epoch: int) -> None:
    """Keep best weights of a later epoch than `epoch`, if there are any, under a name that nothing reads. A run that
    goes on from there by another course never comes by them; by the same one it writes them again."""
    with contextlib.suppress(OSError, KeyError, DamagedCheckpointError):
        if load(folder / BEST).state["epoch"] > epoch:
            os.replace(folder / BEST, (folder / BEST).with_suffix(".abandoned"))


def num_kept(folder: Path) -> int:
    """How many checkpoints are there, the best on validation aside."""
    return (folder / LAST).exists() + len(_older(folder))


def _older(folder: Path) -> list[Path]:
    """The checkpoints before the last, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def _step_of(path: Path) -> int:
    """The step of a checkpoint; 0 for one whose header is damaged."""
    try:
        with open(path, "rb") as file:
            header = file.read(min(_header_bytes(file.read(8)), _MAX_HEADER_BYTES))
        return int(json.loads(json.loads(header)["__metadata__"]["state"])["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _header_bytes(first: bytes) -> int:
    if len(first) < 8:
        raise ValueError("it is cut off in its first 8 bytes")
    return int(struct.unpack("<Q", first[:8])[0])


def _digest_position(data: bytes | bytearray) -> int:
    """Where the digits of the checksum stand in the header."""
    header_bytes = _header_bytes(bytes(data[:8]))
    if header_bytes > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"its header claims {header_bytes:,} bytes")
    found = list(_DIGEST.finditer(data, 8, 8 + header_bytes))
    if len(found) != 1:
        raise ValueError("its header has no single checksum")
    return found[0].start(1)
