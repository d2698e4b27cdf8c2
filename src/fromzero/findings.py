"""What a diagnosis says beside its findings, and what it leaves in the run folder: diagnosis.json, and for each remedy
the study that tests it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any

import tomli_w

from fromzero.changes import usual_epochs
from fromzero.data import split_recorded
from fromzero.diagnosis import (
    BALANCED,
    COPIES,
    EXPLAINS,
    LATE_GAIN,
    RULES,
    Finding,
    few_are_wrong,
    hardly_mistaken,
    hidden_by_few,
    large_gap,
    loss_rise,
    mirrors_one_way_round,
    rates_tried,
    share_of_wrong_labels_seen,
    untried,
    why_labels_cannot_be_judged,
)
from fromzero.errors import FromzeroError, command_line, counted
from fromzero.evidence import SMALL_GAP, Copies, Evidence, Measures, late_gain
from fromzero.files import csv_text, finite, write_atomically, write_json
from fromzero.recipe import Recipe
from fromzero.runs import FOLDS, LABELS, Row, Run
from fromzero.terminal import duration

STUDY_SEEDS = 6  # the fewest pairs that can settle anything
LATEST_START = 900  # behind higher seeds a study begins with 0: those from 1,000 on are for tuning
SHOWS_FEW = 0.1  # of the labels; where only more wrong ones would show, that is said
FEW_IMAGES = 5000  # the recipe few is as good as strong from 4,000, and took a third of the time (docs/results.md)


def remarks(run: Run, evidence: Evidence, found: Sequence[Finding]) -> list[str]:
    """What else whoever reads the findings should know, a sentence or two each: which problems could not be judged and
    why, which were looked for and not found, and what may reach more where no fault is found."""
    named = {finding.name for finding in found}
    said: list[str] = []
    others = [name for name in RULES if name not in named]  # which were looked for and, in the end, not found

    def leave_out(names: Collection[str], why: str) -> None:
        others[:] = [name for name in others if name not in names]
        said.append(why)

    labels_matter = "label-noise" in others and not hardly_mistaken(evidence)  # else wrong ones are too few to matter
    cut_short = "" if "stopped-early" in named else _cut_short(run.recipe, evidence.rows[-1])
    if cut_short:
        leave_out({"stopped-early"}, cut_short)
    if "validation-too-small" in named and (hidden := _hidden(evidence, others, labels_matter)):
        leave_out(hidden, f"With so few validation images this could not be judged: {', '.join(hidden)}.")
    if labels_matter:
        if why := why_labels_cannot_be_judged(evidence):
            others.remove("label-noise")
        said += _of_labels(run, evidence, why, named)
    elif judged_all := _cross_validated(run):
        said.append(judged_all)
    said += _of_copies(run, evidence, is_found="copies" in named)
    if "mirrored-images" in others and mirrors_one_way_round(evidence) and few_are_wrong(evidence):
        leave_out({"mirrored-images"}, _of_mirroring(evidence))
    if skipped := [name for name in untried(evidence) if name in others]:
        made = "the steps that would show it could not be made or came to nothing"
        leave_out(skipped, f"Not judged, as {made}: {', '.join(skipped)}.")
    if evidence.measures.rates_tell and not {"rate-too-high", "rate-too-low"} & named:
        tried = rates_tried(evidence)
        said.append(f"Other rates were tried: {tried}. Short trainings favour high rates, so these call none better.")
    if origin := run.provenance["from"]:
        began = f"The run began with the weights of {origin['run']}:"
        said.append(f"{began} its first steps were not tried again, and a study begins anew.")
        said += [f"Figures may flatter: {doubt}." for doubt in run.doubts]
    if "overfitting" not in named and evidence.gap > SMALL_GAP:
        said.append(_of_gap(evidence, was_judged="overfitting" in others))
    explained = {name for cause in named for name in EXPLAINS.get(cause, ())}
    looked_for = ", ".join(name for name in others if name not in explained)
    if found:
        said.append(f"Not found: {looked_for}.")
    else:
        said.insert(bool(cut_short), f"Nothing found of: {looked_for}.")
    if hidden := [name for name in others if name in explained]:
        said.append(f"Not found, or explained by the above: {', '.join(hidden)}.")
    if run.summary is None:
        said.insert(0, f"The run has not ended; if it was stopped, {run.resume_command} trains it on.")
    elif not cut_short and named <= {"validation-too-small"} and (more := _other_recipe(run, evidence)):
        said.append(more)
    return said


def _hidden(evidence: Evidence, others: Sequence[str], labels_matter: bool) -> list[str]:
    """Which of the others few validation images may hide."""
    hideable = {*hidden_by_few(evidence)} - ({"label-noise"} if labels_matter else set())
    hidden = [name for name in others if name in hideable]
    if evidence.measures.mirror_accuracy is not None:
        hidden += [name for name in untried(evidence) if name == "mirrored-images" and name in others]
    return hidden


def _of_labels(run: Run, evidence: Evidence, why: str, named: Collection[str]) -> list[str]:
    """Whether wrong labels would be seen, and what looks for them. why: they cannot be judged, if they cannot."""
    labels = ""
    if why:
        labels = f"Wrong labels cannot be detected in this run: {why}."
    elif (share := share_of_wrong_labels_seen(evidence)) > SHOWS_FEW:
        labels = (
            f"With {evidence.measures.num_validation:,} validation images, wrong labels would be found four times out"
            f" of five where they are {share:.0%} or more."
        )
        if {"stopped-early", "underfitting"} & {*named}:
            labels += " Even fewer can keep a network from learning its train images."
    if judged_all := _cross_validated(run):
        return [*filter(None, [labels]), judged_all]
    if not labels:
        return []
    shown = "."
    if why and run.recipe.validation.source != "test":  # whose pictures nobody is shown
        report = command_line("fromzero", "report", run.path)
        shown = f"; some may be among the surest mistakes on validation, which {report} shows."
    cross_validate = command_line("fromzero", "cross-validate", run.path)
    return [f"{labels} {cross_validate} looks for them in all train images{shown}"]


def _of_copies(run: Run, evidence: Evidence, *, is_found: bool) -> list[str]:
    """What is known of copies between the splits, where they are no finding."""
    copies, said = evidence.measures.copies, []
    if copies.found and not is_found:
        of = [f"{copied.near} of {copied.of:,} {split}" for split, copied in copies.splits.items() if copied.near]
        said.append(f"{' and '.join(of)} images may be train images, too: see the run's {COPIES}.")
    if held_out := _copies_held_out(run):
        said.append(held_out)
    if not copies.by_looks:
        said.append(
            "Only copies to the byte were looked for: the images are too small, or too much like those of other"
            " classes, to tell copies by their looks."
        )
    return said


def _of_mirroring(evidence: Evidence) -> str:
    """That mirror images can be told apart, where too few are mistaken to say what mirroring costs."""
    return (
        f"Half of the train images are mirrored, and a small network tells {evidence.measures.mirror_accuracy:.0%}"
        " of these images and their mirror images apart; but too few are mistaken to tell whether that costs"
        " anything: --augment.flip none would say."
    )


def _of_gap(evidence: Evidence, *, was_judged: bool) -> str:
    """What a gap between train and validation accuracy means that is not called overfitting."""
    gap = evidence.last["train/accuracy"] - evidence.last["val/accuracy"]
    said = f"Train accuracy is {gap:.2f} above validation accuracy; more images would probably narrow that."
    if not was_judged:
        return said
    rise, enough = loss_rise(evidence)
    images = counted(evidence.measures.num_validation, "validation image")
    here = f"by {rise:.3f}" if rise > 0 else "not at all"
    return (
        f"{said} It is not called overfitting: that takes a gap of {large_gap(evidence)[1]:.2f} with {images} (here"
        f" {evidence.gap:.2f}, over the last epochs, classes weighted as in train), or a validation loss that has risen"
        f" by {enough:.3f} (here {here})."
    )


def _cross_validated(run: Run) -> str:
    """What was said of all train images; nothing where it was not asked of trainings like this, or is damaged."""
    try:
        result = run.cross_validated(run.recipe.epochs)
    except FromzeroError:
        return ""
    if result is None:
        return ""
    (low, high), labels = result["interval"], run.path / FOLDS / LABELS
    return (
        f"Cross-validation said: accuracy {result['accuracy']:.4f} ({low:.4f}–{high:.4f}) on {result['images']:,} train"
        f" images; the least likely labels come first in {labels}."
    )


def _cut_short(recipe: Recipe, last: Row) -> str:
    """That the recipe of this name has more epochs, if it has and there are mistakes left."""
    usual = usual_epochs(recipe)
    if usual <= recipe.epochs or last["val/accuracy"] == 1:
        return ""
    return f"{recipe.name} has {usual} epochs, this run {recipe.epochs}: more of them may reach more."


def _other_recipe(run: Run, evidence: Evidence) -> str:
    """What may reach more where no fault is found, if anything is known to."""
    recipe, rows = run.recipe, evidence.rows
    if rows[-1]["val/accuracy"] == 1:
        return ""
    rising = ""
    by_heart = evidence.gap > SMALL_GAP  # of which more epochs bring more
    if recipe.schedule.name == "constant" and not by_heart and (gain := late_gain(rows)) > LATE_GAIN:
        rising = (
            f"Its train accuracy rose by {100 * gain:.0f} points in the last quarter of its epochs: more of them"
            f" ({run.resume_command} --epochs {2 * recipe.epochs}) may reach more. "
        )
    if recipe.network.batch_norm:
        return rising.rstrip()
    images = rows[-1]["step"] / max(rows[-1]["epoch"], 1) * recipe.batch_size
    other = "few" if images < FEW_IMAGES else "strong"
    return (
        f"{rising}Another recipe may still reach more: --recipe {other} has what helped most on CIFAR-10, a rate that"
        " falls, Muon and batch normalisation."
    )


def _copies_held_out(run: Run) -> str:
    """How many test pictures are validation pictures, too, which nothing was trained on."""
    rows = [row for row in run.pictures if row.get("sha256")]
    of = {split: {row["sha256"] for row in rows if row.get("split") == split} for split in ("train", "validation")}
    count = sum(row.get("split") == "test" and row["sha256"] in of["validation"] - of["train"] for row in rows)
    if not count:
        return ""
    is_one = "test pictures are validation pictures" if count > 1 else "test picture is a validation picture"
    return f"{count:,} {is_one}, too, to the byte: not trained on, so not counted among the copies."


def diagnosis_header(run: Run, rows: Sequence[Row], beyond: str = "") -> str:
    """What is being looked at. beyond: how far the weights have come, where that is beyond the last row."""
    row = rows[-1]
    notes = "".join(f"\n  note: {note}" for note in run.provenance["data"].get("notes", ()))
    if beyond:
        notes += f"\n  note: looked at are the weights after {beyond}, scored anew"
    running = f" (running {row['train/running_accuracy']:.4f})" if row["epoch"] else ""  # of none, it was not measured
    return (
        f"{run.path}: {run.recipe.name}, after epoch {row['epoch']}: train {row['train/accuracy']:.4f}{running},"
        f" val {row['val/accuracy']:.4f}{notes}"
    )


def diagnosis_text(
    run: Run,
    found: Sequence[Finding],
    studies: Mapping[str, Path],
    remarks: Sequence[str],
    columns: int = 100,
) -> str:
    """The findings in words: what is wrong, what shows it, what to do, and how to test that; then the remarks."""
    lines: list[str] = []

    def say(label: str, text: str, *, whole: bool = False) -> None:
        hanging = " " * len(label)
        folded = wrap(
            text,
            columns,
            initial_indent=label,
            subsequent_indent=hanging,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines.extend([label + text] if whole else folded)

    for number, finding in enumerate(found, 1):
        say(f"{number}. ", f"{finding.name}: {finding.meaning}")
        say("   shown by: ", finding.evidence)
        say("   try:      ", finding.remedy)
        if finding.name in studies:
            say("   test it:  ", study_command(run, studies[finding.name]), whole=True)  # to be copied
            say("             ", f"{finding.changed}; {study_cost(run, finding.changes)}")
    for remark in remarks:
        say("", remark)
    return "\n".join(lines)


def study_cost(run: Run, changes: Mapping[str, Any]) -> str:
    """How many runs a study of these changes has and, where that can be told, how long they take."""
    pairs, longer = f"{STUDY_SEEDS} pairs of runs", (seconds := run.seconds)
    if not seconds or {"network.channels", "batch_size"} & changes.keys():
        return pairs
    took = f"each about as long as this one ({duration(seconds)})"
    if "epochs" in changes:
        longer = seconds * changes["epochs"] / run.recipe.epochs
        took = f"one about as long as this one ({duration(seconds)}), the other {duration(longer)}"
    return f"{pairs}, {took}: some {duration(STUDY_SEEDS * (seconds + longer))} of training in all"


def study_command(run: Run, study: Path) -> str:
    """The command that carries out a study of the run, whose runs go where the run is."""
    if run.path.parent.resolve() == Path("runs").resolve():
        return command_line("fromzero", "study", study)
    return command_line("fromzero", "study", study, "--runs-dir", run.path.parent)


def remedy_study(finding: Finding, recipe: Recipe, dataset: str | None = None) -> str:
    """The study that tests a finding's remedy, as `study_text` has it: the recipe as it is and remedied."""
    what = "the mean of the classes' validation accuracies" if finding.metric == BALANCED else "validation accuracy"
    claim = f"With {finding.changed} {what} is higher than without (against {finding.name})."
    arms = {"as-it-is": {}, "remedied": finding.changes}
    return study_text(claim, recipe, arms, dataset, recipe.seed, finding.metric)


def study_text(
    claim: str,
    recipe: Recipe,
    arms: Mapping[str, Mapping[str, Any]],
    dataset: str | None,
    last_seed: int,
    metric: str = "val/accuracy",
) -> str:
    """A study, as TOML beside the recipe of a run: arms that change it in these fields, with the same seeds, on
    held-out train images. dataset: where they are, if not where the recipe says; last_seed: up to which seeds were
    seen, and so do not count for what was asked because of them; metric: what is compared."""
    unseen = last_seed + 1
    common: dict[str, Any] = {"epochs": recipe.epochs}  # which an extension changes in the run's recipe
    if dataset is not None:
        common["dataset"] = dataset
    if recipe.validation.source != "split":
        common["validation"] = {"source": "split"}
    return tomli_w.dumps(
        {
            "claim": claim,
            "metric": metric,
            "base": "recipe.toml",
            "recipe": common,
            "arms": {name: dict(changes) for name, changes in arms.items()},
            "scale": {"screen": {"seeds": STUDY_SEEDS} | ({"first_seed": unseen} if unseen < LATEST_START else {})},
        }
    )


def images_of(run: Run, source: str) -> str | None:
    """What a study's recipe calls a run's images, which are at `source` now: by the whole path, as the run's recipe
    names a folder from wherever it was begun, and CIFAR-10 may lie anywhere; None for digits, which come with a
    library, and where the path is no text."""
    recorded = run.provenance["data"]
    name, options = split_recorded(recorded["name"], recorded["source"])
    return None if name == "digits" or not source.isprintable() else source + options


def _copies_csv(copies: Copies) -> str:
    """A line for each copy: its split, its file, the train file that it is a copy of, and whether to the byte."""
    lines = ((copy.split, copy.file, copy.train_file, "yes" if copy.exact else "nearly") for copy in copies.found)
    return csv_text(("split", "file", "train_file", "to_the_byte"), lines)


def write_findings(
    run: Run, found: Sequence[Finding], said: Sequence[str], measures: Measures, source: str, epoch: int, steps: int = 0
) -> dict[str, Path]:
    """Write diagnosis.json into the run folder, and for each finding that a recipe field can mend the study that tests
    it: name → its file. said: the remarks; source: where the images are now; epoch, steps: after which, and how
    many more of the next, the run was looked at. Raises FromzeroError where the folder cannot be written."""
    recipe, dataset = run.recipe, images_of(run, source)
    studies: dict[str, Path] = {}
    copies = measures.copies
    known = asdict(measures) | {"trials": {f"{factor:g}": trial for factor, trial in measures.trials.items()}}
    known["copies"] = {"splits": copies.splits, "by_looks": copies.by_looks}  # those found have their own file
    try:
        for finding in found:
            if finding.changes:
                path = run.path / f"{run.name}-{finding.name}.toml"
                write_atomically(path, remedy_study(finding, recipe, dataset).encode(), alone=False)
                studies[finding.name] = path
        if copies.found:
            write_atomically(run.path / COPIES, _copies_csv(copies).encode("utf-8", "surrogateescape"), alone=False)
        findings = [asdict(one) | {"study": studies[one.name].name if one.name in studies else None} for one in found]
        content = {"epoch": epoch, "steps": steps, "findings": findings, "remarks": list(said)}
        content["cross_validated"] = (run.path / FOLDS / "result.json").exists()
        content["measures"] = finite(known)
        write_json(run.path / "diagnosis.json", content, alone=False)
    except OSError as error:
        raise FromzeroError(
            f"{run.path}: cannot be written: {error.strerror}, so diagnosis.json was not; free space, make the"
            " folder writable, or copy it elsewhere"
        ) from None
    return studies
