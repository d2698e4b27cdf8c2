"""What the run folders of a study say: figures of the arms, comparisons, a verdict. Reads folders, trains nothing."""

from __future__ import annotations

import contextlib
import glob
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fromzero import stats
from fromzero.errors import FromzeroError, InputError, counted, nearest, some
from fromzero.networks import num_multiply_adds, num_parameters
from fromzero.provenance import last_machine, last_switches
from fromzero.runs import Row, Run
from fromzero.stats import Comparison, Interval, Verdict
from fromzero.study.cells import Cell, cells_of, differences, read_outcomes
from fromzero.study.definition import (
    CLAIM,
    METRICS,
    MOST_SEEDS,
    Arm,
    Contrast,
    Study,
    figure,
    load_study,
    study_names,
    unit,
)
from fromzero.study.execution import (
    RECORD,
    Description,
    Sweep,
    best_values,
    command,
    is_same_arm,
    read_description,
    read_json,
    recorded_study,
    sweep,
)

LATEST = "9999"
FAR = 6  # of six normal differences, one in two hundred studies has one so far out; of ten, one in seven thousand

FAR_AT_LEAST = 0.02  # of accuracies, or nats: less matters to nobody


class Spread(NamedTuple):
    """Mean and standard deviation over an arm's seeds."""

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"))


@dataclass(frozen=True)
class ArmResult:
    """What became of an arm: `runs` by seed, those that ended. `failures`: cell → why. `value`: the tuned one."""

    arm: Arm
    parameters: int
    multiply_adds: int
    seeds: int
    runs: dict[int, Run]
    failures: dict[str, str]
    value: float | None

    @property
    def n(self) -> str:
        """`6`, or `5 of 6` when runs failed or are missing."""
        return f"{self.seeds}" if len(self.runs) == self.seeds else f"{len(self.runs)} of {self.seeds}"

    @property
    def why_failed(self) -> list[str]:
        """The cells that failed for one reason, and that, in words."""
        reasons = dict.fromkeys(self.failures.values())
        return [f"{some([cell for cell, why in self.failures.items() if why == one])}: {one}" for one in reasons]

    def values(self, metric: str) -> dict[int, float]:
        """Seed → the metric after the last epoch. Raises FromzeroError where a run has not recorded it."""
        if lack := [run.path for run in self.runs.values() if metric not in metrics_of(run.metrics()[-1])]:
            raise FromzeroError(
                f"{lack[0]}: an earlier fromzero did not record its {metric}; remove the folder, and those of other"
                " such runs, and the same command trains them anew"
            )
        return {seed: metric_of(run.metrics()[-1], metric) for seed, run in self.runs.items()}

    def curves(self, metric: str) -> np.ndarray:
        """The metric after every epoch, (runs, epochs)."""
        return np.array([[metric_of(row, metric) for row in run.metrics()] for run in self.runs.values()])

    def summary(self, key: str) -> Spread | None:
        """Spread of a figure of the summaries; None without runs."""
        values = [(run.summary or {})[key] for run in self.runs.values()]
        return Spread.of(values) if values else None


@dataclass(frozen=True)
class ContrastResult:
    """A comparison and what it says. Without two pairs there is no `comparison`. smallest: how far a true difference
    must lie from `null` for this many runs to find it four times out of five; seeds_needed: how many would find the
    one seen, None when more than a study may have; new_images: the interval for new images as well; seeds: of the
    study, some of which may have no pair: then the verdict is undecided, as runs that fail do so because of what is
    compared, and those that are left are another sample; trained_alike: whether all epochs of both runs of each pair
    have the same figures."""

    contrast: Contrast
    comparison: Comparison | None
    adjusted_p: float
    verdict: Verdict
    smallest: float
    seeds_needed: int | None
    new_images: Interval | None
    pairs: dict[int, float]
    seeds: int
    trained_alike: bool = False

    @property
    def outlier(self) -> int | None:
        """The seed whose difference is so far from the median that it alone decides the mean: FAR times as far as any
        other. None where no difference is."""
        values = np.array([*self.pairs.values()])
        if len(values) < stats.FEWEST_PAIRS:
            return None
        distances = np.abs(values - np.median(values))
        second, most = np.sort(distances)[-2:]
        return [*self.pairs][int(distances.argmax())] if most > max(FAR * second, FAR_AT_LEAST) else None

    @property
    def null(self) -> tuple[float, ...]:
        """The differences at the edge of what the claim denies: zero, or where its margin ends."""
        margin = self.contrast.margin
        edges = {"higher": (-margin,), "lower": (margin,), "different": (-margin, margin)}
        return edges[self.contrast.direction] if margin else (0.0,)

    def includes_null(self, interval: Interval) -> bool:
        """Whether an interval leaves open on which side of what the claim denies the difference is."""
        return any(interval.low < edge < interval.high for edge in self.null)

    @property
    def is_at_odds(self) -> bool:
        """Whether p, which decides, says another thing than the interval."""
        is_open = self.telling is not None and self.includes_null(self.telling.difference)
        return self.telling is not None and self.is_whole and is_open != (self.verdict == "undecided")

    @property
    def is_whole(self) -> bool:
        """Whether every seed has its pair."""
        return len(self.pairs) == self.seeds

    @property
    def n(self) -> str:
        """`6`, or `5 of 6` where pairs are missing."""
        return f"{self.seeds}" if self.is_whole else f"{len(self.pairs)} of {self.seeds}"

    @property
    def to_settle(self) -> str:
        """How many seeds would settle a difference of the size seen, two digits of it, as no more is known; empty where
        nothing says."""
        if self.verdict != "undecided" or self.telling is None or len(self.pairs) < stats.FEWEST_PAIRS:
            return ""
        if self.seeds_needed is None:
            return f"over {MOST_SEEDS:,}"
        return f"{float(f'{self.seeds_needed:.2g}'):,.0f}"

    @property
    def remarks(self) -> list[str]:
        """What its figures alone do not say."""
        found = []
        if self.outlier is not None:
            others = [difference for seed, difference in self.pairs.items() if seed != self.outlier]
            one, mean = (
                figure(float(value), self.contrast.metric, sign=True)
                for value in (self.pairs[self.outlier], np.mean(others))
            )
            found.append(
                f"the pair of seed {self.outlier} ({one} {unit(self.contrast.metric)}) is far from all others, whose"
                f" mean is {mean}: look at its two runs"
            )
        if self.trained_alike:
            found.append("every pair of networks is the same one, so what they differ in does nothing here")
        is_settled = self.telling is not None and self.is_whole and self.verdict != "undecided"
        if is_settled and self.new_images is not None and self.includes_null(self.new_images):
            found.append(
                "on other images of the same kind it may be otherwise, as the interval with other images too says"
            )
        if self.contrast.metric == "val/balanced_accuracy":
            found.append(
                "the interval is for other seeds on these validation images, and a class that has few of them there"
                " counts as much as any: other images may well say otherwise"
            )
        return found

    @property
    def telling(self) -> Comparison | None:
        """The comparison, where its pairs tell a spread. Where all are equal, as of networks that all say one class, an
        interval of no width would be a claim."""
        return self.comparison if self.comparison and self.comparison.sd >= 1e-12 else None


@dataclass(frozen=True)
class Result:
    """What a study has found so far."""

    study: Study
    folder: Path
    ran: Description
    arms: dict[str, ArmResult]
    contrasts: tuple[ContrastResult, ...]
    sweep: Sweep
    machines: tuple[str, ...]
    commits: tuple[str, ...]

    @property
    def title(self) -> str:
        """What tells it from other results of its study."""
        others = f", from seed {self.study.first_seed}" * bool(self.study.first_seed)
        return self.study.scale + others + ", tuned" * self.ran.tuned

    @property
    def unused_seed(self) -> int:
        """A seed from which on none was used for this study at this scale, or for what it asks, in folders here."""
        alike = glob.escape(f"{self.study.name}-{self.study.scale}")
        folders = [*self.folder.parent.glob(f"{alike}*"), *self.asked_before]
        cells = (cell for folder in folders for cell in folder.glob("cells/*-seed*"))
        used = [int(seed) for cell in cells if (seed := cell.name.rpartition("-seed")[2]).isdecimal()]
        return max([self.study.seed_range.stop, *(seed + 1 for seed in used)])

    @cached_property
    def asked_before(self) -> dict[Path, range]:
        """Other studies here that had figures of two recipes that the claim compares, on the same images, before this
        one began, and their seeds."""
        asked = [(self.study.arms[c.arm], self.study.arms[c.against]) for c in self.study.contrasts if c.group == CLAIM]
        found = {}
        for record in sorted(self.folder.parent.glob("*/study.json")):
            other = None if record.parent == self.folder else _recorded(record.parent, record.stat().st_mtime_ns)
            if other is None or other[1].fingerprints != self.ran.fingerprints or other[1].tuned != self.ran.tuned:
                continue
            study = other[0]
            theirs = [(study.arms[c.arm], study.arms[c.against]) for c in study.contrasts]
            is_asked = any(_are_same(pair, two) for pair in asked for two in theirs)
            if is_asked and _began(record.parent) < _began(self.folder):
                found[record.parent] = study.seed_range
        return found

    @property
    def num_runs(self) -> str:
        """How many of its runs there are, in words."""
        return f"{sum(len(arm.runs) for arm in self.arms.values())} of {self.study.seeds * len(self.arms)} runs"

    def group(self, name: str) -> list[ContrastResult]:
        """The comparisons that are corrected together; those of CLAIM decide."""
        return [c for c in self.contrasts if c.contrast.group == name]

    @property
    def verdict(self) -> Verdict:
        """Of the claim: supported when all its comparisons are, contradicted when one is; undecided while one has pairs
        missing."""
        said = [c.verdict for c in self.group(CLAIM)]
        if not all(c.is_whole for c in self.group(CLAIM)):
            return "undecided"
        if "contradicted" in said:
            return "contradicted"
        return "supported" if all(v == "supported" for v in said) else "undecided"

    @property
    def is_complete(self) -> bool:
        return all(len(arm.runs) == arm.seeds for arm in self.arms.values())

    @property
    def command(self) -> str:
        """What carries it out anywhere: without options, which are paths and cores of the machine it ran on."""
        return command(self.study, self.ran.tuned)

    @property
    def resume_command(self) -> str:
        """What to type to go on with it here."""
        return command(self.study, self.ran.tuned, self.ran.options)

    @property
    def cautions(self) -> list[str]:
        """Why p may be too small: figures were there when it was decided how many seeds there are, or what is asked."""
        anew, found = f"for a claim begin anew, with other seeds: --first-seed {self.unused_seed}", []
        if before := [str(seeds) for seeds in self.ran.answered if seeds != self.study.seeds]:
            found.append(
                f"this study had figures with {' and '.join(before)} seeds; where those decide how many there are, p is"
                f" too small: {anew}"
            )
        if RECORD in self.ran.changed:
            found.append(
                "runs had ended when this study's record (study.json, or a file beside it) was lost, so what was asked"
                f" of them before is not known; if it was changed because of figures, p is too small: {anew}"
            )
        own = {*self.study.seed_range}
        if alike := [folder.name for folder, seeds in self.asked_before.items() if own & {*seeds}]:
            found.append(
                f"{some(alike)} compared such recipes with the same seeds; where its figures decide what is asked here,"
                f" p is too small: {anew}"
            )
        if parts := " and ".join(part for part in self.ran.changed if part != RECORD):
            found.append(
                f"when this study had figures, its {parts} changed; where those decide what is asked, p is too small:"
                f" {anew}"
            )
        return found

    @property
    def remarks(self) -> list[str]:
        """What its figures alone do not say."""
        found = [
            f"arm {name}: {self.study.tuning.field} = {self.arms[name].value:g} is on the edge of what was tried, so a"
            " better one may lie beyond, and arms may not have been tuned equally well"
            for name in self.sweep
            if self.study.tuning is not None and self.arms[name].value is not None and self.is_on_edge(name)
        ]
        own = {*self.study.seed_range}
        if others := [folder.name for folder, seeds in self.asked_before.items() if not own & {*seeds}]:
            found.append(
                f"{some(others)} compared such recipes with other seeds: its answer counts as much as this one, and"
                " whoever begins anew until a claim is supported finds it too often where there is nothing"
            )
        two = ((f"{c.contrast.arm} against {c.contrast.against}", c.remarks) for c in self.contrasts)
        return [*found, *(f"{names}: {said}" for names, remarks in two for said in remarks)]

    @property
    def is_begun(self) -> bool:
        """Whether a run of it has ended."""
        return any(arm.runs for arm in self.arms.values())

    @property
    def so_far(self) -> str:
        """The verdict, once there is anything to judge."""
        return self.verdict if self.is_begun else "no verdict yet"

    def is_on_edge(self, arm: str) -> bool:
        """Whether a tuned arm's value is the lowest or the highest of those tried."""
        return self.arms[arm].value in (min(self.sweep[arm]), max(self.sweep[arm]))

    @property
    def cell_seconds(self) -> float:
        """Time that the runs took, one after the other."""
        return float(
            sum((run.summary or {})["time/seconds"] for arm in self.arms.values() for run in arm.runs.values())
        )


def list_results(runs_dir: Path) -> list[Result]:
    """What all studies under that runs folder have found, by name. A damaged one is named in a warning and left out."""
    folder, found = runs_dir / "studies", []
    if not folder.is_dir():
        return []
    for path in sorted(folder.iterdir()):
        if (path / "study.json").is_file():
            try:
                found.append(read_result(path))
            except (FromzeroError, OSError) as error:
                warnings.warn(str(error), stacklevel=2)
    return found


def by_lesson(results: Sequence[Result], names: Sequence[str] = ()) -> Iterator[tuple[Study, list[Result]]]:
    """Each study that comes with fromzero, then the user's own, as last run, with its results; names: only these.
    Raises InputError where there is none of a name."""
    known = dict.fromkeys([*study_names(), *(r.study.name for r in results)])
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"no study {unknown[0]!r} comes with fromzero or was run here{nearest(unknown[0], known)}")
    for name in names or known:
        found = [r for r in results if r.study.name == name]
        last = max(found, key=lambda r: (r.folder / "study.json").stat().st_mtime, default=None)
        yield last.study if last else load_study(name), found


def read_result(folder: Path) -> Result:
    """What the study in that folder has found so far."""
    ran = read_description(folder)
    study = recorded_study(folder, ran)
    failures = read_json(folder / "failures.json")
    swept = sweep(study, folder, ran.fingerprints) if ran.tuned else {}
    best = best_values(swept)
    cells = cells_of(study, folder, best)
    arms = {
        name: _arm_result(arm, [cell for cell in cells if cell.arm == name], failures, best.get(name), ran)
        for name, arm in study.arms.items()
    }
    provenances = [run.provenance for arm in arms.values() for run in arm.runs.values()]
    return Result(
        study=study,
        folder=folder,
        ran=ran,
        arms=arms,
        contrasts=_contrasts(study, arms),
        sweep=swept,
        machines=tuple(sorted({_machine(p) for p in provenances})),
        commits=tuple(sorted({_commit(p) for p in provenances})),
    )


@cache
def _recorded(folder: Path, changed: int) -> tuple[Study, Description] | None:
    """The study in a folder whose record was `changed` then; None where it is damaged."""
    try:
        ran = read_description(folder)
        return recorded_study(folder, ran), ran
    except (FromzeroError, OSError):
        return None


def _began(folder: Path) -> str:
    """When the first run of a study began, as text that sorts by time; beyond all times where there is none."""
    found = [LATEST]
    for record in folder.glob("cells/*/provenance.json"):
        with contextlib.suppress(FromzeroError):
            found.append(Run(record.parent).provenance["started"])
    return min(found)


def _are_same(pair: tuple[Arm, Arm], other: tuple[Arm, Arm]) -> bool:
    """Whether two arms are those two, in either order."""
    return any(all(map(is_same_arm, pair, two)) for two in (other, other[::-1]))


def metric_of(row: Row, metric: str) -> float:
    """A metric of one epoch, which is among `metrics_of` it."""
    if metric == "generalisation_gap":
        return float(row["train/accuracy"] - row["val/accuracy"])
    return float(row[metric])


def metrics_of(row: Row) -> dict[str, float]:
    """All metrics of one epoch; of an earlier fromzero's those that it recorded."""
    return {metric: metric_of(row, metric) for metric in METRICS if metric in row or metric == "generalisation_gap"}


def _arm_result(
    arm: Arm, cells: Sequence[Cell], failures: dict[str, str], value: float | None, ran: Description
) -> ArmResult:
    runs, failed = {}, {}
    network = cells[0].recipe.network  # of the tuned value, where there is one
    for cell in cells:
        run = cell.run
        if cell.name in failures:
            failed[cell.name] = failures[cell.name]
        is_swept = value is not None or not ran.tuned
        if not is_swept or not run.is_there:
            continue
        if reasons := differences(cell, ran.fingerprints):
            failed[cell.name] = f"{'; '.join(reasons)}; the same command trains it anew"
        elif run.has_ended:
            runs[cell.seed] = run
            failed.pop(cell.name, None)
    return ArmResult(
        arm=arm,
        parameters=num_parameters(network, ran.image_shape, ran.num_classes),
        multiply_adds=num_multiply_adds(network, ran.image_shape, ran.num_classes),
        seeds=len(cells),
        runs=runs,
        failures=failed,
        value=value,
    )


def _contrasts(study: Study, arms: dict[str, ArmResult]) -> tuple[ContrastResult, ...]:
    compared: list[tuple[Contrast, dict[int, float], Comparison | None]] = []
    for contrast in study.contrasts:
        one, two = (arms[name].values(contrast.metric) for name in (contrast.arm, contrast.against))
        seeds = sorted(one.keys() & two.keys())
        pairs = {seed: one[seed] - two[seed] for seed in seeds}
        comparison = None
        if len(seeds) >= 2:
            values = [one[s] for s in seeds], [two[s] for s in seeds]
            comparison = stats.compare(*values, contrast.direction, contrast.margin)
        compared.append((contrast, pairs, comparison))
    found = []
    for contrast, pairs, comparison in compared:
        group = [(c, x) for c, _, x in compared if c.group == contrast.group]
        if comparison is None:
            found.append(ContrastResult(contrast, None, 1.0, "undecided", np.inf, None, None, pairs, study.seeds))
            continue
        adjusted = stats.holm([1.0 if x is None else x.p for _, x in group])
        p = float(adjusted[[c for c, _ in group].index(contrast)])
        level = stats.LEVEL / len(group)
        needed = stats.pairs_needed(comparison.effect, level, MOST_SEEDS)
        is_whole = comparison.n == study.seeds
        found.append(
            ContrastResult(
                contrast=contrast,
                comparison=comparison,
                adjusted_p=p,
                verdict=stats.verdict(comparison.n, p, comparison.favourable) if is_whole else "undecided",
                smallest=stats.detectable_effect(comparison.n, level) * comparison.sd,
                seeds_needed=None if needed is None else max(needed, comparison.n + 1),
                new_images=_new_images(contrast, sorted(pairs), arms),
                pairs=pairs,
                seeds=study.seeds,
                trained_alike=_trained_alike(arms[contrast.arm], arms[contrast.against], [*pairs]),
            )
        )
    return tuple(found)


def _trained_alike(one: ArmResult, two: ArmResult, seeds: Sequence[int]) -> bool:
    """Whether all epochs of both runs of each of these pairs have the same figures."""
    ours, theirs = ([metrics_of(row) for seed in seeds for row in arm.runs[seed].metrics()] for arm in (one, two))
    both = zip(ours, theirs, strict=False)  # an earlier fromzero recorded less
    return len(ours) == len(theirs) and all(a[key] == b[key] for a, b in both for key in a.keys() & b)


def _new_images(contrast: Contrast, seeds: list[int], arms: dict[str, ArmResult]) -> Interval | None:
    """The interval over seeds and images, where the metric is an accuracy whose outcomes image by image are kept."""
    if contrast.metric != "val/accuracy":
        return None
    rows = [[read_outcomes(arms[name].runs[seed]) for seed in seeds] for name in (contrast.arm, contrast.against)]
    lengths = {None if row is None else len(row) for part in rows for row in part}
    if None in lengths or len(lengths) > 1:
        return None
    return stats.seeds_and_images_interval(*(np.array(part) for part in rows))


def _machine(provenance: dict[str, Any]) -> str:
    here = last_machine(provenance)
    threads = counted(here["threads"], "thread")
    kind, version = here.get("processor", "?"), here.get("torch", "?")
    switched = "".join(f", {name}={value}" for name, value in (last_switches(provenance) or {}).items())
    return f"{kind}, {here['device']}, {threads}, {here['precision']}, torch {version}{switched}"


def _commit(provenance: dict[str, Any]) -> str:
    """fromzero's own commit in short, and whether its files differed from that."""
    if not (commit := provenance["commit"]):
        return "a commit that was not recorded"
    return str(commit[:7]) + " with changes" * commit.endswith("-dirty")
