"""Learning curves of recorded runs. Reads rows of metrics, never a network."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from fromzero.recipe import Recipe
from fromzero.runs import Row


class Curve(NamedTuple):
    """How a curve is drawn: `key` comes before the quantity in a row; `marker` is of a single epoch, which draws no
    line."""

    key: str
    color: str
    style: str
    marker: str
    label: str


RUNNING = Curve("train/running_", "#c44e52", "--", "x", "train, running (training mode, as Keras prints it)")
CLEAN = Curve("train/", "#c44e52", "-", "o", "train, clean (evaluation mode)")
VALIDATION = Curve("val/", "#1f4e9c", "-", "s", "validation")
CURVES = (RUNNING, CLEAN, VALIDATION)


def _highest_shown(losses: Sequence[float]) -> float | None:
    """Where to cut off losses of which a few are so high that nothing would be seen of the others; None: nowhere."""
    usual = 1.5 * sorted(losses)[9 * len(losses) // 10]
    return usual if max(losses) > 10 * usual > 0 else None


def curves_png(rows: Sequence[Row], recipe: Recipe, title: str, validation: str) -> bytes:
    """Accuracy and loss over the epochs as a PNG: the three curves, the best epoch marked. validation: what its figures
    are, as `splits.validation_label` says."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    most = _highest_shown([row[curve.key + "loss"] for row in rows for curve in CURVES])
    for axes, quantity in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for curve in CURVES:
            values, label = [row[curve.key + quantity] for row in rows], curve.label
            if curve is RUNNING and (recipe.skip_easy or recipe.hardest < 1 or recipe.augment.cutmix):
                label = "train, running (training mode, of images as trained on)"
            marker = curve.marker if len(rows) == 1 else None
            axes.plot(epochs, values, curve.style, color=curve.color, label=label, lw=1.6, marker=marker, ms=4)
        axes.set_xlabel("epoch")
        if len(rows) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.set_ylabel(quantity if quantity == "accuracy" else "loss (cross-entropy, nats)")
        ticks = MaxNLocator(integer=True).tick_values(epochs[0], epochs[-1])
        axes.set_xticks([*(tick for tick in ticks if epochs[0] <= tick < 0.94 * epochs[-1]), epochs[-1]])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy, loss = figure.axes
    unlike = ["smoothed labels"] * bool(recipe.label_smoothing) + ["adjusted outputs"] * bool(recipe.logit_adjustment)
    remarks = [f"the running loss is that of {' and '.join(unlike)}"] if unlike else []
    if most is not None:
        loss.set_ylim(0, most)
        remarks.append("the highest losses are cut off")
    loss.set_title("\n".join(remarks), fontsize=10)
    best = max(rows, key=lambda row: (row["val/accuracy"], -row["val/loss"]))
    place, ring = (best["epoch"], best["val/accuracy"], "o"), "best on validation"
    accuracy.plot(*place, color=VALIDATION.color, mfc="white", ms=6, label=ring)
    accuracy.set_title(
        f"validation: last {rows[-1]['val/accuracy']:.4f}, best {best['val/accuracy']:.4f} (epoch {best['epoch']})",
        fontsize=10,
    )
    # Below both: wherever it lay in a picture of three epochs, it would lie over a curve.
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(
        f"{title} · {recipe.name} · seed {recipe.seed} · {validation}",
        fontsize=10,
        parse_math=False,  # a name may have dollar signs in it
    )
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in another script; boxes stand for it
        figure.savefig(buffer, dpi=110, metadata={"Software": None})
    return buffer.getvalue()
