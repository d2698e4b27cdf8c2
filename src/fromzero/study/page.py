"""The lessons as a page: claim, arms, picture, comparisons and verdict of each, from the run folders alone."""

from __future__ import annotations

import io
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fromzero import stats
from fromzero.errors import InputError
from fromzero.files import write_atomically
from fromzero.runs import check_named, write_named
from fromzero.study.answers import beyond, claimed, correlation
from fromzero.study.definition import CLAIM, METRICS, TUNING_SEEDS_FROM, Study, figure, study_names, unit
from fromzero.study.results import ArmResult, ContrastResult, Result, Spread, by_lesson
from fromzero.terminal import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f4e9c", "#c44e52", "#55a868", "#8172b2", "#ccb974", "#64b5cd")
MOST_CURVES = len(COLORS)  # arms beyond which curves would only hide each other

OF_LESSONS = """\
# The notes' lessons as experiments

Each lesson of the notes was seen once, in one run. Here each is a claim that could fail: arms that differ in what the
claim names and in nothing else, on the same images, with the same seeds.
"""
OF_OTHERS = """\
# Studies

Each is a claim that could fail: arms that differ in named fields of a recipe, on the same images, with the same seeds.
"""
HOW_TO_READ = """\
- **Figures** are of the last epoch, on validation images, held out of the train images unless a data set has its own.
  Best-epoch figures are chosen among many and flatter; they have a column of their own. Test figures decide nothing.
- **±** is the standard deviation over seeds. A **difference** is the mean over pairs of runs with the same seed, with
  Student's 95 % interval over seeds. *New images* is the interval for other seeds and other images of the same kind.
- **p** is that of the exact two-sided sign-flip test (sampled beyond 16 pairs), adjusted by Holm where a claim has
  several comparisons. The verdict is *supported* or *contradicted*, by the sign, when that p is 0.05 or less, else
  *undecided*; the interval, which is of one comparison alone, does not decide. With fewer than six pairs it is always
  undecided; with six, only all six on one side settle anything.
- **Correlation** says what pairing by seed bought: at 0 nothing. **Seen** is how far the true difference must lie from
  zero, or from the margin that a claim has, for so many pairs to find it four times out of five. **To settle** is how
  many seeds would find a difference of the size seen, in a study begun anew with others (`--first-seed`): seeds that
  are added because of an answer make its p too small, and the same ones make the same runs.
"""
SCALES = """\
- **Screen** is small and short: a quarter of the width, 4,000 train images, six to twenty epochs, about half of the
  dropout; the first line of each table says what else differs from the notes' training. Where the *train* column is far
  below 100, the networks have not yet learned their images by heart, and what pays only then, dropout above all, cannot
  pay: *contradicted* at this scale means "not at this scale", not "not in 50 epochs".
- **Medium** has the notes' layers and dropout, on 5,000 train images for 50 epochs, enough to learn them by heart.
- **parts** and **parts-of-best** are no lessons of the notes: one takes the recipe `quick` apart, at its full width on
  40,000 train images, the other what `best` has beyond `strong`, at a quarter of the width on 8,400.
"""


def write_lessons(results: Sequence[Result], path: Path, names: Sequence[str] = ()) -> None:
    """Write the page of the studies of these names, by default of all, and its pictures into a folder named after it
    beside it. Raises InputError when it cannot be written."""
    check_named(path, ".md")
    if not path.parent.is_dir():
        raise InputError(f"{path}: no folder {path.parent}")
    pictures = path.with_suffix("")
    lessons = list(by_lesson(results, names))
    of_notes = any(study.name in study_names() for study, _ in lessons)
    parts = [f"{OF_LESSONS if of_notes else OF_OTHERS}\n{HOW_TO_READ}{SCALES if of_notes else ''}", _overview(lessons)]
    try:
        pictures.mkdir(exist_ok=True)
        parts += [_lesson(study, found, pictures) for study, found in lessons]
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    write_named(path, "\n".join(parts).encode(), ".md")


def draw_result(result: Result, path: Path) -> None:
    """The claim's metric over the epochs (mean and range of the seeds), where the arms are few, and the differences
    with their pairs and intervals, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = len(result.arms) <= MOST_CURVES
    rows = len(result.contrasts)
    picture = Figure(figsize=(9 if curves else 7, max(2.6, 0.9 + 0.36 * rows)), layout="constrained")
    axes = picture.subplots(1, 2 if curves else 1, squeeze=False)[0]
    if curves:
        metric = result.study.metric
        scale = 100 if METRICS[metric] else 1
        for color, arm in zip(COLORS, result.arms.values(), strict=False):
            if not arm.runs:
                continue
            values = scale * arm.curves(metric)
            epochs = np.arange(1, values.shape[1] + 1)
            axes[0].fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
            marker = "o" if len(epochs) == 1 else None
            axes[0].plot(epochs, values.mean(0), color=color, lw=1.6, label=arm.arm.name, marker=marker)
        axes[0].set_title("mean and range of the seeds", fontsize=8)
        axes[0].set_xlabel("epoch")
        axes[0].set_ylabel(f"{metric}{' (%)' if METRICS[metric] else ' (nats)'}")
        axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes[0].get_legend_handles_labels()[0]:
            axes[0].legend(fontsize=8, frameon=False)
    _draw_differences(axes[-1], result.contrasts)
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    picture.savefig(buffer, dpi=80, metadata={"Software": None})
    write_atomically(path, buffer.getvalue(), alone=False)


def _draw_differences(axes: Axes, contrasts: Sequence[ContrastResult]) -> None:
    heights = range(len(contrasts), 0, -1)
    farthest = 0.0
    for height, found in zip(heights, contrasts, strict=True):
        scale = 100 if METRICS[found.contrast.metric] else 1
        pairs = [scale * d for d in found.pairs.values()]
        farthest = max([farthest, *map(abs, pairs)])
        color = COLORS[0] if found.contrast.group == CLAIM else "#777777"
        axes.plot(pairs, [height] * len(pairs), "|", color=color, ms=9, alpha=0.6)
        if found.comparison is not None:
            mean, low, high = (scale * x for x in found.comparison.difference)
            axes.plot([low, high], [height, height], color=color, lw=2)
            axes.plot(mean, height, "o", color=color, ms=5)
        if found.contrast.margin:  # what the claim is decided from, not zero
            edges = [scale * edge for edge in found.null]
            axes.vlines(edges, height - 0.35, height + 0.35, color="#333333", lw=1, ls=":")
    axes.axvline(0, color="#333333", lw=0.8)
    if farthest:  # the interval of two pairs is so wide that nothing would be seen of them
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -4 * farthest), min(high, 4 * farthest))
    metrics = list(dict.fromkeys(c.contrast.metric for c in contrasts))
    labels = [
        f"{c.contrast.arm} − {c.contrast.against}" + (f"\n{c.contrast.metric}" if len(metrics) > 1 else "")
        for c in contrasts
    ]
    margins = "; dotted: margin" if any(c.contrast.margin for c in contrasts) else ""
    title = f"pairs (ticks), their mean, its 95 % interval{margins}"
    axes.set_title(title, fontsize=8, loc="right")  # so that it reaches over long labels
    axes.set_yticks(list(heights), labels, fontsize=8)
    axes.set_ylim(0.4, len(contrasts) + 0.6)
    axes.set_xlabel("; ".join(f"{metric} ({unit(metric)})" for metric in metrics), fontsize=9)


def _overview(lessons: Sequence[tuple[Study, list[Result]]]) -> str:
    lines = ["| lesson | claim | verdicts |", "|---|---|---|"]
    for study, found in lessons:
        said = "; ".join(f"{r.title}: {_said(r)}{_so_far(r)}" for r in found) or "not run yet"
        lines.append(_row([f"[{study.name}](#{_anchor(study.name)})", _plain(study.claim), said]))
    return "\n".join(lines) + "\n"


def _anchor(heading: str) -> str:
    """By which pages link to a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _said(result: Result) -> str:
    """The verdict, with that of each comparison where they differ: a claim of two parts can hold in one."""
    parts = result.group(CLAIM)
    text = f"**{result.so_far}**"
    if result.is_begun and len({c.verdict for c in parts}) > 1:
        text += " (" + ", ".join(f"{c.contrast.arm} against {c.contrast.against}: {c.verdict}" for c in parts) + ")"
    return text


def _so_far(result: Result) -> str:
    """How many of its runs there are, where some are missing."""
    if result.is_complete:
        return ""
    return f" ({result.num_runs})"


def _lesson(study: Study, results: Sequence[Result], pictures: Path) -> str:
    parts = [f"## {study.name}\n", f"**{_plain(study.claim)}**\n"]
    if study.notes:
        parts.append(f"The notes: “{_plain(study.notes)}”.\n")
    if study.remark:
        parts.append(_plain(study.remark.strip()) + "\n")
    if not results:
        parts.append(f"Not run yet: `fromzero study {study.name}`\n")
    for result in results:
        picture = pictures / f"{result.folder.name}.png"
        draw_result(result, picture)
        place = urllib.parse.quote(f"{pictures.name}/{picture.name}")
        parts += [_section(result), f"![{name_of(result)}]({place})\n"]
    return "\n".join(parts)


def _section(result: Result) -> str:
    study = result.study
    took = f"{duration(result.cell_seconds)} of runs, {duration(result.ran.seconds)} by the clock"
    of = f" of {result.ran.images}" if result.ran.images else ""
    later = f" from {study.first_seed} on" if study.first_seed else ""
    ran = f" · {'; '.join(result.machines)} · fromzero at {', '.join(result.commits)}" if result.is_begun else ""
    lines = [
        f"### {name_of(result)}: {result.so_far}{_so_far(result)}\n",
        f"`{result.command}` · n = {study.seeds} seeds{later} · {result.ran.train_images:,} train images{of}, "
        f"{study.setting(result.ran.own_validation)} · {took}{ran}\n",
        *(f"Of the images: {note}.\n" for note in result.ran.notes),
    ]
    lines += [_arms_table(result), _contrasts_table(result)]
    lines += [f"{said[0].upper()}{said[1:]}.\n" for said in [*result.cautions, *result.remarks]]
    if result.ran.tuned:
        lines.append(_sweep_table(result))
    for arm in result.arms.values():
        if len(arm.runs) < arm.seeds:
            why = "; ".join(arm.why_failed) or "not run to the end yet"
            lines.append(f"**{arm.arm.name}: n = {arm.n}** ({why}).\n")
    return "\n".join(lines)


def name_of(result: Result) -> str:
    """The heading of a result within its lesson."""
    return f"{result.study.name}, {result.title}"


def _arms_table(result: Result) -> str:
    metric = result.study.metric
    extra = [] if metric == "val/accuracy" else [metric]
    head = ["arm", "what it is", "parameters", "M multiply-adds", "n", *extra, "val, last", "val, best epoch"]
    lines = [_row([*head, "train", "test"]), _row(["---"] * (len(head) + 2))]
    for arm in result.arms.values():
        changes = result.study.in_words(arm.arm, "`")
        if arm.value is not None and result.study.tuning:
            changes += f"; tuned: `{result.study.tuning.field} = {arm.value:g}`"
        cells = [arm.arm.name, changes, f"{arm.parameters:,}", f"{arm.multiply_adds / 1e6:.1f}", arm.n]
        for key in extra:
            cells.append(_spread(arm, key))
        for key in ("val/accuracy", "best/val/accuracy", "train/accuracy", "test/accuracy"):
            found = arm.summary(key)
            cells.append("–" if found is None else _mean_and_sd(found, 100, 2))
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _spread(arm: ArmResult, metric: str) -> str:
    values = list(arm.values(metric).values())
    scale, digits = (100, 2) if METRICS[metric] else (1, 4)
    return _mean_and_sd(Spread.of(values), scale, digits) if values else "–"


def _mean_and_sd(found: Spread, scale: float, digits: int) -> str:
    sd = f"{scale * found.sd:.{digits}f}" if np.isfinite(found.sd) else "–"
    return f"{scale * found.mean:.{digits}f} ± {sd}".replace("-", "−")


def _contrasts_table(result: Result) -> str:
    head = [
        "comparison",
        "claimed",
        "difference (95 %)",
        "new images",
        "pairs",
        "p",
        "correlation",
        "seen",
        "to settle",
    ]
    lines = [_row([*head, "says"]), _row(["---"] * (len(head) + 1))]
    groups = list(dict.fromkeys(c.contrast.group for c in result.contrasts))
    for group in groups:
        members = result.group(group)
        for found in members:
            c, x = found.contrast, found.telling
            name = f"{c.arm} − {c.against}" + ("" if group == CLAIM else f" ({group})")
            what = f"{c.metric}{claimed(c)}"
            if x is None:
                mean = "–"
                if found.comparison is not None:
                    mean = figure(found.comparison.difference.mean, c.metric, sign=True) + " in every pair"
                lines.append(_row([name, what, mean, "–", found.n, "–", "–", "–", "–", found.verdict]))
                continue
            p = f"{found.adjusted_p:.3g}" if x.exact else f"≈ {found.adjusted_p:.3g}"
            p += f" (one of {len(members)})" if len(members) > 1 else ""
            seen = (
                figure(found.smallest, c.metric) + beyond(found)
                if np.isfinite(found.smallest)
                else (f"nothing: {stats.fewest_pairs(len(members))} pairs at least")
            )
            wide = "–" if found.new_images is None else _interval(*found.new_images[1:], c.metric)
            mean = figure(x.difference.mean, c.metric, sign=True)
            low_high = _interval(x.difference.low, x.difference.high, c.metric)
            cells = [name, what, f"**{mean}** ({low_high})", wide, found.n, p, correlation(x), seen]
            lines.append(_row([*cells, found.to_settle or "–", f"**{found.verdict}**"]))
    return "\n".join(lines) + "\n"


def _sweep_table(result: Result) -> str:
    """Every value tried with its validation accuracy, the best in bold, and whether it lies on the edge."""
    tuning = result.study.tuning
    assert tuning is not None
    lines = [
        f"The sweep: `{tuning.field}`, {tuning.seeds} seeds from {TUNING_SEEDS_FROM} on for each value, validation"
        " accuracy after the last epoch.\n",
        _row(["arm", "value: mean (each seed)", "best"]),
        _row(["---"] * 3),
    ]
    for arm, scores in result.sweep.items():
        best = result.arms[arm].value
        tried = []
        for value, row in scores.items():
            ended = [x for x in row if x is not None]
            if len(ended) == len(row):
                text = f"{100 * np.mean(ended):.2f} ({', '.join(f'{100 * x:.2f}' for x in ended)})"
            else:
                text = f"{len(ended)} of {len(row)} ended" if ended else "diverged or missing"
            tried.append(f"**{value:g}: {text}**" if value == best else f"{value:g}: {text}")
        if best is None:
            said = "not swept to the end"
        else:
            edge = result.is_on_edge(arm)
            said = f"{best:g}" + (", **on the edge of what was tried**" if edge else ", inside what was tried")
        lines.append(_row([arm, "; ".join(tried), said]))
    return "\n".join(lines) + "\n"


def _interval(low: float, high: float, metric: str) -> str:
    return f"{figure(low, metric, sign=True)} to {figure(high, metric, sign=True)}"


def _plain(text: str) -> str:
    """What somebody wrote, with nothing in it that Markdown takes for a tag."""
    return text.replace("<", r"\<")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
