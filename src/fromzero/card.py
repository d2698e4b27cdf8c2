"""A model card: what whoever is given a run's network should know of it, as a page in Markdown (Mitchell et al., 2019,
arXiv:1810.03993). It says what the run's folder records, and of what is not recorded that it is not."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fromzero.changes import in_words
from fromzero.data.decoding import preparation
from fromzero.errors import counted, some
from fromzero.networks import num_parameters
from fromzero.provenance import last_machine
from fromzero.runs import Row
from fromzero.stats import wilson_interval
from fromzero.terminal import in_brackets
from fromzero.trained import Classifier

MOST_CLASSES = 25  # whose accuracy is listed, the worst ones


def card(classifier: Classifier) -> str:
    """The card of a run's network. Raises FromzeroError where the run's records are damaged."""
    classifier.run.check()
    run, names, (height, width, channels) = classifier.run, classifier.class_names, classifier.image_shape
    recipe, version = run.recipe, run.provenance.get("versions", {}).get("fromzero", "")
    parameters = num_parameters(recipe.network, classifier.image_shape, len(names))
    prepared = f": {preparation(height, width)}" if channels == 3 else ""
    lines = [
        f"# {_plain(run.name)}",
        f"An image classifier of {len(names)} classes, trained with fromzero {version} on {run.began:%Y-%m-%d}: recipe"
        f" {_code(in_words(recipe))}, seed {recipe.seed}; {parameters:,} parameters. {_origin(classifier)}",
        "",
        f"Classes, in the order of its output: {', '.join(map(_code, names))}.",
        "",
        "## Accuracy",
        *(f"- {line}" for line in [*_accuracies(classifier), *_of_folds(classifier)]),
        "",
        "## Input and output",
        f"`pixels`, (N, {height}, {width}, {channels}), are bytes from 0 to 255; the model scales them"
        f" itself{prepared}. `probabilities`, (N, {len(names)}), are float32.",
        "",
        "## Trained on",
        _images(classifier),
        "",
        "## Before you use it",
        "- It always names one of its classes, even for pictures of something else.",
        f"- Its probabilities are {_calibrated(classifier)}.",
        "- The test images are from the same collection as those it was trained on. Pictures taken in another way or"
        " place may well be recognised less well: measure it on some.",
        *(f"- {line}" for line in _findings(classifier)),
    ]
    return "\n".join(lines) + "\n"


def _calibrated(classifier: Classifier) -> str:
    """How far its probabilities can be taken for how often it is right."""
    if classifier.temperature == 1:
        return "the network's own, not how often it is right"
    adjusted = ", and of equally frequent classes," if classifier.run.recipe.logit_adjustment else ""
    return (
        f"scaled by a temperature, {classifier.temperature:.2f}, that was fitted to its validation images after epoch"
        f" {classifier.checkpoint.epochs}, to say how often it is right on pictures like those{adjusted} and no others"
    )


def _origin(classifier: Classifier) -> str:
    """Where the weights come from."""
    run, found = classifier.run, classifier.checkpoint
    best = found.file.stem == "best"
    at = ", the best on validation" if best else f", at step {found.state.get('step', 0):,}"
    weights = f"Weights after epoch {found.epochs} of {run.recipe.epochs}{at}."
    origin = run.provenance["from"]
    if origin is None:
        return f"Trained from scratch. {weights}"
    return f"Trained on from the weights of another run, {_code(origin['run'])} ({_code(origin['recipe'])}). {weights}"


def _row(classifier: Classifier) -> Row | None:
    """The figures that were recorded of exactly these weights: a stop within an epoch leaves others."""
    found, rows = classifier.checkpoint, classifier.run.metrics()
    if not 1 <= found.epochs <= len(rows):
        return None
    row = rows[found.epochs - 1]
    return row if found.state.get("step", row["step"]) == row["step"] else None  # best weights do not know theirs


def _accuracies(classifier: Classifier) -> list[str]:
    """What is recorded of these weights."""
    run, row, provenance = classifier.run, _row(classifier), classifier.run.provenance
    if row is None:
        return ["Nothing is recorded of exactly these weights: `fromzero evaluate` scores them."]
    count = provenance["data"].get("images", {}).get("test")
    train = f"Train images, or a fixed part of them, without dropout and augmentation: {row['train/accuracy']:.4f}."
    seeds = "Of one training: another seed would differ."
    if last_machine(provenance)["precision"] != "float32":
        seeds += " Scored in bfloat16; the model computes in float32, which may change what it says of a few images."
    of_test, of_validation = (
        f" ({doubt})" * bool(doubt) for doubt in (run.doubt_of("test"), run.doubt_of("validation"))
    )
    if run.recipe.validation.source == "test":
        watched = "training was watched by the same images"
        if classifier.checkpoint.file.stem == "best":
            watched = "these weights were chosen by the same images, so it flatters"
        return [f"Test images: {_with_interval(row['val/accuracy'], count)}; {watched}{of_test}.", train, seeds]
    test, by_class = "not recorded of these weights; `fromzero evaluate` scores them", {}
    if run.summary is not None and run.summary["epoch"] == row["epoch"]:
        test = _with_interval(run.summary["test/accuracy"], count)
        by_class = run.summary.get("test/by_class", {})
    if ends := run.earlier_ends:
        test += f". They were scored before, after epoch {', '.join(map(str, ends))}, and the run was extended then"
    chosen = ", by which these weights were chosen" if classifier.checkpoint.file.stem == "best" else ""
    validation = f"Validation images: {row['val/accuracy']:.4f}{chosen}{of_validation}."
    return [f"Test images: {test}{of_test}.", *_by_class(by_class), validation, train, seeds]


def _by_class(found: Mapping[str, tuple[int, int]]) -> list[str]:
    """How many test images of each class are right, the worst class first, and what it would take to do as well as
    the commonest class alone; nothing where that is not recorded."""
    counts = {name: (right, count) for name, (right, count) in found.items() if count}
    if not counts:
        return []
    worst_first = sorted(counts, key=lambda name: counts[name][0] / counts[name][1])
    told = [f"{_code(name)} {counts[name][0] / counts[name][1]:.3f} (of {counts[name][1]:,})" for name in worst_first]
    commonest = max(counts, key=lambda name: counts[name][1])
    share = counts[commonest][1] / sum(count for _, count in counts.values())
    mean = sum(right / count for right, count in counts.values()) / len(counts)
    always = f"Their mean is {mean:.4f}. To always say {_code(commonest)} is right for {share:.1%} of the images."
    return [f"Test images by class: {some(told, most=MOST_CLASSES)}. {always}"]


def _of_folds(classifier: Classifier) -> list[str]:
    """What cross-validation says of trainings like this one, where it was asked."""
    found = classifier.run.cross_validated(classifier.checkpoint.epochs)
    if found is None:
        return []
    accuracy = _with_interval(found["accuracy"], found["images"])
    others = f"one of {found['folds']} other networks, trained by the same recipe without it"
    return [f"Train images, each judged by {others}: {accuracy}."]


def _with_interval(accuracy: float, count: int | None) -> str:
    """An accuracy with its interval by the number of images, where that is recorded."""
    if not count:
        return f"**{accuracy:.4f}**"
    return f"**{accuracy:.4f}** ({in_brackets(wilson_interval(accuracy, count), count)})"


def _images(classifier: Classifier) -> str:
    """What it was trained on, in words."""
    data, source = classifier.run.provenance["data"], classifier.run.recipe.validation.source
    counts, of = data.get("subsets"), "images whose number was not recorded"
    if counts:
        watched = "" if source == "test" else f" {counted(counts['validation'], 'other')} for validation,"
        of = f"{counted(counts['train'], 'image')} to train on,{watched} {counts['test']:,} for the test"
    prints = ", ".join(f"{split} {found[:12]}" for split, found in data["fingerprints"].items())
    said = [f"\n- {_plain(note)}" for note in data.get("notes", ())]
    return f"{_code(data['name'])}: {of}. fromzero's fingerprints: {prints}.{''.join(said)}"


def _findings(classifier: Classifier) -> list[str]:
    """What `fromzero diagnose` said of these weights, where it was asked."""
    diagnosis = classifier.run.diagnosis
    made = () if diagnosis is None else (diagnosis["epoch"], diagnosis.get("steps", 0))
    if diagnosis is None or made != (classifier.checkpoint.epochs, 0) or _row(classifier) is None:
        return ["`fromzero diagnose` was not asked about these weights."]
    found = [f"{one['meaning']} (*{one['name']}*): {one['evidence']}." for one in diagnosis["findings"]]
    if not found:
        return ["`fromzero diagnose` found none of the problems that it could judge."]
    return [f"`fromzero diagnose` found: {one}" for one in found]


def _plain(text: str) -> str:
    """Text on one line."""
    return re.sub(r"\s+", " ", text)


def _code(name: str) -> str:
    """A name as a code span, whatever it contains."""
    name = _plain(name)
    fence = "`" * (1 + max(map(len, re.findall("`+", name)), default=0))
    return f"{fence} {name} {fence}" if "`" in name else f"`{name}`"
