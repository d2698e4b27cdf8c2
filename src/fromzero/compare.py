"""Two runs beside each other: in what they were trained differently, and what the same images say of both.

Images alone can tell two networks apart, not two ways to train, which make other networks with other seeds. A study of
several seeds can: it is written and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fromzero.changes import DATA_FIELDS, differing_fields, in_words, value_text
from fromzero.data.listing import spelled
from fromzero.errors import FromzeroError, InputError, command_line, counted, some
from fromzero.evaluate import Normalise, evaluate
from fromzero.files import write_atomically
from fromzero.findings import STUDY_SEEDS, images_of, study_command, study_text
from fromzero.provenance import last_machine, last_switches
from fromzero.recipe import recipe_names
from fromzero.runs import Run
from fromzero.scores import doubts, pictures_of
from fromzero.splits import Subset, validation_label
from fromzero.stats import FEWEST_PAIRS, LEVEL, compare_on_images, wilson_interval
from fromzero.terminal import duration
from fromzero.trained import Classifier, Trained, load_classifier, load_trained, proposing_others

NAMES = ("A", "B")
# Of a machine, what can move figures: threads and kernels only change how sums are rounded.
OF_MACHINES = ("device", "precision", "torch", "fromzero")

Both = tuple[Any, Any]  # of the first run, and of the second


class _Side(NamedTuple):
    """What a run says of images: by a key that tells an image from others, whether it is right. Copies have one key."""

    of: Trained | Classifier
    right: dict[object, bool]
    images: int
    notes: Sequence[str]

    @classmethod
    def scored(
        cls,
        of: Trained | Classifier,
        these: Subset,
        normalise: Normalise,
        class_names: Sequence[str],
        contents: Sequence[object],
        notes: Sequence[str] = (),
    ) -> _Side:
        """Of images with these contents; an image's key has its class, too. Raises NonFiniteError."""
        with proposing_others(of.checkpoint):
            outcomes = evaluate(of.network, *these, normalise, of.machine)
        right = (outcomes.predictions == outcomes.labels).tolist()
        names = [spelled(name) for name in class_names]
        keys = zip((names[label] for label in these.labels.tolist()), contents, strict=True)
        return cls(of, dict(zip(keys, right, strict=True)), len(right), notes)


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

    Raises FromzeroError where they have no validation images in common, and as `load_trained` and `load_classifier`
    do; NonFiniteError."""
    if one.path.samefile(two.path):
        raise InputError(f"{one.path} and {two.path} are the same run: name another one")
    classes = [{spelled(name) for name in run.provenance["data"]["classes"]} for run in (one, two)]
    if not classes[0] & classes[1]:
        raise FromzeroError(f"{one.path} and {two.path} have no class in common: nothing compares them")
    if folder is None:
        if classes[0] != classes[1]:
            apart = some(sorted(classes[0] ^ classes[1]))
            raise FromzeroError(
                f"{one.path} and {two.path}: their classes differ ({apart}), so they can only be compared on pictures"
                f" of classes that both have: {command_line('fromzero', 'compare', one.path, two.path)} FOLDER"
            )
        a, b = (
            load_trained(run, which, device=device, threads=threads, data_dir=data_dir, offline=offline)
            for run in (one, two)
        )
        sides = _on_validation(a, b)
        on, source = f"the validation images that both have ({_validation(a, b)})", a.images.source
    else:
        loaded = (load_classifier(run, which, device=device, threads=threads) for run in (one, two))
        sides = [_on_pictures(folder, side) for side in loaded]
        on, source = f"the pictures in {folder}", one.provenance["data"]["source"]
    common = [key for key in sides[0].right if key in sides[1].right]
    if not common:
        raise FromzeroError(
            f"{one.path} and {two.path} have no validation images in common, so they can only be compared on others, in"
            f" a folder with a folder for each class: {command_line('fromzero', 'compare', one.path, two.path)} FOLDER"
        )
    right = [np.array([side.right[key] for key in common]) for side in sides]
    notes = [
        f"{name}: {note}" for name, side in zip(NAMES, sides, strict=True) for note in (*doubts(side.of), *side.notes)
    ]
    if copies := max(side.images - len(side.right) for side in sides):
        many = f"{counted(copies, 'more image')} {'is a copy' if copies == 1 else 'are copies'}"
        notes.append(f"{many}, to the byte; each picture counts once")
    if classes[0] != classes[1]:
        notes.append(f"A chooses among {len(classes[0])} classes, B among {len(classes[1])}")
    if which == "best" and folder is None:
        notes.append("best weights were chosen by these images, so both accuracies flatter")
    changes, others = _recipe_changes(one, two), _other_changes(sides[0].of, sides[1].of)
    if "dataset" in changes:
        others.pop("train images", None)  # said already
    study, left_aside = None, [path for path in changes if path in DATA_FIELDS]
    if len(left_aside) < len(changes.keys() - {"seed"}) and "dataset" not in changes:
        try:
            study = _write_study(one, two, changes, source)
        except OSError as error:
            notes.append(f"{one.path}: the study of both recipes cannot be written there: {error.strerror}")
    found = compare_on_images(*right)
    return {
        "runs": [_described(side.of, outcomes) for side, outcomes in zip(sides, right, strict=True)],
        "recipe": changes,
        "others": others,
        "on": on,
        "images": len(common),
        "notes": notes,
        **found._asdict(),
        "difference": found.difference._asdict(),
        "study": None if study is None else {"file": str(study), "command": study_command(one, study)},
        "same_source": one.provenance["data"]["source"] == two.provenance["data"]["source"],
        "study_leaves_aside": [*left_aside, *others],
        "study_seconds": STUDY_SEEDS * (one.seconds + two.seconds),
    }


def comparison_text(record: Mapping[str, Any]) -> str:
    """The same in words."""
    lines = [
        f"{name}  {run['run']}: {run['recipe']}, seed {run['seed']}, {run['checkpoint']} weights (epoch {run['epoch']})"
        for name, run in zip(NAMES, record["runs"], strict=True)
    ]
    changes = record["recipe"] | record["others"]
    told = ", ".join(f"{path} {value_text(ours)} → {value_text(theirs)}" for path, (ours, theirs) in changes.items())
    lines.append(f"  from A to B: {told or 'nothing differs that is recorded'}")
    lines += [f"  note: {note}" for note in record["notes"]]
    lines.append(f"  on {record['on']}, {counted(record['images'], 'image')}:")
    for name, run in zip(NAMES, record["runs"], strict=True):
        low, high = run["interval"]
        lines.append(f"    {name}      accuracy {run['accuracy']:.4f} ({low:.4f}–{high:.4f})")
    difference, p = record["difference"], record["p"]
    mean, low, high = (f"{100 * difference[end]:+.2f}".replace("-", "−") for end in ("mean", "low", "high"))
    only_a, only_b = record["only_first"], record["only_second"]
    lines += [
        f"    B − A  {mean} points ({low} to {high}, 95 % for these two networks on other such images)",
        f"    only A is right on {only_a:,}, only B on {only_b:,} of them; p"
        f" {'below 0.001' if p < 0.001 else format(p, '.3g')} (McNemar's test, exact)",
    ]
    if p <= LEVEL:
        lines.append(f"  These images tell the two networks apart: {NAMES[only_b > only_a]} is right more often.")
    elif only_a + only_b < FEWEST_PAIRS:
        lines.append(f"  They differ on too few images to be told apart: that takes {FEWEST_PAIRS} at least.")
    else:
        quite = " quite" if difference["low"] > 0 or difference["high"] < 0 else ""
        lines.append(f"  These images do not{quite} tell the two networks apart.")
    if not record["recipe"].keys() - {"seed"}:
        same = f"  Their recipes are the same{', but for the seed' if 'seed' in record['recipe'] else ''}."
        if "train images" in record["others"]:
            same += " Which train images are better takes several seeds of each, and images that none was trained on."
        lines.append(same)
        return "\n".join(lines)
    then = " A study can:" if record["study"] else ""
    if "dataset" in record["recipe"] and not record["same_source"]:
        then = (
            " Nor can a study, whose runs share their pictures: several seeds of each can, on pictures that none was"
            " trained on."
        )
    elif "dataset" in record["recipe"]:
        each = " and ".join(command_line("fromzero", "cross-validate", Path(run["run"])) for run in record["runs"])
        then = f" Nor can a study, whose runs share their images. Each on all its train images: {each}"
    lines.append(f"  Which way to train is better they cannot tell: other seeds make other networks.{then}")
    if record["study"]:
        took = f", some {duration(record['study_seconds'])} of training in all" if record["study_seconds"] else ""
        lines += [f"    {record['study']['command']}", f"    {STUDY_SEEDS} pairs of runs{took}"]
        if record["study_leaves_aside"]:
            aside = ", ".join(record["study_leaves_aside"])
            lines.append(f"    its runs do not differ, as A and B do, in {aside}")
    return "\n".join(lines)


def _on_validation(a: Trained, b: Trained) -> list[_Side]:
    """Of the validation images, which a run is not trained on. Pictures are known by their files, whatever size they
    were scaled to, other images by their pixels."""
    parts = [side.validation_images for side in (a, b)]
    files = [part.file_digests.tolist() for part in parts if part.file_digests is not None]
    contents = files if len(files) == len(parts) else [part.record_digests for part in parts]
    return [
        _Side.scored(side, side.data.validation, side.data.normalise, side.images.class_names, keys)
        for side, keys in zip((a, b), contents, strict=True)
    ]


def _on_pictures(folder: Path, side: Classifier) -> _Side:
    pictures = pictures_of(folder, side)
    return _Side.scored(side, pictures.subset, side.normalise, side.class_names, pictures.hashes, pictures.notes)


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


def _validation(a: Trained, b: Trained) -> str:
    """What the validation images of both are."""
    labels = [f"{side.images.name}: {validation_label(side.run.recipe, side.images)}" for side in (a, b)]
    return labels[0] if labels[0] == labels[1] else "; ".join(map(": ".join, zip(NAMES, labels, strict=True)))


def _recipe_changes(one: Run, two: Run) -> dict[str, Both]:
    """Dotted path → both values, of the fields in which the recipes differ, seed included. Not of what they call the
    same images, nor of a precision that came to the same."""
    ours, theirs = one.recipe.fields(), two.recipe.fields()
    paths = [*differing_fields(one.recipe, two.recipe), *(["seed"] if ours["seed"] != theirs["seed"] else [])]
    orders = {run.provenance["data"]["order"] for run in (one, two)}
    precisions = {last_machine(run.provenance)["precision"] for run in (one, two)}
    alike = [name for name, values in (("dataset", orders), ("precision", precisions)) if len(values) == 1]
    return {path: (ours[path], theirs[path]) for path in paths if path not in alike}


def _other_changes(a: Trained | Classifier, b: Trained | Classifier) -> dict[str, Both]:
    """The same of what else may make a difference: images, machine, first weights, and how far each has come."""

    def of(side: Trained | Classifier) -> dict[str, Any]:
        run, data = side.run, side.run.provenance["data"]
        here = last_machine(run.provenance)
        return {
            "train images": data["fingerprints"]["train"][:12],
            **{f"machine.{name}": here.get(name, "?") for name in OF_MACHINES},
            "switches": ", ".join(map("=".join, (last_switches(run.provenance) or {}).items())) or "none",
            "begun with": (run.provenance["from"] or {"run": "random weights"})["run"],
            "extended after epoch": ", ".join(map(str, run.earlier_ends)) or "none",
            "epochs to go": 0 if run.summary is not None else run.recipe.epochs - side.checkpoint.epochs,
        }

    ours, theirs = of(a), of(b)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def _write_study(one: Run, two: Run, changes: Mapping[str, Both], source: str) -> Path:
    """The file of the study that tests the second recipe against the first. Raises OSError."""
    second = {path: theirs for path, (_, theirs) in changes.items() if path not in (*DATA_FIELDS, "seed")}
    told = some([f"{path} = {value_text(value)}" for path, value in second.items()])
    claim, names = f"With {told} validation accuracy is higher than without.", ["first", "second"]
    recipes = [in_words(run.recipe, but=DATA_FIELDS) for run in (one, two)]
    if {*recipes} <= {*recipe_names()}:
        claim, names = f"{recipes[1]} reaches a higher validation accuracy than {recipes[0]}.", recipes
    arms = dict(zip(names, ({}, second), strict=True))
    last_seed = max(run.recipe.seed for run in (one, two))
    text = study_text(claim, one.recipe, arms, images_of(one, source), last_seed).encode()
    name, number = f"{two.name}-against-{one.name}", 1
    while (path := one.path / f"{name}{'' if number == 1 else f'-{number}'}.toml").exists():
        if path.read_bytes() == text:
            return path
        number += 1  # of another run of that name, or of before one was extended
    write_atomically(path, text, alone=False)
    return path
