"""Starting a training and going on with one: everything between what a user asks for and the loop."""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fromzero import checkpoint, machine, modules, networks
from fromzero.checkpoint import Checkpoint
from fromzero.data import NAMED, ImageSet, load_images, split_name
from fromzero.errors import FromzeroError, InputError, counted
from fromzero.evaluate import Normalise
from fromzero.machine import Machine
from fromzero.modules import Network
from fromzero.networks import ImageShape
from fromzero.optim import learning_rate_at
from fromzero.recipe import Recipe, default_of, load_recipe
from fromzero.runs import Run, create_run, describe_program, last_machine, load_run
from fromzero.state import State, load_weights, model_weights
from fromzero.timetable import Timetable
from fromzero.training import Data, Training, check_image_set

WHITENING_IMAGES = 5000  # as many images as the whitening layer is computed from


def train(
    recipe: Recipe | str, images: ImageSet | None = None, *, runs_dir: str | Path = "runs", **options: Any
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


def new_training(
    recipe: Recipe | str,
    images: ImageSet | None = None,
    *,
    runs_dir: str | Path = "runs",
    name: str | None = None,
    start_from: Run | str | Path | None = None,
    partial: bool = False,
    device: str = "auto",
    threads: int | None = None,
    checkpoint_minutes: float | None = None,
    keep: int = 2,
) -> Training:
    """A training about to begin, its run folder made.

    name: of the run folder, by default data set and parameter count. start_from: a run whose last weights to start
    with ("save weights, then train again"); partial: take those that fit. checkpoint_minutes: how often to save, by
    default about every minute, at most 2.5 % of the time; keep: how many checkpoints to keep. Raises InputError before
    the folder is made when something does not fit.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    images = images or load_images(recipe.dataset)
    recipe = recipe.override({"dataset": _dataset_of(recipe, images)})
    check_image_set(recipe, images)
    here = machine.prepare(recipe.precision, device=device, threads=threads)
    data = Data.of(recipe, images, here.device)
    state = initial_state(recipe, images.image_shape, images.num_classes, data, here)
    origin = None
    if start_from is not None:
        source = start_from if isinstance(start_from, Run) else load_run(start_from, runs_dir)
        found = last_checkpoint(source)
        weights = _weights_for(images, found, source, partial=partial)
        try:
            left = load_weights(state.model, weights, partial=partial)
        except InputError as error:
            raise InputError(f"{source.path}: {error}\n--partial takes the weights that fit") from None
        origin = {"run": str(source.path), "recipe": source.recipe.name, "step": found.state.get("step"), "left": left}
    state.start_average()
    total = networks.num_parameters(recipe.network, images.image_shape, images.num_classes)
    run = create_run(Path(runs_dir), name or f"{re.sub('[@:]', '-', images.name)}-{total}")
    described = {
        "name": images.name,
        "source": images.source,
        "fingerprints": images.fingerprints,
        "order": images.order_digest(),
        "classes": list(images.class_names),
        "image_shape": list(images.image_shape),
        "normalise": data.normalise.to_json(),
        "copies": "together",
        "notes": list(images.notes),
    }
    run.write_provenance(
        {
            **describe_program(),
            "machine": asdict(here),
            "data": described,
            "recipe": recipe.fields(),
            "from": origin,
            "resumed": [],
        }
    )
    training = Training(run, recipe, images, here, state, data, checkpoint_minutes, keep)
    training.take_lock()
    training.save()
    run.write_recipe(recipe)
    return training


def _dataset_of(recipe: Recipe, images: ImageSet) -> str:
    """What the recipe in the run folder names, so that it is the images that the run was given: a recipe that names a
    path was loaded from it; one that names `cifar10` may have been given others, from Python."""
    if split_name(recipe.dataset)[0] not in NAMED:
        return recipe.dataset
    name, options = split_name(images.name)
    if name in NAMED:
        return images.name
    return images.source + options if images.source and Path(images.source).exists() else recipe.dataset


def initial_state(recipe: Recipe, image_shape: ImageShape, num_classes: int, data: Data, here: Machine) -> State:
    """The state before the first step, whitening layers set from WHITENING_IMAGES of the train images."""
    state = State.initial(recipe, image_shape, num_classes, here.device)
    if recipe.network.whitening:
        pixels, labels = data.train
        if bool((labels[1:] >= labels[:-1]).all()):  # pictures come class by class, and the first would be of a few
            pixels = pixels[:: -(-len(pixels) // WHITENING_IMAGES)].contiguous()
        seen = data.normalise(pixels[:WHITENING_IMAGES])
        for model in (state.model, *([state.proxy.model] if state.proxy else [])):
            modules.whiten(model, seen)
    return state


def _weights_for(images: ImageSet, found: Checkpoint, source: Run, *, partial: bool) -> dict[str, Tensor]:
    """The weights to start with on these images: if partial and their classes differ from the run's, without the last
    layer, whose outputs mean those. Raises InputError if not partial."""
    weights = model_weights(found)
    ours = list(images.class_names)
    theirs = source.provenance["data"].get("classes", ours)
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


def resumed_training(
    run: Run | str | Path,
    images: ImageSet | None = None,
    *,
    runs_dir: str | Path = "runs",
    epochs: int | None = None,
    allow_inexact: bool = False,
    device: str | None = None,
    threads: int | None = None,
    data_dir: str | Path | None = None,
    offline: bool = False,
    checkpoint_minutes: float | None = None,
    keep: int = 2,
) -> Training:
    """A training that goes on where a run's last checkpoint stands, bit for bit.

    epochs: a new total, to extend the run. Device and threads are by default the recorded ones. Raises FromzeroError
    when the run has ended, when its recipe was edited, when the images differ from the recorded ones, or when the
    machine differs and `allow_inexact` is not set.
    """
    run = run if isinstance(run, Run) else load_run(run, runs_dir)
    with contextlib.ExitStack() as lock:
        lock.enter_context(run.lock())
        training = _loaded(run, images, epochs, allow_inexact, device, threads, data_dir, offline)
        training.checkpoint_minutes, training.keep = checkpoint_minutes, keep
        training.lock = lock.pop_all()
    return training


def _loaded(
    run: Run,
    images: ImageSet | None,
    epochs: int | None,
    allow_inexact: bool,
    device: str | None,
    threads: int | None,
    data_dir: str | Path | None,
    offline: bool,
) -> Training:
    """The training of a run whose lock is held, at its last checkpoint; the run folder is cut back to it."""
    recipe, provenance = run.recipe, run.provenance
    recorded = last_machine(provenance)
    check_unedited(run)
    if epochs is not None and epochs < recipe.epochs:
        raise InputError(f"{run.path}: --epochs {epochs} is less than the run's {recipe.epochs}")
    _check_kept(run)
    if run.summary is not None and epochs in (None, recipe.epochs):
        raise InputError(
            f"{run.path}: has ended after {recipe.epochs} epochs; to extend it: {run.resume_command}"
            f" --epochs {2 * recipe.epochs}"
        )
    images = recorded_images(run, images, data_dir=data_dir, offline=offline)
    here = machine.prepare(
        recorded["precision"] if recipe.precision == "auto" else recipe.precision,
        device=device or recorded["device"],
        threads=recorded["threads"] if threads is None else threads,
    )
    differences = here.differences(recorded)
    if differences and not allow_inexact:
        asked = {"device": device, "threads": threads}
        options = " and ".join(f"--{name}" for name, value in asked.items() if value not in (None, recorded[name]))
        raise FromzeroError(
            f"{run.path}: what it was trained with differs from this machine ({'; '.join(differences)}), so the result"
            f" would not be the same to the bit; {f'leave {options} out, or ' if options else ''}"
            "--allow-inexact goes on all the same"
        )
    found = checkpoint.load_last(run.checkpoints)
    if found is None:
        left = checkpoint.best_left(run.checkpoints)
        raise FromzeroError(f"{run.path}: its checkpoints are gone; nothing was changed{left}")
    state = State.initial(recipe, images.image_shape, images.num_classes, here.device)
    with _naming(found):
        state.load_checkpoint(found)
    if len(run.metrics()) < state.counters.epoch:
        raise FromzeroError(
            f"{run.path}/metrics.jsonl: rows are missing: expected {state.counters.epoch}, found {len(run.metrics())};"
            f" nothing was changed; {run.way_on}"
        )
    data = Data.of(recipe, images, here.device, copies_apart=_copies_apart(run))
    # Nothing can fail from here on but writing, so a run that cannot go on is left as it was.
    checkpoint.set_aside_damaged(run.checkpoints, found)
    run.cut_metrics(state.counters.epoch)
    note: dict[str, Any] = {**describe_program(), "machine": asdict(here), "step": state.counters.step}
    note["exact"] = not differences
    if epochs is not None and epochs != recipe.epochs:
        note["epochs"] = [recipe.epochs, epochs]
        if run.summary is not None:
            note["summary"] = run.summary  # what the shorter training ended with, its test accuracy too
        recipe = recipe.override({"epochs": epochs})
    (run.path / "summary.json").unlink(missing_ok=True)
    described = provenance["data"] | {"source": images.source}  # where they are now
    run.write_provenance({**provenance, "data": described, "resumed": [*provenance["resumed"], note]})
    if "epochs" in note:  # last: a recipe with epochs that provenance does not know would count as edited
        run.write_recipe(recipe)
    return Training(run, recipe, images, here, state, data)


def check_unedited(run: Run) -> None:
    """Refuse an edited recipe: the checkpoint is that of a training by the old one. Raises FromzeroError.

    The images may have moved (theirs is a fingerprint of its own), and epochs change where a run was extended."""
    provenance, now = run.provenance, run.recipe.fields()
    extended = {epochs for note in provenance["resumed"] for epochs in note.get("epochs", ())}
    recorded = provenance.get("recipe", {})
    if recorded:  # a field that is newer than the run had no effect on it
        recorded = {path: default_of(path) for path in now if path not in recorded} | recorded
    for path, then in recorded.items():  # of a field that is no more nothing can be said
        fits = (
            now.get(path, then) == then or path in ("name", "dataset") or (path == "epochs" and now[path] in extended)
        )
        if not fits:
            raise FromzeroError(
                f"{run.path}/recipe.toml: {path} is {now[path]}, but this run was trained with {then}: put that back;"
                f" to train on in another way, start a new run from its weights: fromzero train --from {run.path}"
            )


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


def recorded_images(
    run: Run, images: ImageSet | None = None, *, data_dir: str | Path | None = None, offline: bool = False
) -> ImageSet:
    """The images a run was trained on: those given, or read from where they were, from `data_dir`, or as found by
    name. Raises FromzeroError when their fingerprints are not the recorded ones."""
    recorded = run.provenance["data"]
    source = Path(recorded["source"])
    name, options = split_name(recorded["name"])
    if images is None and name in NAMED:
        if data_dir is None and source.exists():
            data_dir = source if source.is_dir() else source.parent
        images = load_images(recorded["name"], data_dir=data_dir, offline=offline)
    elif images is None:
        if data_dir is None and not source.exists():
            raise InputError(f"{run.path}: its images are no longer at {source}; --data-dir says where they are now")
        images = load_images(f"{data_dir or source}{options}")
    found, then = images.fingerprints, recorded["fingerprints"]
    if changed := [split for split in (found | then) if found.get(split) != then.get(split)]:
        split = changed[0]
        now, before = (prints.get(split, "none")[:12] for prints in (found, then))
        raise FromzeroError(
            f"{run.path}: the {' and '.join(changed)} images at {images.source} are not those it was trained on"
            f" ({split} fingerprint {now}…, recorded {before}…); put them back as they were, or start anew from its"
            f" weights by --from {run.path}"
        )
    if images.order_digest() != recorded.get("order", images.order_digest()):
        raise FromzeroError(
            f"{run.path}: the images at {images.source} are those it was trained on, but in another order, which would"
            " change the splits and the order of training: files were renamed, or come from another folder than"
            f" {recorded['source']}, which --data-dir can name"
        )
    if list(images.class_names) != recorded.get("classes", list(images.class_names)):
        raise FromzeroError(
            f"{run.path}: the classes at {images.source} are called {', '.join(images.class_names)}, where they were"
            f" called {', '.join(recorded['classes'])}; give them their names back"
        )
    return images


def _copies_apart(run: Run) -> bool:
    """Whether the run was begun when validation was held out image by image, whatever was a copy of what."""
    return run.provenance["data"].get("copies") != "together"


def last_checkpoint(run: Run) -> Checkpoint:
    """The newest whole checkpoint of a run. Raises FromzeroError when it has none."""
    _check_kept(run)
    found = checkpoint.load_last(run.checkpoints)
    if found is None:
        raise FromzeroError(f"{run.path}: it has no checkpoint{checkpoint.best_left(run.checkpoints)}")
    return found


def _check_kept(run: Run) -> None:
    """Raise FromzeroError for a run that has ended and has no weights any more, as a study's runs have none."""
    if run.summary is not None and not run.checkpoints.exists():
        raise FromzeroError(
            f"{run.path}: it has ended, and its weights are not there any more (checkpoints; of a study's runs they are"
            " only kept with --keep-weights)"
        )


@contextlib.contextmanager
def _naming(found: Checkpoint) -> Iterator[None]:
    """Name the file in what is said of weights that do not fit."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{found.path}: {error}") from None


class Trained(NamedTuple):
    """What a run has come to: its images as they are and as it trained on them, its network in evaluation mode, the
    checkpoint that the weights are from and the epochs that they have behind them, and the machine that computes."""

    run: Run
    images: ImageSet
    data: Data
    network: Network
    checkpoint: Checkpoint
    epochs: int
    machine: Machine
    steps_beyond: int

    @property
    def weights(self) -> Path:
        """The file of the checkpoint."""
        assert self.checkpoint.path is not None  # it was read from a file
        return self.checkpoint.path

    @property
    def reached(self) -> str:
        """The epoch that the weights are of, and how far beyond its end: a stop comes within one."""
        beyond = f" and {counted(self.steps_beyond, 'step')} of the next" if self.steps_beyond else ""
        return f"epoch {self.epochs}{beyond}"


def load_trained(
    run: Run,
    which: str = "last",
    *,
    images: ImageSet | None = None,
    device: str = "auto",
    threads: int | None = None,
    data_dir: str | Path | None = None,
    offline: bool = False,
) -> Trained:
    """A run with its `last` or `best` weights, on the images it was trained on and in its precision. Raises
    FromzeroError when the images or the weights are not there or not its own."""
    images = recorded_images(run, images, data_dir=data_dir, offline=offline)
    here = machine.prepare(run.provenance["machine"]["precision"], device=device, threads=threads)
    network, found = load_network(run, images.image_shape, images.num_classes, here, which)
    data = Data.of(run.recipe, images, here.device, copies_apart=_copies_apart(run))
    epochs = found.state.get("epoch", 0)
    beyond = found.state.get("step", 0) - Timetable.of(run.recipe, len(data.train.labels)).start_of(epochs)
    return Trained(run, images, data, network, found, epochs, here, max(beyond, 0))


class Classifier(NamedTuple):
    """What a run has come to, for pictures it has not seen: all that its folder alone can tell."""

    network: Network
    normalise: Normalise
    image_shape: ImageShape
    class_names: tuple[str, ...]
    machine: Machine


def load_classifier(
    run: Run, which: str = "last", *, precision: str | None = None, device: str = "auto", threads: int | None = None
) -> Classifier:
    """A run's network with its `last` or `best` weights and what it needs to look at pictures; the images that it was
    trained on need not be there. precision: another one than it was trained in. Raises FromzeroError when the weights
    are not there or not its own."""
    recorded = run.provenance["data"]
    known = all(recorded.get(key) for key in ("classes", "image_shape", "normalise"))
    if not known or {len(values) for values in recorded["normalise"].values()} != {recorded["image_shape"][2]}:
        raise FromzeroError(
            f"{run.path}/provenance.json: data: does not say how pictures are to be made ready (classes, image_shape,"
            " normalise), as of runs begun by an earlier fromzero"
        )
    height, width, channels = recorded["image_shape"]
    here = machine.prepare(precision or run.provenance["machine"]["precision"], device=device, threads=threads)
    network, found = load_network(run, (height, width, channels), len(recorded["classes"]), here, which)
    if which == "last" and not found.state.get("step"):
        warnings.warn(f"{run.path}: these are the weights it began with; none has been saved since", stacklevel=2)
    normalise = Normalise.from_json(recorded["normalise"], here.device)
    return Classifier(network, normalise, (height, width, channels), tuple(recorded["classes"]), here)


def load_network(
    run: Run, image_shape: ImageShape, num_classes: int, here: Machine, which: str = "last"
) -> tuple[Network, Checkpoint]:
    """A run's network with its `last` or `best` weights, in evaluation mode, and the checkpoint they are from: an older
    one where the last is damaged. Raises FromzeroError also when its recipe was edited, which they might fit."""
    check_unedited(run)
    path = run.checkpoints / checkpoint.BEST
    if which == "best" and not path.exists():
        _check_kept(run)
        raise FromzeroError(f"{run.path}: it has no best checkpoint yet")
    found = checkpoint.load(path) if which == "best" else last_checkpoint(run)
    model = networks.build(run.recipe.network, image_shape, num_classes, device=here.device)
    with _naming(found):
        load_weights(model, model_weights(found))
    return model.eval(), found
