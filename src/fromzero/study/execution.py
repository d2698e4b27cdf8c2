"""Carrying a study out: which cells there are, which are still to be trained, and the folder they live in.

runs/studies/NAME-SCALE/     -from-seed-N added where the first seed is not 0, -tuned where arms were tuned first
  study.toml, base.toml      the study and its base recipe, as they were run
  study.json                 scale, seeds, time spent
  lock, workers.log          held by the process that carries it out; what its workers said
  cells/ARM-seedN/           an ordinary run for each arm and seed
  tuning/ARM-VALUE-seedN/    the runs of the sweep
  failures.json              cells that failed, and why
  result.json, result.png    what it has found, for programs and as a picture
  set-aside/                 runs of earlier versions of the study; they count no more
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import pydantic

from fromzero.changes import differing_fields
from fromzero.data import NAMED, ImageSet, load_images, split_name
from fromzero.errors import FromzeroError, InputError, StoppedError, command_line, counted, options_typed
from fromzero.files import write_atomically, write_json
from fromzero.machine import MAX_THREADS, chosen_device
from fromzero.networks import build
from fromzero.recipe import Recipe, load_recipe
from fromzero.records import damage, read_object
from fromzero.resources import num_threads
from fromzero.splits import check_image_set
from fromzero.study.cells import Cell, Setting, cells_of, differences, is_finished, trials_of
from fromzero.study.definition import Arm, Study, load_study
from fromzero.study.pools import Event, on_ray, on_this_machine

MOST_JOBS = 1024
RESULT, PICTURE = "result.json", "result.png"  # written when all is done, and gone while something is to be trained

Place = Literal["local", "ray"]
RECORD = "record"  # among what was changed of a study: the record of what it was before is lost
Sweep = dict[str, dict[float, list[float | None]]]  # arm → value → a validation accuracy for each tuning seed


class Description(pydantic.BaseModel):
    """What study.json says: of what a study was run last, with what options, on what images; `seconds`, how long it has
    taken in all; `answered`, with how many seeds it had figures to look at; `changed`, what was changed of it when it
    had such."""

    model_config = pydantic.ConfigDict(frozen=True, allow_inf_nan=False)

    name: str
    label: str
    scale: str
    seeds: int
    first_seed: int = 0
    tuned: bool
    options: tuple[str, ...]
    own_validation: bool
    image_shape: tuple[int, int, int]
    num_classes: int
    fingerprints: dict[str, str]
    train_images: int
    images: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = pydantic.Field(0.0, ge=0)
    answered: tuple[int, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass
class Execution:
    """A study about to be carried out. Iterate over it: it yields what happens to its cells, and leaves their runs in
    `folder`. Raises StoppedError when asked to stop, every cell saved."""

    study: Study
    folder: Path
    images: ImageSet
    setting: Setting
    jobs: int
    place: Place
    tuned: bool
    keep_weights: bool = False
    options: tuple[str, ...] = ()
    best: dict[str, float] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        """Those of the arms, at their best values once those are known."""
        cells = cells_of(self.study, self.folder, self.best)
        return [replace(self._placed(cell), keep_weights=self.keep_weights) for cell in cells]

    @property
    def trials(self) -> list[Cell]:
        """Those of the sweep; none when the arms are not to be tuned."""
        return [self._placed(cell) for cell in trials_of(self.study, self.folder)] if self.tuned else []

    def _placed(self, cell: Cell) -> Cell:
        """The cell with its images as workers find them, wherever they stand."""
        if not self.setting.dataset.isprintable():  # which no recipe can name
            return cell
        return replace(cell, recipe=cell.recipe.override({"dataset": self.setting.dataset}))

    def __iter__(self) -> Iterator[Event]:
        with alone_in(self.folder, "carries this study out", self.command):
            before = self._before()
            self._describe(before)
            began, answered = time.monotonic(), before.answered
            now = tuple(dict.fromkeys([*answered, self.study.seeds]))
            try:
                yield from self._run(self.trials)
                if self.tuned:
                    self.best = best_values(sweep(self.study, self.folder, self.images.fingerprints))
                    if left := [arm for arm in self.study.arms if arm not in self.best]:
                        raise FromzeroError(
                            f"{self.folder}: with no value of the sweep did all runs of arm {left[0]!r} end; see"
                            " failures.json"
                        )
                for event in self._run(self.cells):
                    if event.kind == "finished" and answered != now:  # a kill leaves what was there to look at
                        answered = now
                        self._describe(before.model_copy(update={"answered": answered}))
                    yield event
                ended = [cell.run for cell in self.cells if cell.run.summary is not None] if self.keep_weights else []
                if gone := sum(not run.checkpoints.exists() for run in ended):
                    text = f"of {counted(gone, 'run')} that had ended before no weights are left to keep; who needs"
                    text += f" them removes their folders from {self.folder / 'cells'}, and does this again"
                    yield Event("note", self.cells[0], text=text)
            finally:
                seconds = round(before.seconds + time.monotonic() - began, 1)
                self._describe(before.model_copy(update={"seconds": seconds, "answered": answered}))

    @property
    def command(self) -> str:
        """What to type to do this again, or to go on with it."""
        return command(self.study, self.tuned, self.options)

    def _run(self, cells: Sequence[Cell]) -> Iterator[Event]:
        waiting = self._open(cells)
        for cell in cells:
            if cell not in waiting:
                self._note_failure(cell, None)
                yield Event("finished", cell, 1.0, "done before")
        if not waiting:
            return
        for stale in (RESULT, PICTURE):
            (self.folder / stale).unlink(missing_ok=True)
        waiting[0].path.parent.mkdir(exist_ok=True)
        if self.place == "ray":
            events = on_ray(waiting, self.setting)
        else:
            events = on_this_machine(waiting, self.setting, self.jobs, self.folder / "workers.log")
        for event in events:
            if event.kind in ("failed", "finished"):
                self._note_failure(event.cell, event.text or None)
            yield event

    def _open(self, cells: Sequence[Cell]) -> list[Cell]:
        found: set[Path] = set()
        for cell in cells:  # an arm comes behind the one that it starts from
            if cell.after in found or not is_finished(cell, self.images):
                found.add(cell.path)
        return [cell for cell in cells if cell.path in found]

    def _before(self) -> Description:
        """The description of this study, with what an earlier one says of the same has taken and answered."""
        described = Description(
            name=self.study.name,
            label=self.study.label,
            scale=self.study.scale,
            seeds=self.study.seeds,
            first_seed=self.study.first_seed,
            tuned=self.tuned,
            options=self.options,
            own_validation=self.images.validation is not None,
            image_shape=self.images.image_shape,
            num_classes=self.images.num_classes,
            fingerprints=self.images.fingerprints,
            train_images=len(self.images.train),
            images=self.images.name.partition(":")[0],
            notes=self.images.notes,
        )
        had_figures = any((cell.path / "summary.json").exists() for cell in [*self.trials, *self.cells])
        lost = {"changed": (RECORD,) if had_figures else ()}
        try:
            before = read_description(self.folder)
        except (FromzeroError, OSError, ValueError):  # not there, or damaged: written anew
            return described.model_copy(update=lost)
        described, now = described.model_copy(update={"seconds": before.seconds}), self.study
        try:
            then = recorded_study(self.folder, before)
        except (FromzeroError, OSError, ValueError):
            return described.model_copy(update=lost | {"answered": before.answered})
        kept = [arm for arm in now.arms if arm in then.arms and is_same_arm(then.arms[arm], now.arms[arm])]
        seen = before.answered or before.changed
        if seen and then.arms.keys() & now.arms.keys():
            parts = {
                "images": before.fingerprints != described.fingerprints,
                "claim": then.claim != now.claim,
                "arms": len(kept) < max(len(then.arms), len(now.arms)),
                "comparisons": {*then.contrasts} != {*now.contrasts},
                "tuning": self.tuned and then.tuning != now.tuning,
            }
            changed = dict.fromkeys([*before.changed, *(part for part, differs in parts.items() if differs)])
            described = described.model_copy(update={"answered": before.answered, "changed": tuple(changed)})
        return described

    def _describe(self, description: Description) -> None:
        write_atomically(self.folder / "study.toml", self.study.text.encode())
        write_atomically(self.folder / "base.toml", self.study.base.to_toml().encode())
        write_json(self.folder / "study.json", description.model_dump())

    def _note_failure(self, cell: Cell, why: str | None) -> None:
        path = self.folder / "failures.json"
        failures = read_json(path)
        if failures.get(cell.name) != why:
            kept = {name: text for name, text in failures.items() if name != cell.name}
            write_json(path, kept if why is None else kept | {cell.name: why})


def prepare_study(
    study: Study,
    *,
    runs_dir: Path = Path("runs"),
    jobs: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    place: Place = "local",
    tune: bool = False,
    keep_weights: bool = False,
    data_dir: Path | None = None,
    offline: bool = False,
) -> Execution:
    """Check everything that can be checked before a cell runs. Raises InputError, with the line of the study's file.

    jobs: cells at a time, by default one a core (one on a GPU); threads: of each, by default one on a processor.
    """
    if tune and study.tuning is None:
        raise InputError(f"{study.label}: --tune needs a [tuning] table, and it has none")
    if tune and (starts := next((arm for arm in study.arms.values() if arm.after), None)):
        study.refuse(
            ("arms", starts.name, "after"),
            f"arm {starts.name!r} starts from the weights of {starts.after!r}: --tune would try its values from random"
            " ones, which says nothing of it",
        )
    on_gpu = place == "local" and chosen_device(device).type == "cuda"
    num_jobs, num_threads_each = jobs_and_threads(jobs, threads, on_gpu)
    given = {
        "--runs-dir": None if runs_dir == Path("runs") else runs_dir,
        "--data-dir": data_dir,
        "--jobs": jobs,
        "--threads": threads,
        "--device": None if device == "auto" else device,
        "--on": None if place == "local" else place,
        "--offline": offline,
        "--keep-weights": keep_weights,
    }
    dataset = study.first.recipe.dataset
    stem, asked = split_name(dataset)
    if stem not in NAMED and not os.path.exists(stem) and (data_dir is not None or os.path.isabs(stem)):
        if data_dir is None:
            raise InputError(f"{study.label}: its images are no longer at {stem}; --data-dir says where they are now")
        dataset, data_dir = f"{data_dir.resolve()}{asked}", None
    elif stem not in NAMED and os.path.exists(stem):  # a worker may stand elsewhere
        dataset = f"{Path(stem).resolve()}{asked}"
    try:
        images = load_images(dataset, data_dir=data_dir, offline=offline)
    except InputError as error:
        raise InputError(f"{study.label}, scale {study.scale}: {error}") from None
    for arm in study.arms.values():
        try:
            check_image_set(arm.recipe, images)
        except InputError as error:
            study.refuse(("arms", arm.name), f"arm {arm.name!r}: {error}")
        if arm.after is not None:
            own, other = (_shapes(study.arms[name].recipe, images) for name in (arm.name, arm.after))
            if differing := sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name)):
                study.refuse(
                    ("arms", arm.name, "after"),
                    f"arm {arm.name!r} cannot start from the weights of {arm.after!r}: {differing[0]} differs; give"
                    " both the same network",
                )
    if place == "ray" and jobs is not None:
        raise InputError("--jobs: on Ray, as many runs are trained at once as the cluster has cores (or GPUs) for")
    if place == "ray" and device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device: {device}: on Ray it is auto, cpu or cuda, of the cluster's machines")
    setting = Setting(dataset, data_dir.resolve() if data_dir else None, offline, device, num_threads_each)
    others = f"-from-seed-{study.first_seed}" * bool(study.first_seed) + "-tuned" * tune
    folder = Path(os.path.realpath(runs_dir)) / "studies" / f"{study.name}-{study.scale}{others}"
    return Execution(study, folder, images, setting, num_jobs, place, tune, keep_weights, tuple(options_typed(given)))


def jobs_and_threads(jobs: int | None, threads: int | None, on_gpu: bool, cells: int | None = None) -> tuple[int, int]:
    """How many cells to train at a time, no more than there are where that is said, and with how many threads each.
    Raises InputError."""
    for option, value, most in (("--jobs", jobs, MOST_JOBS), ("--threads", threads, MAX_THREADS)):
        if value is not None and not 1 <= value <= most:
            raise InputError(f"{option}: {value} is not from 1 to {most}")
    cores = num_threads()
    jobs = min(jobs or (1 if on_gpu else max(1, cores // (threads or 1))), cells or MOST_JOBS)
    return jobs, threads or (max(1, cores // jobs) if on_gpu or cells == jobs else 1)


@contextlib.contextmanager
def alone_in(folder: Path, doing: str, command: str) -> Iterator[None]:
    """Make that folder and hold the right to write to it. Raises FromzeroError where another process holds it, which is
    said to be `doing` that; StoppedError, with the `command` that goes on, where what is done in it was stopped."""
    lock = filelock.FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise FromzeroError(f"{folder}: another process {doing}; wait for it") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    except NotImplementedError:  # of filelock
        raise InputError(f"{folder}: files cannot be locked there; name another --runs-dir") from None
    try:
        yield
    except StoppedError as stopped:
        message = f"stopped; every run is saved; go on with: {command}"
        raise StoppedError(message, stopped.exit_code - 128) from None
    finally:
        lock.release()


def is_same_arm(one: Arm, other: Arm) -> bool:
    """Whether the runs of one arm are those of the other."""
    changed = differing_fields(one.recipe, other.recipe).keys() - {"dataset"}  # its images may lie elsewhere now
    return one.after == other.after and not changed


def _shapes(recipe: Recipe, images: ImageSet) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the recipe's network."""
    network = build(recipe.network, images.image_shape, images.num_classes, device="meta")
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def command(study: Study, tuned: bool, options: Sequence[str] = ()) -> str:
    """The command line that carries a study out."""
    seeds = ["--seeds", str(study.seeds)]
    if study.first_seed or "first_seed" in study.text:
        seeds += ["--first-seed", str(study.first_seed)]
    return command_line("fromzero", "study", study.label, "--scale", study.scale, *seeds, *["--tune"] * tuned, *options)


def sweep(study: Study, folder: Path, fingerprints: Mapping[str, str]) -> Sweep:
    """What the sweep has found: validation accuracies after the last epoch, None where a run failed, is not there, or
    is not of this study as it is now, on images of these fingerprints."""
    scores: Sweep = {}
    for cell in trials_of(study, folder):
        assert study.tuning is not None
        value = cell.recipe.fields()[study.tuning.field]
        run, score = cell.run, None
        if run.is_there and not differences(cell, fingerprints):
            score = None if run.summary is None else float(run.summary["val/accuracy"])
        scores.setdefault(cell.arm, {}).setdefault(value, []).append(score)
    return scores


def best_values(swept: Sweep) -> dict[str, float]:
    """Arm → the value with the best mean validation accuracy; a value with which a run failed is out, and an arm of
    which that leaves none."""
    found = {}
    for arm, scores in swept.items():
        means = {value: np.mean(row) for value, row in scores.items() if None not in row}  # type: ignore[arg-type]
        if means:
            found[arm] = max(means, key=lambda value: means[value])
    return found


def read_description(folder: Path) -> Description:
    """What the study in that folder was when it was run last. Raises FromzeroError where that is damaged."""
    try:
        return Description.model_validate(read_json(folder / "study.json"))
    except pydantic.ValidationError as error:
        raise FromzeroError(f"{folder}/study.json: {damage(error)}; the study's command writes it anew") from None


def recorded_study(folder: Path, ran: Description) -> Study:
    """The study in that folder as it was run last. Raises FromzeroError where its files are damaged."""
    base = load_recipe(folder / "base.toml")
    seeds = {"seeds": ran.seeds, "first_seed": ran.first_seed}
    return load_study(folder / "study.toml", ran.scale, **seeds, name=ran.name, base=base, label=ran.label)


def read_json(path: Path) -> dict[str, Any]:
    """The object in that file; empty when there is none. Raises FromzeroError when it is damaged."""
    try:
        return read_object(path) if path.exists() else {}
    except FromzeroError as error:
        raise FromzeroError(f"{error}; remove it, then the study's command writes it anew") from None
