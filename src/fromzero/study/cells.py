"""A cell: one arm with one seed, an ordinary run in its own folder.

`train_cell` does what is still to be done for it and nothing more: a finished cell is left alone, a broken one goes on
to the bit, one whose recipe has changed or whose files are damaged is set aside (kept, not counted) and trained anew.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fromzero import checkpoint, machine, sessions, trained
from fromzero.changes import differing_fields, value_text
from fromzero.checkpoint import DamagedCheckpointError
from fromzero.data import ImageSet
from fromzero.errors import BusyError, FromzeroError, ReadError, TooLargeError, WriteError
from fromzero.evaluate import evaluate
from fromzero.files import write_atomically
from fromzero.recipe import Recipe
from fromzero.runs import OWN_FILES, Run
from fromzero.splits import Data
from fromzero.study.definition import TUNING_SEEDS_FROM, Study
from fromzero.training import Training

OUTCOMES = "val-correct.bin"  # one byte for each validation image: 1 when it was right
LOCK_SECONDS = 60.0  # how long a writer whose study was killed may take to save and go


@dataclass(frozen=True)
class Cell:
    """One arm with one seed. `after`: the cell whose last weights it starts from; `needs_weights`: whether something is
    done with its own, so that it is trained anew where they are gone; `keep_weights`: whether they stay anyway;
    `keeps_outcomes`: whether it is kept which validation images it has right."""

    arm: str
    path: Path
    recipe: Recipe
    after: Path | None = None
    needs_weights: bool = False
    keep_weights: bool = False
    keeps_outcomes: bool = False

    @property
    def run(self) -> Run:
        """The run in its folder, there or not."""
        return Run(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def seed(self) -> int:
        return self.recipe.seed


@dataclass(frozen=True)
class Setting:
    """Where and how the cells of a study compute."""

    dataset: str
    data_dir: Path | None = None
    offline: bool = False
    device: str = "auto"
    threads: int | None = None


def cells_of(study: Study, folder: Path, best: Mapping[str, float]) -> list[Cell]:
    """A cell for each arm and seed, seed by seed; the arms at their best values, where those are known."""
    starts = {arm.after for arm in study.arms.values()}
    found = []
    for seed in study.seed_range:
        for arm in study.arms.values():
            tuned = {study.tuning.field: best[arm.name]} if study.tuning and arm.name in best else {}
            path = folder / "cells" / f"{arm.name}-seed{seed}"
            after = None if arm.after is None else path.with_name(f"{arm.after}-seed{seed}")
            recipe = arm.recipe.override({"seed": seed} | tuned)
            found.append(Cell(arm.name, path, recipe, after, arm.name in starts, keeps_outcomes=True))
    return found


def trials_of(study: Study, folder: Path) -> list[Cell]:
    """A cell for each arm, value and seed of the study's sweep."""
    tuning, found = study.tuning, []
    if tuning is None:
        return []
    for seed in range(TUNING_SEEDS_FROM, TUNING_SEEDS_FROM + tuning.seeds):
        for arm in study.arms.values():
            for value in tuning.values[arm.name]:
                path = folder / "tuning" / f"{arm.name}-{value:g}-seed{seed}"
                found.append(Cell(arm.name, path, arm.recipe.override({"seed": seed, tuning.field: value})))
    return found


def is_finished(cell: Cell, images: ImageSet) -> bool:
    """Whether nothing is left to be done for the cell."""
    if not _is_trained(cell, images):
        return False
    kept = (cell.path / OUTCOMES).exists() if cell.keeps_outcomes else cell.needs_weights
    return kept or not cell.run.checkpoints.exists()


def train_cell(
    cell: Cell, images: ImageSet, setting: Setting, note: Callable[[str], None] = lambda line: None
) -> Iterator[float]:
    """Train a cell to its end, yielding the share that is done, first that from before. Raises what a training raises;
    StoppedError when asked to stop, the cell saved. `note` is told what a user should know."""
    if cell.run.is_there:
        _wait_for_writer(cell.run)
    if not _is_trained(cell, images):
        with closing(_begun(cell, images, setting, note)) as training:
            steps = training.timetable.start_of(training.recipe.epochs)
            yield training.state.counters.step / steps
            for progress in training:
                yield min(progress.counters.step / steps, 0.999)
    if cell.keeps_outcomes and not (cell.path / OUTCOMES).exists():
        _record_outcomes(cell, images)
    if not (cell.keep_weights or cell.needs_weights):
        shutil.rmtree(cell.run.checkpoints, ignore_errors=True)
    yield 1.0


def read_outcomes(run: Run) -> np.ndarray | None:
    """Whether each validation image was right after the last epoch, bool (N,), or None where that is not recorded, or
    not with the accuracy that the run has."""
    try:
        outcomes = (run.path / OUTCOMES).read_bytes()
    except OSError:
        return None
    right = np.frombuffer(outcomes, np.uint8) == 1
    fits = len(right) and math.isclose(right.mean(), (run.summary or {"val/accuracy": -1})["val/accuracy"])
    return right if fits else None


def _is_trained(cell: Cell, images: ImageSet) -> bool:
    """Whether the cell's run has ended, with this recipe, these images and this start."""
    return cell.run.is_there and not _why_anew(cell, images) and cell.run.has_ended


def _begun(cell: Cell, images: ImageSet, setting: Setting, note: Callable[[str], None]) -> Training:
    """The cell's training, gone on with where that can be done exactly, else new."""
    if cell.run.is_there:
        if reasons := _why_anew(cell, images):
            note(f"{cell.name}: {'; '.join(reasons)}: trained anew, the old run is {_set_aside(cell)}")
        else:
            try:
                return sessions.resumed_training(cell.run, images, keep=1)
            except (BusyError, ReadError, TooLargeError, WriteError):  # which say nothing against the run
                raise
            except FromzeroError as error:
                why = str(error).removeprefix(f"{cell.path}: ").partition(", so the result")[0]
                note(f"{cell.name}: {why}: begun again, what there was is {_set_aside(cell)}")
    elif _never_began(cell.path):
        shutil.rmtree(cell.path)
    elif cell.path.exists():
        note(f"{cell.name}: what was there is no run: it is {_set_aside(cell)} now")
    if cell.after is not None and not (Run(cell.after).is_there and Run(cell.after).summary):
        raise FromzeroError(f"{cell.after.name}, from whose weights it starts, has not ended")
    return sessions.new_training(
        cell.recipe,
        images,
        runs_dir=cell.path.parent,
        name=cell.name,
        start_from=None if cell.after is None else Run(cell.after),
        device=setting.device,
        threads=setting.threads,
        keep=1,
    )


def _never_began(path: Path) -> bool:
    """Whether a folder is what a training leaves that was killed before it was a run: no row, and nothing of others."""
    own = {*OWN_FILES, "checkpoints"}
    if not path.is_dir() or any(entry.name not in own for entry in path.iterdir()):
        return False
    rows = path / "metrics.jsonl"
    return not rows.exists() or not rows.stat().st_size


def differences(cell: Cell, fingerprints: Mapping[str, str]) -> list[str]:
    """Why the run in the cell's folder, ended or not, is not the one that the study asks for on images of these
    fingerprints; empty when it is. Raises ReadError where that cannot be told."""
    try:
        cell.run.check()
        recipe, provenance = cell.run.recipe, cell.run.provenance
        start_is_newer = cell.after is not None and Run(cell.after).provenance["started"] > provenance["started"]
    except ReadError:
        raise
    except FromzeroError as error:
        return [str(error).removeprefix(f"{cell.path}/").partition("; ")[0]]
    reasons = []
    changed = differing_fields(recipe, cell.recipe)
    changed.pop("dataset", None)  # the same images may lie elsewhere now: their fingerprints decide
    if changed:
        reasons.append(
            f"its recipe has changed ({', '.join(f'{path} is {value_text(value)}' for path, value in changed.items())})"
        )
    if recipe.seed != cell.seed:
        reasons.append("it has another seed")
    if provenance["data"]["fingerprints"] != fingerprints:
        reasons.append("it was trained on other images")
    origin = Path(provenance["from"]["run"]).name if provenance["from"] else None
    if origin != (cell.after.name if cell.after else None):
        reasons.append("it started from other weights")
    elif cell.after is not None and start_is_newer:
        reasons.append(f"{cell.after.name}, from which it starts, is newer")
    return reasons


def _why_anew(cell: Cell, images: ImageSet) -> list[str]:
    """Why what is in the cell's folder cannot be gone on with or counted on; empty when it can."""
    reasons = differences(cell, images.fingerprints)
    if cell.recipe.validation.source == "fold" and not reasons:
        judged_on = Data.of(cell.recipe, images, "cpu").validation_digest
        if cell.run.provenance["data"].get("held_out") != judged_on:
            reasons.append("an earlier fromzero made other folds")
    if cell.needs_weights and not _has_weights(cell):
        reasons.append("its weights, which are needed, are gone or damaged")
    return reasons


def _has_weights(cell: Cell) -> bool:
    with contextlib.suppress(FileNotFoundError, DamagedCheckpointError):
        checkpoint.load(cell.run.checkpoints / checkpoint.LAST)
        return True
    return False


def _set_aside(cell: Cell) -> str:
    """Move the cell's folder out of the way, to where nothing counts it; returns its new place in the study's."""
    folder = cell.path.parent.with_name("set-aside")
    folder.mkdir(exist_ok=True)
    number = 1
    while (target := folder / f"{cell.name}-{number}").exists():
        number += 1
    cell.path.rename(target)
    return f"{folder.name}/{target.name}"


def _wait_for_writer(run: Run) -> None:
    """Until nobody writes to the run: a worker whose study was killed notices, saves and goes."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            with run.lock():
                return
        except BusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _record_outcomes(cell: Cell, images: ImageSet) -> None:
    """Score the validation images once more with the last weights and keep which were right; none where the weights are
    gone or do not give the recorded accuracy: an interval can be done without, a wrong one not."""
    run = cell.run
    recorded = run.provenance["machine"]
    right = b""
    with contextlib.suppress(FromzeroError):
        here = machine.prepare(recorded["precision"], device=recorded["device"], threads=recorded["threads"])
        network, _ = trained.load_network(run, images.image_shape, images.num_classes, here)
        data = Data.of(cell.recipe, images, here.device)
        outcomes = evaluate(network, *data.validation, data.normalise, here)
        if outcomes.accuracy == (run.summary or {})["val/accuracy"]:
            right = (outcomes.predictions == outcomes.labels).cpu().numpy().astype(np.uint8).tobytes()
    write_atomically(run.path / OUTCOMES, right)
