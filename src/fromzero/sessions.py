"""Starting a training and going on with one: everything between what a user asks for and the loop."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fromzero import checkpoint, machine, networks
from fromzero.checkpoint import Checkpoint
from fromzero.data import NAMED, Images, ImageSet, load_images, split_name, split_recorded
from fromzero.errors import FromzeroError, InputError, WriteError, checking_types, counted, some
from fromzero.files import csv_text
from fromzero.machine import Machine
from fromzero.optim import learning_rate_at
from fromzero.provenance import describe_program, last_machine, other_switches
from fromzero.recipe import Recipe, load_recipe
from fromzero.resources import check_memory
from fromzero.runs import Run, create_run, load_run
from fromzero.splits import Data, check_image_set, validation_images
from fromzero.state import State, least_memory, load_weights, model_weights
from fromzero.steps import initial_state
from fromzero.timetable import Timetable
from fromzero.trained import check_kept, check_unedited, last_checkpoint, naming, recorded_data, recorded_images
from fromzero.training import Training


def train(
    recipe: Recipe | str | Path, images: ImageSet | None = None, *, runs_dir: str | Path = "runs", **options: Any
) -> Run:
    """Train a network and return its run folder.

    recipe: a Recipe, or the name or file of one; images: by default those of `recipe.dataset`; options: those of
    `new_training`. Raises FromzeroError for anything a user can mend.
    """
    training = new_training(recipe, images, runs_dir=runs_dir, **options)
    for _ in training:
        pass
    return training.run


def resume(run: Run | str | Path, **options: Any) -> Run:
    """Go on with a stopped run, or extend a finished one (`epochs=`), to its end; options: those of
    `resumed_training`."""
    training = resumed_training(run, **options)
    for _ in training:
        pass
    return training.run


@checking_types
def new_training(
    recipe: Recipe | str | Path,
    images: ImageSet | None = None,
    *,
    runs_dir: str | Path = "runs",
    name: str | None = None,
    start_from: Run | str | Path | None = None,
    partial: bool = False,
    device: str | torch.device = "auto",
    threads: int | None = None,
    checkpoint_minutes: float | None = None,
    keep: int = 2,
) -> Training:
    """A training about to begin, its run folder made.

    name: of the run folder, by default data set and parameter count. device: auto, cpu or cuda, perhaps with a number;
    threads: by default one a core. start_from: a run whose last weights to start with ("save weights, then train
    again"); partial: take those that fit. checkpoint_minutes: how often to save, by default about every minute, at most
    2.5 % of the time; keep: how many checkpoints to keep. Raises InputError before the folder is made when something
    does not fit.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    images = load_images(recipe.dataset) if images is None else images
    recipe = recipe.override({"dataset": _dataset_of(recipe, images)})
    check_image_set(recipe, images)
    names = images.class_names
    if not all(isinstance(one, str) for one in names) or len({*names}) < len(names):
        raise InputError(
            f"{images.source}: class_names: expected texts that differ, found {some(list(map(repr, names)))}"
        )
    _check_start(keep, checkpoint_minutes)
    here = machine.prepare(recipe.precision, device=str(device), threads=threads)
    data = Data.of(recipe, images, here.device)
    _check_memory(recipe, data, here, "make the batch (--batch-size), the images or the network smaller")
    state = initial_state(recipe, data, here)
    source = None if start_from is None else load_run(start_from, runs_dir)
    origin = None if source is None else _weights_taken(state, source, recipe, images, data, partial=partial)
    state.start_average()
    total = networks.num_parameters(recipe.network, images.image_shape, images.num_classes)
    run = create_run(Path(runs_dir), f"{re.sub('[@:]', '-', images.name)}-{total}" if name is None else name)
    with _begun_or_not(run) as undo:
        if images.train.files:
            run.write_splits(_splits(recipe, images, data))
        run.write_provenance(
            {
                **describe_program(),
                "machine": asdict(here),
                "data": _described(images, data),
                "recipe": recipe.fields(),
                "from": origin,
                "resumed": [],
            }
        )
        lock = undo.enter_context(contextlib.ExitStack())
        lock.enter_context(run.lock())
        training = Training(run, recipe, images, here, state, data, checkpoint_minutes, keep, lock)
        training.save()
        run.write_recipe(recipe)
        undo.pop_all()
    return training


def _described(images: ImageSet, data: Data) -> dict[str, Any]:
    """What provenance records of the images."""
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        "name": images.name,
        "source": images.source,
        "fingerprints": images.fingerprints,
        "images": images.counts,
        "subsets": {name: len(part.labels) for name, part in parts.items()},
        "order": images.order_digest,
        "classes": list(images.class_names),
        "image_shape": list(images.image_shape),
        "normalise": data.normalise.to_json(),
        "held_out": data.validation_digest,
        "notes": list(images.notes),
    }


def _weights_taken(
    state: State, source: Run, recipe: Recipe, images: ImageSet, data: Data, *, partial: bool
) -> dict[str, Any]:
    """What provenance records of the last weights of `source`, which are given to the network of `state`: all, or with
    `partial` those that fit."""
    found = last_checkpoint(source)
    weights = _weights_for(images, found, source, partial=partial)
    try:
        left = load_weights(state.model, weights, partial=partial)
    except InputError as error:
        raise InputError(f"{source.path}: {error}\n--partial takes the weights that fit") from None
    return {
        "run": str(source.path),
        "path": str(source.path.resolve()),  # whoever asks later may stand elsewhere
        "started": source.provenance["started"],
        "recipe": source.recipe.name,
        "step": found.state.get("step"),
        "left": left,
        **_num_seen(source, recipe, images, data),
    }


def _num_seen(source: Run, recipe: Recipe, images: ImageSet, data: Data) -> dict[str, int | None]:
    """How many of the validation and of the test images the weights of `source` were trained on, by what is in them:
    `seen` and `seen_test` of its record. Images that are among the train images here as well do not count. None where
    that cannot be told: of weights trained on other images, which have no known files, but for those of other classes
    altogether."""
    runs, known = [*source.lineage()], set[Any]()
    is_told = runs[-1].provenance["from"] is None  # else the folder of a run before is not there any more
    for run in runs:
        try:
            theirs = _train_keys(run, images)
        except FromzeroError:
            theirs = None
        known |= theirs or set()
        is_told = is_told and theirs is not None
    if not is_told:
        own_test = (run.provenance["data"]["fingerprints"]["test"] == images.fingerprints["test"] for run in runs)
        is_apart = runs[-1].provenance["from"] is None and all(own_test)  # they all kept these images for the test
        return {"seen": None, "seen_test": 0 if is_apart else None}
    known -= _kept_keys(images, data.held)
    parts = {"seen": validation_images(recipe, images, data.held), "seen_test": images.test}
    return {name: sum(key in known for key in _keys(part)) for name, part in parts.items()}


def _train_keys(run: Run, images: ImageSet) -> set[Any] | None:
    """What is in those of these images that a run was trained on itself, by `_keys`; None where that cannot be told."""
    recorded = run.provenance["data"]
    if recorded["order"] == images.order_digest:
        before = Data.of(run.recipe, images, "cpu")
        if before.validation_digest != recorded.get("held_out"):  # by an earlier fromzero, which split in another way
            return None
        return _kept_keys(images, before.held)
    known = {row.get("sha256", "") for row in run.pictures if row.get("split") == "train"}
    if known and "" not in known and images.train.files:
        return known
    has_files = bool(run.pictures) and bool(images.train.files)
    return None if has_files or {*recorded["classes"]} & {*images.class_names} else set()


def _kept_keys(images: ImageSet, held: np.ndarray | None) -> set[Any]:
    """What is in the train images but for those held out, by `_keys`."""
    keys = _keys(images.train)
    return {keys[index] for index in np.delete(np.arange(len(keys)), [] if held is None else held).tolist()}


def _keys(part: Images) -> list[Any]:
    """What is in each image: of a picture how its file's SHA-256 begins, of others the SHA-256 of label and pixels."""
    return part.record_digests if part.file_digests is None else part.file_hashes


@contextlib.contextmanager
def _begun_or_not(run: Run) -> Iterator[contextlib.ExitStack]:
    """Remove the run's folder where what is in here fails, and say so of what cannot be written."""
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, run.path, ignore_errors=True)
        try:
            yield undo
        except WriteError as error:
            why = str(error).partition("; ")[0]
            raise WriteError(f"{why}; nothing is left of the run: mend that, then begin it again") from None


def _splits(recipe: Recipe, images: ImageSet, data: Data) -> str:
    """Which file is in which split, as CSV: split, class, the file under the images' source, and how its SHA-256
    begins."""
    held = set([] if data.held is None else data.held.tolist())
    of_train = ["validation" if place in held else "train" for place in range(len(images.train))]
    parts = [(images.train, of_train), (images.test, ["test"] * len(images.test))]
    if images.validation is not None:
        used = "validation" if recipe.validation.source == "split" else "unused"
        parts.append((images.validation, [used] * len(images.validation)))
    return csv_text(
        ("split", "class", "file", "sha256"),
        (
            (split, images.class_names[label], file, begin)
            for part, splits in parts
            for split, label, file, begin in zip(
                splits, part.labels, part.files or [""] * len(part), part.file_hashes, strict=True
            )
        ),
    )


def _check_memory(recipe: Recipe, data: Data, here: Machine, instead: str) -> None:
    """Refuse a training whose steps cannot fit; of what a GPU has, PyTorch says so itself. Raises InputError."""
    if here.device != "cpu":
        return
    height, width, _ = data.image_shape
    element_bytes, batch = machine.ELEMENTS[here.precision].itemsize, min(recipe.batch_size, len(data.train.labels))
    needed = least_memory(recipe, data.image_shape, data.num_classes, batch, element_bytes)
    steps = f"steps of {counted(batch, 'image')} of {width}×{height} pixels through {recipe.name}"
    check_memory(needed, steps, instead)


def _dataset_of(recipe: Recipe, images: ImageSet) -> str:
    """What the recipe in the run folder names, so that it is the images that the run was given, wherever one stands: a
    recipe that names a path was loaded from it; one that names `cifar10` may have been given others, from Python. Of
    images that are nowhere, as arrays, the name is left, so that no others are loaded in their place."""
    path, asked = split_name(recipe.dataset)
    if path not in NAMED:
        whole = f"{Path(path).resolve()}{asked}"
        is_text = whole.isprintable()  # a recipe cannot hold a name that is none, as of a folder above it
        return whole if is_text and Path(path).exists() else recipe.dataset
    name, options = split_recorded(images.name, images.source)
    if name in NAMED:
        return images.name
    is_there = images.source not in ("", "memory") and Path(images.source).exists()
    return images.source + options if is_there else f"{images.name} (in memory)"


def _weights_for(images: ImageSet, found: Checkpoint, source: Run, *, partial: bool) -> dict[str, Tensor]:
    """The weights to start with on these images: if partial and their classes differ from the run's, without the last
    layer, whose outputs mean those. Raises InputError if not partial."""
    weights = model_weights(found)
    ours = list(images.class_names)
    theirs = source.provenance["data"]["classes"]
    if theirs == ours:
        return weights
    if partial:
        return {name: weight for name, weight in weights.items() if not name.startswith("predictions.")}
    pairs = enumerate(itertools.zip_longest(theirs, ours, fillvalue="none"), 1)
    place, one, other = next((place, *pair) for place, pair in pairs if pair[0] != pair[1])
    raise InputError(
        f"{source.path}: its classes differ: number {place} is {one!r} there and {other!r} here"
        "\n--partial takes the weights of all layers but the last"
    )


@checking_types
def resumed_training(
    run: Run | str | Path,
    images: ImageSet | None = None,
    *,
    runs_dir: str | Path = "runs",
    epochs: int | None = None,
    allow_inexact: bool = False,
    device: str | torch.device | None = None,
    threads: int | None = None,
    data_dir: str | Path | None = None,
    offline: bool = False,
    checkpoint_minutes: float | None = None,
    keep: int | None = None,
) -> Training:
    """A training that goes on where a run's last checkpoint stands, bit for bit.

    epochs: a new total, to extend the run. Device and threads are by default the recorded ones. runs_dir: where a run
    that is given by name lies; data_dir, offline: where its images are now, and whether they may be downloaded;
    checkpoint_minutes: as in `new_training`; keep: how many checkpoints, by default as many as are there, two at least.
    Raises InputError where these are not possible; FromzeroError when the run has ended, when its recipe was edited,
    when the images differ from the recorded ones, or when the machine differs and `allow_inexact` is not set.
    """
    _check_start(keep, checkpoint_minutes)
    run = load_run(run, runs_dir)
    with contextlib.ExitStack() as lock:
        lock.enter_context(run.lock())
        recipe, recorded = run.recipe, last_machine(run.provenance)
        _check_goes_on(run, epochs)
        goes_on = recipe.override({"epochs": epochs or recipe.epochs})
        images = recorded_images(run, images, data_dir=data_dir, offline=offline)
        here = machine.prepare(
            recorded["precision"] if recipe.precision == "auto" else recipe.precision,
            device=str(device or recorded["device"]),
            threads=recorded["threads"] if threads is None else threads,
        )
        differences = [*here.differences(recorded), *other_switches(run.provenance)]
        if differences and not allow_inexact:
            asked = {"device": device, "threads": threads}
            options = [f"--{name}" for name, value in asked.items() if value not in (None, recorded[name])]
            leave = f"leave {' and '.join(options)} out, or " if options else ""
            raise FromzeroError(
                f"{run.path}: what it was trained with differs from this machine ({'; '.join(differences)}), so the"
                f" result would not be bit-identical; {leave}--allow-inexact goes on anyway"
            )
        data = recorded_data(run, images, here)
        keep = keep or max(2, checkpoint.num_kept(run.checkpoints))
        _check_memory(recipe, data, here, f"{run.path} is left as it was, to go on where there is as much")
        state, found = _last_state(run, images, here)
        # Nothing can fail from here on but writing, so a run that cannot go on is left as it was.
        checkpoint.set_aside_damaged(run.checkpoints, found)
        _cut_back(run, state, images, here, goes_on, exact=not differences)
        return Training(run, goes_on, images, here, state, data, checkpoint_minutes, keep, lock.pop_all())


def _check_goes_on(run: Run, epochs: int | None) -> None:
    """Refuse to go on with an edited run, or with one that has ended, but for more epochs. Raises FromzeroError."""
    check_unedited(run)
    before = run.recipe.epochs
    if epochs is not None and epochs < before:
        raise InputError(f"{run.path}: --epochs {epochs} is less than the run's {before}")
    check_kept(run)
    if run.summary is not None and epochs in (None, before):
        raise InputError(
            f"{run.path}: has ended after {before} epochs; to extend it: {run.resume_command} --epochs {2 * before}"
        )


def _last_state(run: Run, images: ImageSet, here: Machine) -> tuple[State, Checkpoint]:
    """The state in a run's last checkpoint, and that. Raises FromzeroError where it or rows up to it are gone."""
    found = checkpoint.load_last(run.checkpoints)
    if found is None:
        left = checkpoint.best_left(run.checkpoints)
        raise FromzeroError(f"{run.path}: its checkpoints are gone; nothing was changed{left}")
    state = State.initial(run.recipe, images.image_shape, images.num_classes, here.device)
    with naming(found):
        state.load_checkpoint(found)
    expected, rows = state.counters.epoch, len(run.metrics())
    if rows < expected:
        raise FromzeroError(
            f"{run.path}/metrics.jsonl: rows are missing: expected {expected}, found {rows}; nothing was changed;"
            f" {run.way_on}"
        )
    return state, found


def _cut_back(run: Run, state: State, images: ImageSet, here: Machine, recipe: Recipe, *, exact: bool) -> None:
    """Make the run's folder that of a run which stands at `state` and goes on by `recipe`, its own but for epochs."""
    before, provenance, summary = run.recipe.epochs, run.provenance, run.summary
    extended = recipe.epochs != before
    if extended or not exact:
        checkpoint.set_aside_newer_best(run.checkpoints, state.counters.epoch)
    best_is_gone = not (run.checkpoints / checkpoint.BEST).exists()  # it overwrote those before it, or was removed
    if best_is_gone and state.counters.epoch < recipe.epochs:  # the best is the best from here on
        state.counters.best_epoch, state.counters.best_accuracy = 0, -1.0
    run.cut_metrics(state.counters.epoch)
    note: dict[str, Any] = {**describe_program(), "machine": asdict(here), "step": state.counters.step, "exact": exact}
    if extended:
        note["epochs"] = [before, recipe.epochs]
        if summary is not None:
            note["summary"] = summary  # what the shorter training ended with, its test accuracy too
    described = provenance["data"] | {"source": images.source}  # where they are now
    run.write_provenance({**provenance, "data": described, "resumed": [*provenance["resumed"], note]})
    if extended:  # last: a recipe with epochs that provenance does not know would count as edited
        run.write_recipe(recipe)
        (run.path / "summary.json").unlink(missing_ok=True)


def extension_note(before: Recipe, after: Recipe, step: int, timetable: Timetable) -> str:
    """What extending a run at `step` does to its learning rate, in words."""
    old, new = (learning_rate_at(r, step, timetable) for r in (before, after))
    schedule = after.schedule
    warming_up = step < timetable.steps_before(schedule.warmup_epochs)
    if schedule.name == "constant":
        if warming_up:
            return (
                f"the learning rate is {new:g} at this step, still in its warm-up: it rises to"
                f" {after.optimizer.learning_rate:g} by epoch {schedule.warmup_epochs:g} and then stays"
            )
        return f"the learning rate is constant: it stays {new:g}"
    same = all(
        learning_rate_at(before, past, timetable) == learning_rate_at(after, past, timetable) for past in range(step)
    )
    was = "as it was" if new == old else f"it was {old:g}"
    at_once = f"the run that {after.epochs} epochs at once would have been"
    return (
        f"the {schedule.name} schedule now ends at epoch {after.epochs} instead of {before.epochs}: the learning rate"
        f" at this step is {new:g} ({was}{', in warm-up' if warming_up else ''}), "
        + (f"and all before were the same too: this is {at_once}" if same else f"so this is not {at_once}")
    )


def _check_start(keep: int | None, checkpoint_minutes: float | None) -> None:
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode is on: nothing can be trained in it")
    if (keep is not None and keep < 1) or (checkpoint_minutes is not None and not checkpoint_minutes >= 0):
        raise InputError(f"keep: 1 at least, checkpoint_minutes: 0 at least; found {keep} and {checkpoint_minutes}")
