"""What a study's result says, in words and as data: its verdict, and its comparisons with their figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fromzero import stats
from fromzero.errors import some
from fromzero.runs import Run
from fromzero.stats import Comparison
from fromzero.study.definition import SETTING, TUNING_SEEDS_FROM, Contrast, figure, unit
from fromzero.study.results import ContrastResult, Result, Spread, metrics_of


def answer(result: Result) -> list[str]:
    """What the study says, in words: a line for the verdict, two for each comparison, one for each failure."""
    study = result.study
    lines = [f"{study.name} ({result.title}): {result.verdict}. {study.claim}"]
    unused = result.unused_seed
    lines += [f"  {sentence(c, len(result.group(c.contrast.group)), unused)}" for c in result.contrasts]
    if len(result.arms) > 2 and (means := _means(result)):
        lines.append(f"  {study.metric} by arm, mean ± standard deviation: {means}")
    for name in result.sweep:
        if study.tuning is not None and (best := result.arms[name].value) is not None:
            lines.append(f"  arm {name}: {study.tuning.field} = {best:g}")
    lines += [f"  note: {said}" for said in [*result.cautions, *result.remarks]]
    if at_odds := [f"{c.contrast.arm} against {c.contrast.against}" for c in result.contrasts if c.is_at_odds]:
        lines.append(f"  note: {some(at_odds)}: p decides, not the interval (Student's, for one comparison alone)")
    for arm in result.arms.values():
        lines += [f"  failed: {said}" for said in arm.why_failed]
        if len(arm.runs) < arm.seeds:
            lines.append(f"  arm {arm.arm.name}: n = {arm.n}")
    return lines


def _means(result: Result) -> str:
    """Each arm with its metric over the seeds, the highest first."""
    metric = result.study.metric
    found = [(Spread.of([*arm.values(metric).values()]), name) for name, arm in result.arms.items() if arm.runs]
    return ", ".join(
        f"{name} {figure(spread.mean, metric)}" + ("" if math.isnan(spread.sd) else f" ± {figure(spread.sd, metric)}")
        for spread, name in sorted(found, key=lambda one: -one[0].mean)
    )


def record(result: Result) -> dict[str, Any]:
    """All that `answer` says and what it says it of, for programs: every run's figures after its last epoch, and every
    comparison with its pairs, as JSON data. Shares are from 0 to 1."""
    study, ran = result.study, result.ran
    arms = {
        name: {
            "changes": study.changes_of(arm.arm),
            "like": arm.arm.like,
            "starts_from": arm.arm.after,
            "tuned_value": arm.value,
            "parameters": arm.parameters,
            "multiply_adds": arm.multiply_adds,
            "failures": arm.failures,
            "runs": {seed: _figures(run) for seed, run in arm.runs.items()},
        }
        for name, arm in result.arms.items()
    }
    return {
        "study": study.name,
        "scale": study.scale,
        "tuned": ran.tuned,
        "claim": study.claim,
        "verdict": result.verdict,
        "complete": result.is_complete,
        "cautions": result.cautions,
        "remarks": result.remarks,
        "base": study.base.name,
        "setting": {path: study.first.recipe.fields()[path] for path in SETTING},
        "seeds": study.seeds,
        "first_seed": study.first_seed,
        "images": {"name": ran.images, "train": ran.train_images, "fingerprints": ran.fingerprints, "notes": ran.notes},
        "command": result.command,
        "machines": result.machines,
        "commits": result.commits,
        "arms": arms,
        "sweep": result.sweep,
        "comparisons": [_compared(c) for c in result.contrasts],
    }


def _compared(found: ContrastResult) -> dict[str, Any]:
    known = dict.fromkeys(Comparison._fields) if found.comparison is None else found.comparison._asdict()
    more = {name: getattr(found, name) for name in ("smallest", "seeds_needed", "new_images")}
    if found.comparison is not None and found.telling is None:  # pairs that are all equal tell no spread
        known["difference"] = found.comparison.difference._replace(low=math.nan, high=math.nan)
        more = dict.fromkeys(more)
    return {
        **found.contrast._asdict(),
        "verdict": found.verdict,
        "pairs": found.pairs,
        **known,
        "adjusted_p": found.adjusted_p,
        **more,
    }


def _figures(run: Run) -> dict[str, Any]:
    last, summary = run.metrics()[-1], run.summary or {}
    others = ("best/val/accuracy", "test/accuracy", "test/loss", "time/seconds")
    return metrics_of(last) | {key: summary[key] for key in others}


def sentence(found: ContrastResult, comparisons: int, unused_seed: int) -> str:
    """A comparison: a line with the verdict and its figures, and one with what so many pairs can tell. comparisons:
    that are corrected together; unused_seed: from which on a study can begin anew."""
    c, x = found.contrast, found.comparison
    head = f"{c.arm} against {c.against}, {c.metric}{claimed(c)}: "
    if x is None:
        return head + f"{found.verdict}; n = {found.n} pairs, too few for an interval"
    if found.telling is None:
        mean = figure(x.difference.mean, c.metric, sign=True)
        return (
            head + f"{found.verdict}; its {found.n} pairs all differ by {mean} {unit(c.metric)}, so they tell no spread"
        )
    low, high = figure(x.difference.low, c.metric, sign=True), figure(x.difference.high, c.metric, sign=True)
    approximately, others = "" if x.exact else "about ", ""
    if found.new_images is not None:
        ends = [figure(end, c.metric, sign=True) for end in found.new_images[1:]]
        same = "; with other images too the same"
        others = f"; with other images too: {' to '.join(ends)}" if ends != [low, high] else same
    text = head + (
        f"{found.verdict}; {figure(x.difference.mean, c.metric, sign=True)} ({low} to {high}{others}) {unit(c.metric)},"
        f" n = {found.n}, p {approximately}{x.p:.3g}"
    )
    if comparisons > 1:
        text += f" ({found.adjusted_p:.3g} among {comparisons}, Holm)"
    told = []
    if np.isfinite(x.correlation) and x.n > 2:  # not where an arm's runs are all equal; that of two is one or minus one
        told.append(f"correlation of pairs {correlation(x)}")
    if np.isfinite(found.smallest):
        least = f"{figure(found.smallest, c.metric)} or more{beyond(found)}"
        told.append(f"{x.n} pairs would find a true difference of {least} four times out of five")
    else:
        told.append(f"{x.n} pairs can settle nothing: {stats.fewest_pairs(comparisons)} at least")
    if not found.is_whole:
        told.append("undecided while pairs are missing, as those that are left may be others than those that are not")
    elif found.to_settle:
        about = "" if found.seeds_needed is None else "about "
        fits = found.seeds_needed is not None and unused_seed + found.seeds_needed < TUNING_SEEDS_FROM
        option = f" (--first-seed {unused_seed})" if fits else ""
        settling = f"a study of {about}{found.to_settle} seeds, begun anew with others{option}"
        told.append(f"to settle a difference of this size: {settling}")
    return f"{text}\n    {'; '.join(told)}"


def beyond(found: ContrastResult) -> str:
    """From where `smallest` counts, in words, where that is not zero."""
    if found.null == (0.0,):
        return ""
    sign = "±" if len(found.null) > 1 else "−" if found.null[0] < 0 else "+"
    return f" from {sign}{figure(abs(found.null[0]), found.contrast.metric)}"


def claimed(contrast: Contrast) -> str:
    """The direction claimed, in words."""
    margin = figure(contrast.margin, contrast.metric)
    match contrast.direction, contrast.margin > 0:
        case "higher", True:
            return f" not lower by {margin} or more"
        case "lower", True:
            return f" not higher by {margin} or more"
        case "different", True:
            return f" different by more than {margin}"
    return f" {contrast.direction}"


def correlation(comparison: Comparison) -> str:
    """That of its pairs; a dash where an arm's runs are all equal."""
    if not np.isfinite(comparison.correlation) or comparison.n < 3:
        return "–"
    return f"{comparison.correlation:z.2f}".replace("-", "−")
