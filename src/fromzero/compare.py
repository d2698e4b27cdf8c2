"""Two runs beside each other: in what they were trained differently, and what the same images say of both.

Images alone can tell two networks apart, not two ways to train, which make other networks with other seeds. A study of
several seeds can: it is written and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fromzero.changes import differing_fields, in_words, short
from fromzero.checkpoint import BEST
from fromzero.data.images import Images
from fromzero.errors import FromzeroError, InputError, counted, typed
from fromzero.evaluate import Normalise, evaluate
from fromzero.files import write_atomically
from fromzero.findings import STUDY_SEEDS, images_of, study_command, study_text
from fromzero.runs import Run, last_machine
from fromzero.scores import doubts, pictures_of
from fromzero.splits import Subset, validation_label
from fromzero.stats import LEVEL, compare_on_images, wilson_interval
from fromzero.terminal import duration
from fromzero.trained import Classifier, Trained, load_classifier, load_trained, proposing_others

OF_ALL_ARMS = ("dataset", "validation.source", "validation.fraction")  # in which a study's arms cannot differ
COMPUTING = ("device", "precision", "torch", "fromzero")  # of a machine, what may change more than the order of sums


class _Seen(NamedTuple):
    """What both runs say of the same images: whether each is right, bool (N,) of each run."""

    sides: Sequence[Trained | Classifier]
    right: Sequence[np.ndarray]
    on: str
    notes: list[str]


def compare_runs(
    one: Run,
    two: Run,
    folder: Path | None = None,
    which: str = "last",
    *,
    data_dir: str | Path | None = None,
    offline: bool = False,
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """What differs between two runs, and how their `last` or `best` weights compare on the images that both validate
    on, or on the pictures of a folder with a folder for each class, as JSON data. Where recipes differ, the study that
    can decide between them is written into the first one's folder.

    Raises FromzeroError where they do not validate on the same images or that folder cannot be written, and as
    `load_trained` and `load_classifier` do; NonFiniteError."""
    if one.path.samefile(two.path):
        raise InputError(f"{one.path} and {two.path} are the same run: name another one")
    if folder is None:
        a, b = (
            load_trained(run, which, device=device, threads=threads, data_dir=data_dir, offline=offline)
            for run in (one, two)
        )
        seen, source = _on_validation(a, b), a.images.source
    else:
        c, d = (load_classifier(run, which, device=device, threads=threads) for run in (one, two))
        seen, source = _on_pictures(folder, c, d), one.provenance["data"]["source"]
    study = _write_study(one, two, source)
    found = compare_on_images(*seen.right)
    return {
        "runs": [_described(side, right) for side, right in zip(seen.sides, seen.right, strict=True)],
        "recipe": _recipe_changes(one, two),
        "machine": _machine_changes(one, two),
        "on": seen.on,
        "images": len(seen.right[0]),
        "notes": list(dict.fromkeys([*_doubts(seen.sides), *seen.notes])),
        **found._asdict(),
        "difference": found.difference._asdict(),
        "study": None if study is None else {"file": str(study), "command": study_command(one, study)},
        "study_seconds": STUDY_SEEDS * (_seconds(one) + _seconds(two)),
    }


def _on_validation(a: Trained, b: Trained) -> _Seen:
    of_a, of_b = _validation(a), _validation(b)
    places = _in_both(a, b)
    if len(places[0]) < 2:
        raise FromzeroError(
            f"{a.run.path} and {b.run.path} have no validation images in common ({of_a}; {of_b}), so they can only be"
            " compared on others, in a folder with a folder for each class:"
            f" {typed('fromzero', 'compare', a.run.path, b.run.path)} FOLDER"
        )
    right = [
        _are_right(side, side.data.validation, side.data.normalise)[these]
        for side, these in zip((a, b), places, strict=True)
    ]
    notes = []
    if a.checkpoint.file.name == BEST:
        notes.append("best weights were chosen by these images, so both accuracies flatter")
    of = of_a if of_a == of_b else f"A: {of_a}; B: {of_b}"
    return _Seen((a, b), right, f"the validation images of both ({of})", notes)


def _in_both(a: Trained, b: Trained) -> tuple[list[int], list[int]]:
    """Where in the validation images of each those lie that both have, so that neither was trained on them. Pictures
    are known by their files, whatever size they were scaled to, other images by their pixels, both with their class."""
    images = [side.validation_images for side in (a, b)]
    by_file = all(part.file_digests is not None for part in images)

    def places(part: Images) -> dict[object, int]:
        keys = part.record_digests if part.file_digests is None or not by_file else part.file_digests.tolist()
        return {key: place for place, key in enumerate(zip(part.labels.tolist(), keys, strict=True))}

    if a.images.class_names != b.images.class_names:
        return [], []
    ours, theirs = map(places, images)
    common = [key for key in ours if key in theirs]
    return [ours[key] for key in common], [theirs[key] for key in common]


def _on_pictures(folder: Path, a: Classifier, b: Classifier) -> _Seen:
    found, notes = [], []
    for side in (a, b):
        pictures = pictures_of(folder, side)
        notes += pictures.notes
        found.append(dict(zip(pictures.paths, _are_right(side, pictures.subset, side.normalise), strict=True)))
    read_by_both = [path for path in found[0] if path in found[1]]
    right = [np.array([outcomes[path] for path in read_by_both]) for outcomes in found]
    return _Seen((a, b), right, f"the pictures in {folder}", notes)


def comparison_text(record: Mapping[str, Any]) -> str:
    """The same in words."""
    runs = record["runs"]
    lines = [
        f"{name}  {run['run']}: {run['recipe']}, seed {run['seed']}, {run['checkpoint']} weights (epoch {run['epoch']})"
        for name, run in zip("AB", runs, strict=True)
    ]
    changes = record["recipe"] | record["machine"]
    told = ", ".join(f"{path} {short(ours)} → {short(theirs)}" for path, (ours, theirs) in changes.items())
    lines.append(f"  from A to B: {told or 'nothing differs in recipe, seed or precision'}")
    lines += [f"  note: {note}" for note in record["notes"]]
    lines.append(f"  on {record['on']}, {counted(record['images'], 'image')}:")
    for name, run in zip("AB", runs, strict=True):
        low, high = run["interval"]
        lines.append(f"    {name}      accuracy {run['accuracy']:.4f} ({low:.4f}–{high:.4f})")
    difference = record["difference"]
    mean, low, high = (f"{100 * difference[end]:+.2f}".replace("-", "−") for end in ("mean", "low", "high"))
    lines += [
        f"    B − A  {mean} points ({low} to {high}, 95 % for these two networks on other such images)",
        f"    only A is right on {record['only_first']:,}, only B on {record['only_second']:,} of them; p"
        f" {'below 0.001' if record['p'] < 0.001 else format(record['p'], '.3g')} (McNemar's test, exact)",
    ]
    if record["p"] <= LEVEL:
        lines.append(f"  These images tell the two networks apart: {'B' if difference['mean'] > 0 else 'A'} is better.")
    else:
        lines.append("  These images do not tell the two networks apart.")
    if set(record["recipe"]) <= {"seed"}:
        lines.append("  Their recipes are the same: so much do seed, machine and first weights matter here.")
    else:
        can = " A study can:" if record["study"] else ""
        lines.append(f"  Which way to train is better they cannot tell: other seeds make other networks.{can}")
    if record["study"]:
        lines += [
            f"    {record['study']['command']}",
            f"    {STUDY_SEEDS} pairs of runs, some {duration(record['study_seconds'])} in all",
        ]
    return "\n".join(lines)


def _are_right(side: Trained | Classifier, these: Subset, normalise: Normalise) -> np.ndarray:
    """Whether each image is, bool (N,)."""
    with proposing_others(side.checkpoint):
        outcomes = evaluate(side.network, *these, normalise, side.machine)
    return np.asarray((outcomes.predictions == outcomes.labels).cpu())


def _described(side: Trained | Classifier, right: np.ndarray) -> dict[str, Any]:
    accuracy = float(right.mean())
    return {
        "run": str(side.run.path),
        "recipe": in_words(side.run.recipe),
        "seed": side.run.recipe.seed,
        "checkpoint": side.checkpoint.file.stem,
        "epoch": side.checkpoint.epochs,
        "ended": side.run.summary is not None,
        "accuracy": accuracy,
        "interval": wilson_interval(accuracy, len(right)),
    }


def _doubts(sides: Sequence[Trained | Classifier]) -> list[str]:
    return [f"{name}: {doubt}" for name, side in zip("AB", sides, strict=True) for doubt in doubts(side)]


def _validation(side: Trained) -> str:
    return f"{side.images.name}: {validation_label(side.run.recipe, side.images)}"


def _recipe_changes(one: Run, two: Run) -> dict[str, tuple[Any, Any]]:
    """Dotted path → both values, of the fields in which the recipes differ, seed included."""
    ours, theirs = one.recipe.fields(), two.recipe.fields()
    paths = [*differing_fields(one.recipe, two.recipe), *(["seed"] if ours["seed"] != theirs["seed"] else [])]
    return {path: (ours[path], theirs[path]) for path in paths}


def _machine_changes(one: Run, two: Run) -> dict[str, tuple[Any, Any]]:
    """The same of what they were computed with, and of the weights they began with."""
    machines = [last_machine(run.provenance) for run in (one, two)]
    found = {name: tuple(here.get(name, "?") for here in machines) for name in COMPUTING}
    found["begun with"] = tuple((run.provenance["from"] or {"run": "random weights"})["run"] for run in (one, two))
    return {name: (ours, theirs) for name, (ours, theirs) in found.items() if ours != theirs}


def _write_study(one: Run, two: Run, source: str) -> Path | None:
    """The file of the study that tests the second recipe against the first, where a study can: both are of one data
    set, and differ in something."""
    changes = {path: b for path, (_, b) in _recipe_changes(one, two).items() if path not in (*OF_ALL_ARMS, "seed")}
    if not changes or one.recipe.dataset != two.recipe.dataset:
        return None
    claim = f"Trained as {two.name}, validation accuracy is higher than as {one.name}."
    text = study_text(claim, one.recipe, {"first": {}, "second": changes}, images_of(one, source))
    path = one.path / f"{two.name}-against-{one.name}.toml"
    try:
        write_atomically(path, text.encode(), alone=False)
    except OSError as error:
        raise FromzeroError(f"{path}: cannot be written: {error.strerror}; make the folder writable") from None
    return path


def _seconds(run: Run) -> float:
    """What all its epochs take, as the first ones say."""
    rows = run.metrics()
    return run.recipe.epochs * rows[-1]["time/seconds"] / rows[-1]["epoch"] if rows else 0.0
