"""The run folder: what a run leaves behind, and the only thing that later stages read.

    recipe.toml       the complete recipe
    provenance.json   versions, machine, command, commit, data fingerprint
    splits.csv        of pictures: which file is in which split
    metrics.jsonl     one row an epoch
    summary.json      the outcome, flat, once the run has ended
    checkpoints/      last, the one before, best
    curves.png        the learning curves
    lock              held by the process that trains; writer.json says which one, while it does
    diagnosis.json, copies.csv, a study for each remedy, report.html, folds/ (its cross-validation), the exported model,
                      the study that a comparison proposes, an event file: when asked for

A folder is never overwritten, and one process at a time trains in it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import filelock

from fromzero.errors import (
    BusyError,
    FromzeroError,
    InputError,
    ReadError,
    WriteError,
    checking_types,
    command_line,
    is_passing,
    nearest,
)
from fromzero.files import append_line, sync_folder, write_atomically, write_json
from fromzero.recipe import Recipe, load_recipe
from fromzero.records import (
    FIGURES,
    ROW_KEYS,
    SUMMARY_KEYS,
    Diagnosis,
    FoldResult,
    Provenance,
    is_figure,
    read_object,
    read_record,
)

Row = dict[str, Any]
OWN_FILES = ("recipe.toml", "provenance.json", "splits.csv", "metrics.jsonl", "summary.json", "lock", "writer.json")
FOLDS, LABELS = "folds", "labels.csv"  # in the run folder: its cross-validation, and in that what it says of labels


def write_named(path: Path, data: bytes, ending: str, *others: str) -> None:
    """Write a file that the user named; behind a link, the one that it points to. Raises FromzeroError where it cannot
    be written, InputError where `check_named` does."""
    check_named(path, ending, *others)
    try:
        write_atomically(Path(os.path.realpath(path)), data, alone=False)
    except OSError as error:
        raise FromzeroError(f"{path}: cannot be written: {error.strerror}") from None


def check_named(path: Path, ending: str, *others: str) -> None:
    """Refuse to put a file that the user named in the place of a folder, of a device, of a run's own records and
    weights, or under a name with another ending than these, which may be a picture's. Raises InputError."""
    target = Path(os.path.realpath(path))  # unlike `resolve`, of a link to itself too
    if (path.exists() and not path.is_file()) or (target.exists() and not target.is_file()):
        raise InputError(f"{path} is {'a folder' if target.is_dir() else 'no file to write to'}; name a file")
    folder = target.parent.parent if target.parent.name == "checkpoints" else target.parent
    if Run(folder).is_there and (folder != target.parent or target.name in OWN_FILES):
        raise InputError(f"{path} is where a run keeps its own records and weights; name another file")
    if not {path.suffix.lower(), target.suffix.lower()} <= {ending, *others}:
        raise InputError(f"{path} is no {ending} file by its name; name another file")


class Run:
    """A run folder. Whoever trains holds `lock()`; reading needs none."""

    def __init__(self, path: Path):
        self.path = path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def name(self) -> str:
        return Path(os.path.abspath(self.path)).name  # of "..", too, and of links their own

    @property
    def is_there(self) -> bool:
        """Whether the folder is a run's: the recipe is what is written last."""
        return (self.path / "recipe.toml").is_file()

    @property
    def resume_command(self) -> str:
        """What to type to go on with this run."""
        return command_line("fromzero", "resume", self.path)

    def start_command(self, dataset: str | None = None) -> str:
        """What to type to start a new run from this one's weights, by its recipe and on its images or others."""
        words = [] if dataset is None else [dataset]
        return command_line("fromzero", "train", *words, "--recipe", self.path / "recipe.toml", "--from", self.path)

    @property
    def way_on(self) -> str:
        """What can still be done with a run whose records are damaged, in words."""
        if any(self.checkpoints.glob("*.safetensors")):
            return f"its weights can start a new run: {self.start_command()}"
        return "no weights are left there either"

    @property
    def saved_before(self) -> str:
        """What is left when saving fails, in words."""
        if any(self.checkpoints.glob("*.safetensors")):
            return f"checkpoints saved before are whole: mend that, then: {self.resume_command}"
        if self.path.is_dir():
            return "no checkpoint had been saved before; mend that, then begin the run again"
        return "the folder was moved or removed while the run trained, and its checkpoints with it"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def recipe(self) -> Recipe:
        """The complete recipe of the run."""
        return load_recipe(self.path / "recipe.toml")

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the run's figures come from: versions, machine, command, commit, data."""
        mend = "put it back from a copy: without it the weights in checkpoints cannot be used"
        return read_record(self.path / "provenance.json", Provenance, mend)

    def doubt_of(self, split: Literal["validation", "test"]) -> str:
        """Why figures of that split may flatter, in words: the weights that it began with may have been trained on
        these images. Empty where they were not."""
        origin = self.provenance["from"]
        seen = 0 if origin is None else origin.get("seen") if split == "validation" else origin.get("seen_test", 0)
        if origin is None or seen == 0:
            return ""
        if seen:
            are = "image is a train image" if seen == 1 else "images are train images"
            return f"{seen:,} {split} {are} of {origin['run']}, with whose weights it began: {split} flatters"
        return f"it began with the weights of {origin['run']}, which may have been trained on its {split} images"

    @property
    def doubts(self) -> list[str]:
        """The same of both."""
        return [*filter(None, (self.doubt_of("validation"), self.doubt_of("test")))]

    def lineage(self) -> Iterator[Run]:
        """This run, the one from whose weights it began, the one from whose weights that began and so on, as far as
        their folders are there and whole: the last that comes then began with the weights of another. Each is looked
        for beside the one that began with it, then where it was at that time; a run that began at another moment is
        another one, in the place of that."""
        run, seen = self, {self.path.resolve()}
        yield run
        while origin := run.provenance["from"]:
            places = [run.path.parent / Path(origin["run"]).name, Path(origin.get("path", "."))]
            found = next((place for place in map(Run, places) if place._began_at(origin.get("started"))), None)
            if found is None or found.path.resolve() in seen:
                return
            run = found
            seen.add(run.path.resolve())
            yield run

    def _began_at(self, started: str | None) -> bool:
        """Whether there is a run here that began at that moment, as provenance has it."""
        try:
            return self.provenance["started"] == started
        except FromzeroError:
            return False

    @property
    def began(self) -> datetime:
        """When it began, in this machine's time zone. Raises FromzeroError where that is not recorded."""
        try:
            return datetime.fromisoformat(self.provenance["started"]).astimezone()
        except (ValueError, OverflowError):
            raise FromzeroError(f"{self.path}/provenance.json: damaged: started: not a time; {self.way_on}") from None

    @property
    def summary(self) -> dict[str, Any] | None:
        """The outcome, or None while the run has not ended (or goes on, extended)."""
        if not (self.path / "summary.json").exists():
            return None
        mend = f"remove it, then: {self.resume_command}"
        found = read_object(self.path / "summary.json", mend)
        if wrong := [key for key in SUMMARY_KEYS if not is_figure(key, found.get(key))]:
            raise FromzeroError(f"{self.path}/summary.json: damaged: {', '.join(wrong)}: not a possible value; {mend}")
        return found if found["epoch"] == self.recipe.epochs else None

    @property
    def earlier_ends(self) -> list[int]:
        """The epochs after which it had ended, and was scored on the test images, before it was extended."""
        return [note["summary"]["epoch"] for note in self.provenance["resumed"] if note.get("summary")]

    @property
    def diagnosis(self) -> dict[str, Any] | None:
        """What `diagnose` last said of the run: epoch, findings and measures; None where it has not been asked."""
        if not (self.path / "diagnosis.json").exists():
            return None
        mend = (
            f"an earlier fromzero may have written it: {command_line('fromzero', 'diagnose', self.path)} writes it anew"
        )
        return read_record(self.path / "diagnosis.json", Diagnosis, mend)

    @property
    def cross_validation(self) -> dict[str, Any] | None:
        """What `cross-validate` last said of the run's recipe and images; None where it has not been asked."""
        path = self.path / FOLDS / "result.json"
        if not path.exists():
            return None
        mend = f"remove it, or write it anew: {command_line('fromzero', 'cross-validate', self.path)}"
        return read_record(path, FoldResult, mend)

    def cross_validated(self, epochs: int) -> dict[str, Any] | None:
        """The same of trainings like this one after so many epochs: not of a run that began with other weights or was
        extended, as those of the folds begin anew and train at once."""
        found = self.cross_validation
        is_alike = not (self.provenance["from"] or self.earlier_ends)
        return found if found is not None and is_alike and found["epochs"] == epochs else None

    def check(self) -> None:
        """Raise FromzeroError where what the run recorded is damaged or not all there."""
        recipe, _, summary, rows = self.recipe, self.provenance, self.summary, self.metrics()
        if summary is not None and len(rows) < recipe.epochs:
            raise FromzeroError(f"{self.path}/metrics.jsonl: rows are missing; {self.way_on}")
        if summary and (wrong := [key for key in FIGURES if summary.get(key) != rows[-1][key]]):
            raise FromzeroError(
                f"{self.path}/summary.json: damaged: {', '.join(wrong)}: not as in metrics.jsonl; {self.way_on}"
            )

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended. Raises as `check` does."""
        self.check()
        return self.summary is not None

    def metrics(self) -> list[Row]:
        """One dict an epoch; a row that a kill cut in half at the end is left out."""
        rows = []
        try:
            lines = (self.path / "metrics.jsonl").read_text("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            kind = ReadError if is_passing(error) else FromzeroError
            raise kind(f"{self.path}/metrics.jsonl: cannot be read: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            whole = isinstance(row, dict) and all(is_figure(key, row.get(key)) for key in ROW_KEYS)
            if whole and row["epoch"] == number:
                rows.append(row)
            elif whole:
                raise FromzeroError(
                    f"{self.path}/metrics.jsonl: line {number} is of epoch {row['epoch']:g}: rows are missing or out of"
                    f" place; {self.way_on}"
                )
            elif number < len(lines) or row is not None:
                raise FromzeroError(f"{self.path}/metrics.jsonl: line {number} is damaged; {self.way_on}")
        return rows

    @property
    def seconds(self) -> float:
        """What all its epochs take, as those behind it say; 0 of a run without any."""
        rows = self.metrics()
        return float(self.recipe.epochs * rows[-1]["time/seconds"] / rows[-1]["epoch"]) if rows else 0.0

    def append_metrics(self, row: Row) -> None:
        """Add a row durably."""
        with self._writing("metrics.jsonl") as path:
            append_line(path, json.dumps(row))

    def cut_metrics(self, epochs: int) -> None:
        """Drop the rows after epoch `epochs`: they were written after the checkpoint that the run goes on from. Raises
        WriteError when the disk is full or fails, as all that write do."""
        rows = [row for row in self.metrics() if row["epoch"] <= epochs]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with self._writing("metrics.jsonl") as path:
            write_atomically(path, text.encode())

    def write_recipe(self, recipe: Recipe) -> None:
        with self._writing("recipe.toml") as path:
            write_atomically(path, recipe.to_toml().encode())

    def write_splits(self, table: str) -> None:
        """Write which file is in which split, as CSV; names of files may be no text."""
        with self._writing("splits.csv") as path:
            write_atomically(path, table.encode("utf-8", "surrogateescape"))

    @property
    def pictures(self) -> list[dict[str, str]]:
        """The pictures that it was begun with, as splits.csv has them; none where that is not there or damaged."""
        try:
            text = (self.path / "splits.csv").read_bytes().decode("utf-8", "surrogateescape")
            rows = csv.DictReader(io.StringIO(text, newline=""))  # a name may have a line's end in it
            return [row for row in rows if row.get("file")]
        except (OSError, csv.Error):
            return []

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        with self._writing("provenance.json") as path:
            write_json(path, provenance)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the outcome."""
        with self._writing("summary.json") as path:
            write_json(path, summary)

    @contextlib.contextmanager
    def _writing(self, file: str) -> Iterator[Path]:
        """A record's path. Where it cannot be written, raises WriteError, which says what is left."""
        try:
            yield self.path / file
        except OSError as error:
            raise WriteError(f"{self.path}/{file}: {error.strerror}; {self.saved_before}") from None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the right to write. Raises BusyError, naming the holder's host and process, when another process has it,
        FromzeroError where nothing can be written or locked. The lock of a process that died is free: the operating
        system lets go of it. A lock whose file was removed is still held by whoever writes, as long as that process
        lives."""
        held = filelock.FileLock(self.path / "lock", timeout=0)
        holder: dict[str, Any] = {}
        try:
            with contextlib.suppress(FromzeroError):
                holder = read_object(self.path / "writer.json")
            taken = not (self.path / "lock").exists() and _lives(holder)
            if not taken:
                held.acquire()
        except filelock.Timeout:
            taken = True
        except OSError as error:
            raise FromzeroError(
                f"{self.path}: cannot be written: {error.strerror}; make the folder writable, or copy it to one that is"
            ) from None
        except NotImplementedError:  # of filelock, where files cannot be locked
            raise FromzeroError(
                f"{self.path}: lies where files cannot be locked, so nothing keeps two processes from writing to it;"
                " name another folder by --runs-dir"
            ) from None
        if taken and (holder.get("pid"), holder.get("host")) == (os.getpid(), socket.gethostname()):
            raise BusyError(
                f"{self.path}: a training in this process still holds this run; end its loop, or close() it first"
            )
        if taken:
            raise BusyError(
                f"{self.path}: another process writes to this run: process {holder.get('pid', '?')} on"
                f" {holder.get('host', '?')}; wait for it, or stop it (Ctrl-C saves)"
            )
        try:
            with self._writing("writer.json") as path:
                write_json(path, {"host": socket.gethostname(), "pid": os.getpid()})
            yield
        finally:
            with contextlib.suppress(OSError):
                (self.path / "writer.json").unlink()
            held.release()


def _lives(writer: dict[str, Any]) -> bool:
    """Whether the process that writer.json names is another one of this host that has not ended."""
    pid = writer.get("pid")
    if os.name != "posix" or not isinstance(pid, int) or pid <= 0:
        return False
    if writer.get("host") != socket.gethostname() or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def create_run(runs_dir: Path, name: str) -> Run:
    """A new folder `name`, or `name-2`, `name-3` … where that is taken. It counts as a run once its recipe is written,
    which is to be done last: a process killed before that leaves nothing that could be mistaken for one."""
    if name in ("", ".", "..") or {*"/\\\0"} & {*name}:
        raise InputError(f"run name {name!r}: is to be the name of a folder in {runs_dir}")
    if runs_dir.exists() and not runs_dir.is_dir():
        raise InputError(f"runs folder {runs_dir}: is a file; name a folder by --runs-dir")
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = runs_dir / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
        try:
            (path / "checkpoints").mkdir()
            write_atomically(path / "metrics.jsonl", b"")  # so that the rows have a durable name from the start
            sync_folder(runs_dir)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(f"runs folder {runs_dir}: cannot be written: {error.strerror}") from None
    return Run(path)


@checking_types
def load_run(run: Run | str | Path, runs_dir: str | Path = "runs") -> Run:
    """The run at a path, or the one of that name under `runs_dir`; a run is itself. Raises InputError when there is
    none."""
    if isinstance(run, Run):
        return run
    places = (Path(run), Path(runs_dir) / run)
    for path in places:
        if Run(path).is_there:
            return Run(path if path.name not in ("", "..") else path.resolve())  # which are no names
    for path in places:
        if (path / "provenance.json").exists():
            raise InputError(
                f"{path}: its recipe.toml is not there; the fields that it held are listed in {path}/provenance.json"
            )
    there = list_runs(runs_dir)
    of_it = [r for r in there if r.name.startswith(f"{Path(run).name}-")]  # as of a folder of pictures
    newest = max(of_it, key=lambda r: r.path.stat().st_mtime, default=None)
    hint = f"; the newest on it: {newest.name}" if newest else nearest(str(run), [r.name for r in there])
    raise InputError(f"no run {str(run)!r}, neither as a path nor under {runs_dir}{hint}")


@checking_types
def list_runs(runs_dir: str | Path = "runs") -> list[Run]:
    """All runs under `runs_dir`, by name, numbers in their order."""
    folder = Path(runs_dir)
    if not folder.is_dir():
        return []

    def key(run: Run) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", run.name)]

    return sorted((run for run in map(Run, folder.iterdir()) if run.is_there), key=key)
