"""Pictures of recorded runs, and a page about one. Reads what was recorded and what a network said, never a network."""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fromzero.data import Images, ImageSet
from fromzero.files import write_atomically
from fromzero.recipe import Recipe
from fromzero.runs import Row, Run
from fromzero.stats import wilson_interval

MOST_MISTAKES = 24  # pictures of each split
MOST_CLASSES = 25  # whose confusions are shown as a matrix
MOST_CONFUSIONS = 10
CALIBRATION_BINS = 10

CURVES = {
    "running": ("#c44e52", "--", "train, running (training mode, as Keras prints it)"),
    "clean": ("#c44e52", "-", "train, clean (evaluation mode, fixed subset)"),
    "val": ("#1f4e9c", "-", "validation"),
}
MARKERS = {"running": "x", "clean": "o", "val": "s"}  # of a single epoch, which draws no line
KEYS = {
    "loss": {"running": "train/running_loss", "clean": "train/loss", "val": "val/loss"},
    "accuracy": {"running": "train/running_accuracy", "clean": "train/accuracy", "val": "val/accuracy"},
}


def validation_label(recipe: Recipe, own: bool) -> str:
    """What the validation figures of a run are, to be said wherever they appear. own: whether its data set has
    validation images."""
    if recipe.validation.source == "test":
        return "validation = the test images, as in the notes"
    if own:
        return "validation = the data set's own validation images"
    return f"validation = {100 * recipe.validation.fraction:.4g}% of the train images, held out"


def counted(number: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Scored(NamedTuple):
    """Images and what a network says of them: pixels uint8 (N, H, W, C), labels int64 (N,), probabilities float32 (N,
    classes)."""

    pixels: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray

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
    def loss(self) -> float:
        """Mean cross-entropy in nats; of a probability that underflowed, the largest that a float can tell."""
        own = self.probabilities[np.arange(len(self.labels)), self.labels].astype(float)
        return float(-np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean())

    def confusions(self) -> np.ndarray:
        """How many images of each class (row) were taken for each class (column), int64 (classes, classes)."""
        classes = self.probabilities.shape[1]
        return np.bincount(self.labels * classes + self.predictions, minlength=classes**2).reshape(classes, classes)

    def mistakes(self) -> np.ndarray:
        """Indices of the images whose class was not predicted, those that the network is surest of first."""
        wrong = np.flatnonzero(~self.right)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]


class Bin(NamedTuple):
    """Of the images that a network is so sure of: from which confidence to which, how many, the mean, and the share
    that is right; both NaN without images."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def calibration(scored: Scored) -> tuple[list[Bin], float]:
    """Bins of equal width from 0 to 1, and the expected calibration error: the distance between confidence and
    accuracy, its mean over the images (Guo et al., 2017, section 2)."""
    places = np.minimum((scored.confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins, error = [], 0.0
    for place in range(CALIBRATION_BINS):
        inside = places == place
        count = int(inside.sum())
        confidence = float(scored.confidence[inside].mean(dtype=float)) if count else math.nan
        accuracy = float(scored.right[inside].mean()) if count else math.nan
        bins.append(Bin(place / CALIBRATION_BINS, (place + 1) / CALIBRATION_BINS, count, confidence, accuracy))
        error += count / len(places) * abs(confidence - accuracy) if count else 0.0
    return bins, error


def run_page(
    run: Run,
    rows: Sequence[Row],
    scored: Mapping[str, Scored],
    images: ImageSet,
    validation: str,
    weights: str,
    diagnosis: Mapping[str, Any] | None,
) -> str:
    """A run as one HTML page that needs nothing else.

    rows: up to the weights; scored: a part of the `train` images, the `val` and the `test` images; weights: which ones;
    diagnosis: what diagnosis.json holds. Pictures of mistakes are train and validation images only: who looks at test
    images one by one and changes something has no test set left."""
    import jinja2

    test, names = scored["test"], images.class_names
    confusions = test.confusions()
    given, said, found = confusions.sum(1), confusions.sum(0), np.diag(confusions)
    wrong = confusions - np.diag(found)
    commonest = [np.unravel_index(place, wrong.shape) for place in np.argsort(-wrong, axis=None, kind="stable")]
    bins, error = calibration(test)
    shown = [
        split for split in scored if split == "train" or (split == "val" and run.recipe.validation.source != "test")
    ]
    template = resources.files("fromzero").joinpath("report.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals.update(counted=counted, isnan=math.isnan, told=_told, quote=shlex.quote, zip=zip)
    return environment.from_string(template).render(
        run=run,
        recipe=run.recipe,
        provenance=run.provenance,
        rows=rows,
        weights=weights,
        validation=validation,
        names=names,
        curves=_embedded(curves_png(rows, run.recipe, run.name, validation)) if rows[-1]["epoch"] else None,
        scores={
            split: (s.accuracy, *wilson_interval(s.accuracy, len(s.labels)), s.loss, len(s.labels))
            for split, s in scored.items()
        },
        diagnosis=diagnosis,
        by_class=[(int(n), _share(right, n), _share(right, k)) for n, k, right in zip(given, said, found, strict=True)],
        commonest=[(int(a), int(b), int(wrong[a, b])) for a, b in commonest[:MOST_CONFUSIONS] if wrong[a, b]],
        matrix=confusions.tolist() if len(names) <= MOST_CLASSES else None,
        bins=[one for one in bins if one.images],
        calibration_error=error,
        source=images.source if images.train.files else None,
        mistakes={split: _mistakes(scored[split], images) for split in shown},
    )


def _told(value: Any) -> str:
    """A value of a recipe or of provenance in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(f"[{_told(inner)}]" if isinstance(inner, list | tuple) else _told(inner) for inner in value)
    return {None: "–", True: "yes", False: "no"}.get(value, str(value)) if value in (None, True, False) else str(value)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _mistakes(scored: Scored, images: ImageSet) -> list[dict[str, Any]]:
    """The surest mistakes: the picture, what it is labelled, what the network says and how surely, and its file."""
    chosen = scored.mistakes()[:MOST_MISTAKES].tolist()
    wanted = {_key(scored, index) for index in chosen}
    # Splits keep no files, so they are found by what is in them; copies of a picture in one class are as good.
    parts = [part for part in (images.train, images.validation, images.test) if part is not None and part.files]
    files = {
        key: file for part in parts for index, file in enumerate(part.files) if (key := _key(part, index)) in wanted
    }
    return [
        {
            "picture": _embedded(_png(scored.pixels[index])),
            "label": int(scored.labels[index]),
            "said": int(scored.predictions[index]),
            "confidence": float(scored.confidence[index]),
            "file": files.get(_key(scored, index)),
        }
        for index in chosen
    ]


def _key(part: Scored | Images, index: int) -> tuple[int, bytes]:
    return int(part.labels[index]), part.pixels[index].tobytes()


def _png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, C) as a PNG: grey of one channel, else the first three as colours."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def draw_curves(rows: Sequence[Row], recipe: Recipe, title: str, validation: str, path: Path) -> None:
    """Write what `curves_png` draws."""
    write_atomically(path, curves_png(rows, recipe, title, validation))


def curves_png(rows: Sequence[Row], recipe: Recipe, title: str, validation: str) -> bytes:
    """Accuracy and loss over the epochs as a PNG: the three curves, the best and the last epoch marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, quantity in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for curve, (color, style, label) in CURVES.items():
            values = [row[KEYS[quantity][curve]] for row in rows]
            if curve == "running" and (recipe.skip_easy or recipe.hardest < 1):
                label = "train, running (training mode, of images trained on)"
            marker = MARKERS[curve] if len(rows) == 1 else None
            axes.plot(epochs, values, style, color=color, label=label, lw=1.6, marker=marker, ms=4)
        axes.set_xlabel("epoch")
        if len(rows) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.set_ylabel(quantity if quantity == "accuracy" else "loss (cross-entropy, nats)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy, loss = figure.axes
    best = max(rows, key=lambda row: row["val/accuracy"])
    accuracy.plot(best["epoch"], best["val/accuracy"], "o", color=CURVES["val"][0], mfc="white", ms=6)
    accuracy.set_title(
        f"validation: last {rows[-1]['val/accuracy']:.4f}, best {best['val/accuracy']:.4f} (epoch {best['epoch']})",
        fontsize=10,
    )
    # Below both: wherever it lay in a picture of three epochs, it would lie over a curve.
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(
        f"{title} · {recipe.name.replace('$', chr(92) + '$')} · seed {recipe.seed} · {validation}",
        fontsize=10,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    return buffer.getvalue()
