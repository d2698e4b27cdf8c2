"""Looking at what was trained: the images of a run, its weights, and both together."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fromzero import checkpoint, machine, networks
from fromzero.checkpoint import Checkpoint
from fromzero.data import NAMED, Images, ImageSet, load_images, split_name, split_recorded
from fromzero.errors import (
    FromzeroError,
    InputError,
    NonFiniteError,
    checking_types,
    command_line,
    counted,
    nearest,
    some,
)
from fromzero.evaluate import COLDEST, HOTTEST, Normalise, evaluate, outputs, probabilities
from fromzero.machine import Machine
from fromzero.modules import Network
from fromzero.networks import ImageShape
from fromzero.recipe import default_of
from fromzero.records import is_figure
from fromzero.runs import Row, Run, load_run
from fromzero.splits import Data, validation_images
from fromzero.state import load_weights, model_weights
from fromzero.timetable import Timetable

if TYPE_CHECKING:
    from fromzero.data.decoding import Picture, Wrong

WEIGHTS = ("last", "best")  # of which epoch: the last one that was saved, or the best on validation


def check_unedited(run: Run) -> None:
    """Refuse an edited recipe: the checkpoint is that of a training by the old one. Raises FromzeroError.

    The images may have moved (theirs is a fingerprint of its own), and epochs change where a run was extended."""
    provenance, now = run.provenance, run.recipe.fields()
    extended = {epochs for note in provenance["resumed"] for epochs in note.get("epochs", ())}
    newer = {path: default_of(path) for path in now if path not in provenance["recipe"]}  # they had no effect on it
    for path, then in (newer | provenance["recipe"]).items():  # of a field that is no more nothing can be said
        fits = (
            now.get(path, then) == then or path in ("name", "dataset") or (path == "epochs" and now[path] in extended)
        )
        if path == "epochs" and extended:
            then = max(extended)
        if not fits:
            raise FromzeroError(
                f"{run.path}/recipe.toml: {path} is {now[path]}, but this run was trained with {then}: put that back;"
                f" to train on in another way, start a new run from its weights: {run.start_command()}"
            )


def recorded_images(
    run: Run, images: ImageSet | None = None, *, data_dir: str | Path | None = None, offline: bool = False
) -> ImageSet:
    """The images a run was trained on: those given, or read from where they were, from `data_dir`, or as found by
    name. Raises FromzeroError when their fingerprints are not the recorded ones."""
    recorded = run.provenance["data"]
    source = Path(recorded["source"])
    name, options = split_recorded(recorded["name"], recorded["source"])
    if images is None and name in NAMED:
        place = source if data_dir is None and source.exists() else data_dir
        if place is not None and Path(place).is_file():  # an archive, which may have any name
            images = load_images(f"{place}{options}")
        else:
            images = load_images(name, data_dir=place, offline=offline)
            images = images.subset(int(options[1:])) if options else images
    elif images is None:
        if recorded["source"] == "memory":
            raise InputError(
                f"{run.path}: it was trained on arrays, which are not kept; from Python give them again:"
                " load_trained(run, images=…), resume(run, images=…)"
            )
        if data_dir is None and not source.exists():
            raise InputError(f"{run.path}: its images are no longer at {source}; --data-dir says where they are now")
        if data_dir is not None and not Path(data_dir).exists():
            raise InputError(f"data folder {data_dir} is not there; the images of {run.path} were at {source}")
        images = load_images(f"{data_dir or source}{options}")
    ours, theirs = set(images.class_names), set(recorded["classes"])
    is_elsewhere = Path(images.source).exists() and images.source != split_name(run.recipe.dataset)[0]
    words = [f"{images.source}{options}"] if is_elsewhere else []
    if new := sorted(ours - theirs):
        gone = f" and has none called {some(sorted(theirs - ours))}" if theirs - ours else ""
        raise FromzeroError(
            f"{run.path}: {images.source} has {len(new)} class{'' if len(new) == 1 else 'es'} that it was not"
            f" trained on ({some(new)}){gone}; its images were at {source}: give a renamed folder its name back, move"
            f" new ones away, or start anew with them: {run.start_command(*words)} --partial"
        )
    found, then = images.fingerprints, recorded["fingerprints"]
    if changed := [split for split in (found | then) if found.get(split) != then.get(split)]:
        split = changed[0]
        told = _changed_files(run, images)
        now, before = (prints.get(split, "none")[:12] for prints in (found, then))
        counts = recorded.get("images", {})  # of older runs it was not recorded
        anew = command_line("fromzero", "train", *words, "--recipe", run.path / "recipe.toml")
        many = f"{images.counts.get(split, 0):,}, where it had {counts.get(split, 0):,}" if counts else ""
        raise FromzeroError(
            f"{run.path}: the {' and '.join(changed)} images at {images.source} are not those it was trained on"
            f" ({split}: {many + ', ' if many else ''}fingerprint {now}…, recorded {before}…{told}); put them back as"
            f" they were, or train anew on them: {anew}; other pictures are scored by fromzero evaluate RUN FOLDER and"
            " fromzero compare RUN OTHER FOLDER"
        )
    if images.order_digest != recorded["order"]:
        raise FromzeroError(
            f"{run.path}: the images at {images.source} are those it was trained on, but in another order, which would"
            " change the splits and the order of training: files were renamed, or come from another folder than"
            f" {recorded['source']}, which --data-dir can name{_changed_files(run, images)}"
        )
    for now, before in zip(images.class_names, recorded["classes"], strict=False):
        if now != before:
            raise FromzeroError(
                f"{run.path}: a class at {images.source} is called {now!r} and was {before!r}; give it its name back"
            )
    return images


def _changed_files(run: Run, images: ImageSet) -> str:
    """Which pictures are gone and which new, as far as their names tell and were recorded; empty otherwise."""
    recorded = run.provenance["data"]
    if ":" in split_recorded(recorded["name"], recorded["source"])[1]:  # a part of them, and another part of others
        return ""
    parts = [part for part in (images.train, images.validation, images.test) if part is not None]
    here = {file for part in parts for file in part.files or ()}
    before = {row["file"] for row in run.pictures}
    if not before or not here:
        return ""
    told = (("gone", before - here), ("new", here - before))
    return "".join(f"; {what}: {some(sorted(names))}" for what, names in told if names)


def recorded_data(run: Run, images: ImageSet, here: Machine) -> Data:
    """The images of a run, split as when it was begun. Raises FromzeroError where an earlier fromzero split them in
    another way: what it trained on would pass for validation."""
    data = Data.of(run.recipe, images, here.device)
    if run.provenance["data"].get("held_out") != data.validation_digest:
        anew = command_line("fromzero", "train", "--recipe", run.path / "recipe.toml")
        if run.provenance["data"]["source"] == "memory":
            anew = "fromzero.train(run.recipe, images)"
        raise FromzeroError(
            f"{run.path}: an earlier fromzero held out other pictures for validation, or did not record which, so that"
            f" this one might validate on some that it was trained on; start anew: {anew}"
        )
    return data


def last_checkpoint(run: Run) -> Checkpoint:
    """The newest whole checkpoint of a run. Raises FromzeroError when it has none."""
    check_kept(run)
    found = checkpoint.load_last(run.checkpoints)
    if found is None:
        raise FromzeroError(f"{run.path}: it has no checkpoint{checkpoint.best_left(run.checkpoints)}")
    return found


def check_kept(run: Run) -> None:
    """Raise FromzeroError for a run that has ended and has no weights any more, as a study's runs have none."""
    if run.summary is not None and not run.checkpoints.exists():
        raise FromzeroError(
            f"{run.path}: it has ended, and its weights are not there any more (checkpoints; of a study's runs they are"
            " only kept with --keep-weights)"
        )


@contextlib.contextmanager
def naming(found: Checkpoint) -> Iterator[None]:
    """Name the file in what is said of weights that do not fit."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{found.path}: {error}") from None


@contextlib.contextmanager
def proposing_others(found: Checkpoint) -> Iterator[None]:
    """Where these weights do not compute, say what to try."""
    try:
        yield
    except NonFiniteError as error:
        other = "last" if found.file.name == checkpoint.BEST else "best"
        raise NonFiniteError(f"{found.file}: {error}; try --checkpoint {other}") from None


class Trained(NamedTuple):
    """A run with its weights loaded: its image set, and that as split for training (`data`); the network in evaluation
    mode; the checkpoint that the weights are from; and the machine that computes."""

    run: Run
    images: ImageSet
    data: Data
    network: Network
    checkpoint: Checkpoint
    machine: Machine

    def __repr__(self) -> str:
        return f"<weights of {self.run.path}, {self.reached}, on {self.images!r}>"

    @property
    def steps_beyond(self) -> int:
        """How many steps beyond the end of their last whole epoch the weights are: a stop comes within one."""
        ended = Timetable.of(self.run.recipe, len(self.data.train.labels)).start_of(self.checkpoint.epochs)
        return max(int(self.checkpoint.state.get("step", 0) - ended), 0)

    @property
    def reached(self) -> str:
        """The epoch that the weights are of, and how far beyond its end."""
        beyond = f" and {counted(self.steps_beyond, 'step')} of the next" if self.steps_beyond else ""
        return f"epoch {self.checkpoint.epochs}{beyond}"

    @property
    def validation_images(self) -> Images:
        """The images that it validates on, with what is known of their files."""
        return validation_images(self.run.recipe, self.images, self.data.held)

    def rows(self) -> list[Row]:
        """The rows of metrics up to these weights: the run may have gone on since. Of weights with no epoch behind
        them, a row of epoch 0 by scoring them. Raises NonFiniteError."""
        return self.run.metrics()[: self.checkpoint.epochs] or [self._first_row()]

    def _first_row(self) -> Row:
        scores: dict[str, float] = {}
        for split, subset in (("train", self.data.clean_train), ("val", self.data.validation)):
            found = evaluate(self.network, *subset, self.data.normalise, self.machine)
            scores |= {f"{split}/accuracy": found.accuracy, f"{split}/loss": found.loss}
        running = {f"train/running_{what}": scores[f"train/{what}"] for what in ("accuracy", "loss")}
        rate = self.run.recipe.optimizer.learning_rate
        return {"epoch": 0, "step": 0, "learning_rate": rate, "time/seconds": 0.0, **scores, **running}


@checking_types
def load_trained(
    run: Run | str | Path,
    which: str = "last",
    *,
    runs_dir: str | Path = "runs",
    images: ImageSet | None = None,
    precision: str | None = None,
    device: str | torch.device = "auto",
    threads: int | None = None,
    data_dir: str | Path | None = None,
    offline: bool = False,
) -> Trained:
    """A run with its `last` or `best` weights, on the images it was trained on. precision: auto, bfloat16 or float32,
    another one than it was trained in. Raises FromzeroError when the images or the weights are not there or not its
    own."""
    run = load_run(run, runs_dir)
    images = recorded_images(run, images, data_dir=data_dir, offline=offline)
    here = _machine(run, precision, device, threads)
    network, found = load_network(run, images.image_shape, images.num_classes, here, which)
    return Trained(run, images, recorded_data(run, images, here), network, found, here)


class Classifier(NamedTuple):
    """What a run has come to, for pictures it has not seen: all that its folder alone can tell. temperature: what
    outputs are divided by before they become probabilities, as validation says after the last whole epoch
    (`evaluate.temperature`); 1 where none is recorded, as where test images validate."""

    run: Run
    network: Network
    checkpoint: Checkpoint
    normalise: Normalise
    image_shape: ImageShape
    class_names: tuple[str, ...]
    machine: Machine
    temperature: float

    def __repr__(self) -> str:
        return f"<classifier of {self.run.path}: {', '.join(self.class_names)}>"

    def read(self, pictures: Sequence[str | Picture]) -> tuple[Tensor, list[int], dict[int, Wrong]]:
        """Pictures (paths, bytes of files, binary files or Pillow's images) prepared as the run's were: pixels uint8
        (N, H, W, 3) on its device, the places among `pictures` that these are of, and what is wrong with those at
        other places. Raises InputError where its images have other channels."""
        pixels, _, read, wrong = self.read_hashed(pictures)
        return pixels, read, wrong

    def read_hashed(self, pictures: Sequence[str | Picture]) -> tuple[Tensor, list[str], list[int], dict[int, Wrong]]:
        """The same, and behind the pixels how the SHA-256 (hex) of each of their files begins."""
        from fromzero.data.decoding import Picture, read_pictures  # with Pillow, which few need

        if isinstance(pictures, str | Picture) or hasattr(pictures, "read"):
            raise InputError(f"{pictures!r:.60}: expected a list of pictures; of one a list with that")
        files = [Path(picture) if isinstance(picture, str) else picture for picture in pictures]
        if others := [type(one).__name__ for one in files if not isinstance(one, Picture) and not hasattr(one, "read")]:
            raise InputError(f"expected paths, bytes, binary files or Pillow's images, found {others[0]}")
        height, width, channels = self.image_shape
        if channels != 3:
            has = counted(channels, "channel")
            raise InputError(f"{self.run.path}: its images have {has}; pictures are read as red, green, blue")
        pixels, digests, wrong = read_pictures(files, height, width, "reading")
        read = [index for index in range(len(files)) if index not in wrong]
        hashes = [int(digest).to_bytes(8, "little").hex() for digest in digests[read]]
        return torch.from_numpy(pixels[read]).to(self.machine.device), hashes, read, wrong

    def outputs(self, pixels: Tensor, views: str = "none") -> Tensor:
        """The network's outputs, float32 (N, classes), which `predict` divides by the temperature and takes the softmax
        of. Raises NonFiniteError."""
        return outputs(self.network, pixels, self.normalise, self.machine, views)

    def predict(self, pixels: Tensor | ArrayLike, views: str = "none") -> Tensor:
        """Probabilities float32 (N, classes) of pixels uint8 (N, H, W, C), a tensor or an array, calibrated by
        `temperature`, which was fitted to pictures without views. Raises InputError for others, NonFiniteError."""
        given = pixels if isinstance(pixels, Tensor) else np.array(pixels)
        if str(given.dtype) not in ("uint8", "torch.uint8") or tuple(given.shape[1:]) != self.image_shape:
            found = f"{str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
            expected = f"uint8 (N, {', '.join(map(str, self.image_shape))})"
            raise InputError(f"{self.run.path}: expected pixels {expected}, found {found}; `read` prepares pictures so")
        pixels = torch.as_tensor(given, device=self.machine.device)
        if not len(pixels):
            return torch.zeros((0, len(self.class_names)), device=pixels.device)
        return probabilities(self.outputs(pixels, views), self.temperature)


@checking_types
def load_classifier(
    run: Run | str | Path,
    which: str = "last",
    *,
    runs_dir: str | Path = "runs",
    precision: str | None = None,
    device: str | torch.device = "auto",
    threads: int | None = None,
) -> Classifier:
    """A run's network with its `last` or `best` weights and what it needs to look at pictures; the images that it was
    trained on need not be there. precision: auto, bfloat16 or float32, another one than it was trained in. Of a run
    that has saved nothing since it began, these are its first weights: checkpoint.state["step"] is 0. Raises
    FromzeroError when the weights are not there or not its own."""
    run = load_run(run, runs_dir)
    recorded = run.provenance["data"]
    height, width, channels = recorded["image_shape"]
    if {len(values) for values in recorded["normalise"].values()} != {channels}:
        raise FromzeroError(
            f"{run.path}/provenance.json: damaged: data.normalise: expected {channels} values each; {run.way_on}"
        )
    here = _machine(run, precision, device, threads)
    network, found = load_network(run, (height, width, channels), len(recorded["classes"]), here, which)
    normalise = Normalise.from_json(recorded["normalise"], here.device)
    shape, names = (height, width, channels), tuple(recorded["classes"])
    return Classifier(run, network, found, normalise, shape, names, here, temperature_of(run, found))


def _machine(run: Run, precision: str | None, device: str | torch.device, threads: int | None) -> Machine:
    """As the run was computed, but for what is asked. Raises InputError for what is no precision or device."""
    if precision not in (None, "auto", "bfloat16", "float32"):
        raise InputError(f"precision {precision!r}: auto, bfloat16 or float32")
    return machine.prepare(precision or run.provenance["machine"]["precision"], device=str(device), threads=threads)


def temperature_of(run: Run, found: Checkpoint) -> float:
    """The validation temperature of the last epoch behind these weights; 1 where none is recorded and, after a warning,
    where the run's metrics are damaged: a network can be used without."""
    if not found.epochs:
        return 1.0
    try:
        recorded = run.metrics()[found.epochs - 1].get("val/temperature", 1.0)
        if is_figure("val/temperature", recorded) and COLDEST <= recorded <= HOTTEST:
            return float(recorded)
        why = f"{run.path}/metrics.jsonl: val/temperature of epoch {found.epochs} is damaged"
    except IndexError:
        why = f"{run.path}/metrics.jsonl: epoch {found.epochs} is missing"
    except FromzeroError as error:
        why = str(error)
    warnings.warn(f"probabilities are not calibrated: {why}", stacklevel=3)
    return 1.0


def load_network(
    run: Run, image_shape: ImageShape, num_classes: int, here: Machine, which: str = "last"
) -> tuple[Network, Checkpoint]:
    """A run's network with its `last` or `best` weights, in evaluation mode, and the checkpoint they are from: an older
    one where the last is damaged. Raises FromzeroError also when its recipe was edited, which they might fit."""
    if which not in WEIGHTS:
        raise InputError(f"{run.path}: no weights {which!r}{nearest(which, WEIGHTS)}")
    check_unedited(run)
    path = run.checkpoints / checkpoint.BEST
    if which == "best" and not path.exists():
        check_kept(run)
        raise FromzeroError(f"{run.path}: it has no best checkpoint yet")
    found = checkpoint.load(path) if which == "best" else last_checkpoint(run)
    model = networks.build(run.recipe.network, image_shape, num_classes, device=here.device)
    with naming(found):
        load_weights(model, model_weights(found))
    return model.eval(), found
