"""A page about a run: one HTML file, from what the run recorded and what its network says of its images."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from fromzero.changes import in_words
from fromzero.curves import curves_png
from fromzero.data import Images, ImageSet
from fromzero.errors import FromzeroError, command_line, counted
from fromzero.evaluate import confusions, evaluate, probabilities
from fromzero.findings import study_command, study_cost
from fromzero.runs import FOLDS, LABELS, Row, Run
from fromzero.splits import Subset, validation_label
from fromzero.stats import wilson_interval
from fromzero.trained import Trained, temperature_of

PICTURES = 24  # mistakes of each split, and doubtful labels
MOST_CLASSES = 25  # whose confusions are shown as a matrix
MOST_CONFUSIONS = 10
CALIBRATION_BINS = 10
LEAST = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # of the likeliest class's probability, for it to be an answer
SPLITS = {"train": "train images", "val": "validation images", "test": "test images"}


class Scored(NamedTuple):
    """Images and what a network says of them: pixels uint8 (N, H, W, C), labels int64 (N,), probabilities float32 (N,
    classes), and the mean cross-entropy of its own ones, those of temperature 1, in nats."""

    pixels: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    loss: float

    @property
    def predictions(self) -> np.ndarray:
        """The likeliest class, int64 (N,)."""
        return self.probabilities.argmax(1)

    @property
    def confidence(self) -> np.ndarray:
        """The probability of the likeliest class, float32 (N,)."""
        return self.probabilities.max(1)

    @property
    def right(self) -> np.ndarray:
        """bool (N,)."""
        return np.asarray(self.predictions == self.labels)

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the accuracy's 95 % interval, by the number of images."""
        return wilson_interval(self.accuracy, len(self.labels))

    def confusions(self) -> np.ndarray:
        """As `evaluate.confusions` has them."""
        return confusions(self.labels, self.predictions, self.probabilities.shape[1])

    def mistakes(self) -> np.ndarray:
        """Indices of the images whose class was not predicted, those that the network is surest of first."""
        wrong = np.flatnonzero(~self.right)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]


class Bin(NamedTuple):
    """Of the images that a network is so sure of: from which confidence to which, how many, the mean, and the share
    that is right."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def calibration(scored: Scored) -> tuple[list[Bin], float]:
    """Those of the bins of equal width from 0 to 1 that have images, and the expected calibration error: the distance
    between confidence and accuracy, its mean over the images (Guo et al., 2017, section 2)."""
    sure, right = scored.confidence, scored.right
    places = np.minimum((sure * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = []
    for place in np.unique(places).tolist():
        inside = places == place
        ends = place / CALIBRATION_BINS, (place + 1) / CALIBRATION_BINS
        bins.append(Bin(*ends, int(inside.sum()), float(sure[inside].mean(dtype=float)), float(right[inside].mean())))
    return bins, sum(one.images / len(places) * abs(one.confidence - one.accuracy) for one in bins)


class Answered(NamedTuple):
    """Where a network answers only if it is at least so sure: on how many images that is, and which share is right,
    with its 95 % interval."""

    least: float
    images: int
    accuracy: float
    interval: tuple[float, float]


def answered(scored: Scored) -> list[Answered]:
    """For each of LEAST that leaves an image."""
    found = []
    for least in LEAST:
        right = scored.right[scored.confidence >= least]
        if len(right):
            share = float(right.mean())
            found.append(Answered(least, len(right), share, wilson_interval(share, len(right))))
    return found


def report(trained: Trained, pictures: int = PICTURES) -> str:
    """A run as one HTML page that needs nothing else, with so many pictures of mistakes of each split and of doubtful
    labels.

    What is said by class, and of how sure the network is, is said of the test images once the run has ended; before
    that of the validation images, as the test images are for the end. Pictures of mistakes are train and validation
    images only: who looks at test images one by one and changes something for it has no test set left. Raises
    NonFiniteError where the weights do not compute."""
    run, data = trained.run, trained.data
    diagnosis, folds = (_recorded(run, what) for what in ("diagnosis", "cross_validation"))
    rows = trained.rows()
    ended = run.summary is not None
    parts = {"train": data.clean_train, "val": data.validation} | ({"test": data.test} if ended else {})
    temperature = temperature_of(run, trained.checkpoint)
    scored = {split: _scored(trained, part, temperature) for split, part in parts.items()}
    return page(trained, rows, scored, diagnosis, folds, temperature=temperature, pictures=pictures)


def _scored(trained: Trained, part: Subset, temperature: float) -> Scored:
    """What a run's network says of a part of its images. Raises NonFiniteError."""
    found = evaluate(trained.network, *part, trained.data.normalise, trained.machine)
    tensors = part.pixels, part.labels, probabilities(found.outputs, temperature)
    pixels, labels, said = (tensor.cpu().numpy() for tensor in tensors)
    return Scored(pixels, labels, said, found.loss)


def _recorded(run: Run, what: str) -> Mapping[str, Any] | None:
    """What a run has recorded under that name; None, after a warning, where that is damaged."""
    try:
        found: Mapping[str, Any] | None = getattr(run, what)
        return found
    except FromzeroError as error:
        warnings.warn(str(error), stacklevel=3)
        return None


def page(
    trained: Trained,
    rows: Sequence[Row],
    scored: Mapping[str, Scored],
    diagnosis: Mapping[str, Any] | None,
    folds: Mapping[str, Any] | None = None,
    *,
    temperature: float = 1.0,
    pictures: int = PICTURES,
) -> str:
    """The page of `report`, from rows up to the weights, what the network says of each split (a part of the train
    images), and what diagnosis.json and the cross-validation hold."""
    import jinja2

    run, images = trained.run, trained.images
    on_test = run.recipe.validation.source == "test"
    judged = "test" if "test" in scored else "val"
    names = images.class_names
    confusions = scored[judged].confusions()
    given, said, found = confusions.sum(1), confusions.sum(0), np.diag(confusions)
    wrong = confusions - np.diag(found)
    most = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    commonest = [(int(place) // len(names), int(place) % len(names), int(wrong.flat[place])) for place in most]
    bins, error = calibration(scored[judged])
    validation = validation_label(run.recipe, images)
    # Files are those of the split's own images: a copy may have other names in other splits.
    parts = {"train": images.train, "val": trained.validation_images}
    template = resources.files("fromzero").joinpath("report.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals.update(
        counted=counted, in_words=in_words, isnan=math.isnan, told=_told, zip=zip, command_line=command_line
    )
    environment.globals.update(study_command=study_command, study_cost=study_cost)
    return environment.from_string(template).render(
        run=run,
        recipe=run.recipe,
        provenance=run.provenance,
        reached=trained.reached,
        weights=trained.checkpoint.file.stem,
        validation=validation,
        names=names,
        splits=SPLITS,
        curves=_embedded(curves_png(rows, run.recipe, run.name, validation)) if rows[-1]["epoch"] else None,
        scored=scored,
        diagnosis=diagnosis,
        is_of_these=diagnosis is not None
        and (diagnosis["epoch"], diagnosis.get("steps", 0)) == (rows[-1]["epoch"], trained.steps_beyond),
        judged=SPLITS[judged],
        trained_on=len(trained.data.train.labels),
        by_class=[(int(n), _share(right, n), _share(right, k)) for n, k, right in zip(given, said, found, strict=True)],
        commonest=[(truth, taken_for, count) for truth, taken_for, count in commonest if count],
        matrix=confusions.tolist() if len(names) <= MOST_CLASSES else None,
        bins=bins,
        answered=answered(scored[judged]),
        remarks=[] if diagnosis is None else _here(diagnosis["remarks"], run, folds is not None),
        calibration_error=error,
        temperature=temperature,
        epoch=rows[-1]["epoch"],
        oversure=sum(one.images * (one.confidence - one.accuracy) for one in bins) / sum(one.images for one in bins),
        source=images.source if images.train.files else None,
        folds=folds,
        labels=run.path / FOLDS / LABELS,
        doubtful=[] if folds is None else _doubtful(folds["doubtful"][:pictures], images),
        mistakes={
            split: _mistakes(scored[split], part, pictures)
            for split, part in parts.items()
            if split == "train" or not on_test
        },
    )


def _here(remarks: Sequence[str], run: Run, with_folds: bool) -> list[str]:
    """The remarks of a diagnosis for whoever has this page before them."""
    report, folds = (command_line("fromzero", command, run.path) for command in ("report", "cross-validate"))
    found = [remark.replace(f"which {report} shows", "below") for remark in remarks]
    if not with_folds:
        return found
    asked = [remark for remark in found if f" {folds} looks for them" in remark]
    return [remark for remark in found if remark not in asked] + ["Wrong labels: see Doubtful labels below."] * bool(
        asked
    )


def _told(value: object) -> str:
    """A value of a recipe or of provenance in words."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case Mapping():
            return ", ".join(f"{key} {_told(inner)}" for key, inner in value.items())
        case list() | tuple():
            return ", ".join(f"[{_told(v)}]" if isinstance(v, list | tuple) else _told(v) for v in value)
    return str(value)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _mistakes(scored: Scored, images: Images, most: int = PICTURES) -> list[dict[str, Any]]:
    """The surest mistakes, so many at most: the picture, what it is labelled, what the network says and how surely, and
    its file among `images`. Splits keep no names, so that is found by what is in it; copies in a class are named
    together."""
    chosen = scored.mistakes()[:most].tolist()
    wanted = {_key(scored, index) for index in chosen}
    files: dict[tuple[int, bytes], list[str]] = {}
    for index, file in enumerate(images.files):
        if (key := _key(images, index)) in wanted:
            files.setdefault(key, []).append(file)
    return [
        {
            "picture": _embedded(_png(scored.pixels[index])),
            "label": int(scored.labels[index]),
            "said": int(scored.predictions[index]),
            "confidence": float(scored.confidence[index]),
            "file": " and ".join(files.get(_key(scored, index), [])) or None,
        }
        for index in chosen
    ]


def _doubtful(rows: Sequence[Mapping[str, Any]], images: ImageSet) -> list[dict[str, Any]]:
    """The same of train images whose labels a cross-validation doubts, in its order."""
    return [
        {
            "picture": _embedded(_png(images.train.pixels[row["image"]])),
            "label": images.class_names.index(row["label"]),
            "said": images.class_names.index(row["looks_like"]),
            "own": row["label_probability"],
            "confidence": row["looks_like_probability"],
            "file": row["file"],
        }
        for row in rows
        if row["image"] < len(images.train) and {row["label"], row["looks_like"]} <= {*images.class_names}
    ]


def _key(part: Scored | Images, index: int) -> tuple[int, bytes]:
    return int(part.labels[index]), part.pixels[index].tobytes()


def _png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, C) as a PNG: the first three channels as colours, of fewer the first as grey."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
