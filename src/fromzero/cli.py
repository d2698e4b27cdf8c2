"""The command line: parse, call, print. Thin; imports torch only when a command needs it."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fromzero.arguments import DEFAULT_RECIPE, parse
from fromzero.changes import in_words, notes_on_changes
from fromzero.errors import (
    FromzeroError,
    InputError,
    NonFiniteError,
    StoppedError,
    command_line,
    counted,
    one_line,
    printable,
    some,
)
from fromzero.recipe import (
    Recipe,
    field_types,
    load_recipe,
    parse_value,
    recipe_names,
    recipe_purpose,
)

if TYPE_CHECKING:
    from fromzero.trained import Classifier, Trained
    from fromzero.training import Training
    from fromzero.verify import Verification

DEMO_EPOCHS = 12
ONLY_PRINT = ("evaluate", "predict", "runs", "summary", "recipes")  # the commands that leave nothing behind
NO_MEMORY = "out of memory|allocate memory|not enough memory|alloc(ation)?_failed"  # in what PyTorch says, by device
# The notes' own figures: running train accuracy, validation accuracy, epochs.
NOTES = {
    "train1": ("0.92", "0.76", "30"),
    "train2": ("0.79", "0.8245", "50"),
    "train3": ("–", "0.82–0.83", "–"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 bad input, 129, 130 and 143 stopped by a signal."""
    is_heard = sys.stdout is not None
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    warnings.showwarning = lambda message, *rest, **named: _warn(message)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows another one
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        _check_place()
        arguments = parse(list(sys.argv[1:] if argv is None else argv))
        if not is_heard and arguments.command in ONLY_PRINT:
            raise InputError(f"standard output is closed, and all that {arguments.command} does is print")
        COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
        return 0
    except (FromzeroError, StoppedError) as error:
        print(printable(f"fromzero: {error}"), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        from fromzero.terminal import print_no_more

        print_no_more()
        if not isinstance(error, BrokenPipeError):  # whoever read our output has left
            print(f"fromzero: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 1
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        print("fromzero: a number of thousands of digits is more than any field can hold", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, str(error), re.IGNORECASE):
            raise
        print("fromzero: not enough memory for this network and batch size; make either smaller", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fromzero: stopped at once; earlier saves are intact", file=sys.stderr)
        return 130


def _check_place() -> None:
    """Libraries die without a word where the folder that one stands in is gone."""
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(f"the folder that you are in cannot be read ({error.strerror}): go to another one") from None


def _warn(message: object) -> None:
    with contextlib.suppress(OSError):  # standard error may have gone, which ends no training
        print(printable(f"warning: {message}"), file=sys.stderr)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Exclude what is imported inside from garbage collection: it stays until the end anyway, and scanning it takes a
    tenth of the start and most of the exit."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def _is_text(name: str) -> bool:
    """Whether it can be written as UTF-8, as some names of files cannot."""
    return name.encode(errors="replace").decode() == name


def _train(arguments: argparse.Namespace) -> None:
    _check_tensorboard(arguments)
    if arguments.partial and getattr(arguments, "from") is None:
        raise InputError("--partial goes with --from RUN")
    changes = {path: parse_value(path, text) for path, text in vars(arguments).items() if path in field_types()}
    if arguments.DATASET is not None:
        if changes.get("dataset", arguments.DATASET) != arguments.DATASET:
            raise InputError(f"two data sets, {arguments.DATASET} and --dataset {changes['dataset']}: give one")
        changes["dataset"] = arguments.DATASET
    base = load_recipe(arguments.recipe)
    if not _is_text(changes.get("dataset", "")):
        raise InputError(f"{changes['dataset']}: a recipe cannot hold this name, which is no UTF-8: rename the folder")
    recipe = base.override(changes)
    if "validation.fraction" in changes and (source := recipe.validation.source) != "split":
        raise InputError(
            f"--validation.fraction has no effect with --validation.source {source}; use --validation.source split"
        )
    with _importing():
        from fromzero.data import load_images, split_name

        # Importing torch takes as long as reading CIFAR-10, about a second: both at once. Not so for the digits and for
        # pictures: scikit-learn looks into torch while it is imported and would find half of it, and who stops an
        # import (of Pillow) by Ctrl-C while there is another may leave its lock closed.
        importing = threading.Thread(target=importlib.import_module, args=("torch",))
        importing.start()
        if split_name(recipe.dataset)[0] != "cifar10":
            importing.join()
        try:
            images = load_images(recipe.dataset, data_dir=arguments.data_dir, offline=arguments.offline)
        finally:
            importing.join()  # torch cannot be imported while the program ends
        from fromzero.sessions import new_training
    if "validation.fraction" in changes and images.validation is not None:
        raise InputError(f"--validation.fraction holds nothing out: {images.source} has validation images of its own")
    training = new_training(
        recipe,
        images,
        name=arguments.run_name,
        start_from=getattr(arguments, "from"),
        **_options(arguments, "runs_dir", "partial", "device", "threads", "keep", "checkpoint_minutes"),
    )
    origin = training.run.provenance["from"] or {}
    if origin:
        at = "" if origin["step"] is None else f" at step {origin['step']:,}"  # best weights do not know theirs
        print(f"starting from the weights of {origin['run']} ({origin['recipe']}){at}")
    left = origin.get("left")
    if left:
        of = len(training.state.model.state_dict())
        print(f"loaded {of - len(left)} of {of} tensors; drawn at random: {', '.join(left)}")
    for note in notes_on_changes(base, recipe, changes):
        print(f"note: {note}")
    _watch(training, arguments.tensorboard)


def _check_tensorboard(arguments: argparse.Namespace) -> None:
    """Say before anything is done that TensorBoard's package is not there, where it is asked for."""
    if arguments.tensorboard:
        from fromzero.events import check_installed

        check_installed()


def _resume(arguments: argparse.Namespace) -> None:
    _check_tensorboard(arguments)
    with _importing():
        from fromzero import sessions
        from fromzero.runs import load_run

    run = load_run(arguments.RUN, arguments.runs_dir)
    before, num_rows = run.recipe, len(run.metrics())
    names = ("epochs", "allow_inexact", "data_dir", "offline", "device", "threads", "keep", "checkpoint_minutes")
    training = sessions.resumed_training(run, **_options(arguments, *names))
    if training.recipe.epochs != before.epochs:
        step = training.state.counters.step
        note = sessions.extension_note(before, training.recipe, step, training.timetable)
        print(f"extended from {before.epochs} to {training.recipe.epochs} epochs: {note}")
    if again := num_rows - training.state.counters.epoch:
        print(f"stopped without a last save: {counted(again, 'epoch')} since the last checkpoint come again")
    _watch(training, arguments.tensorboard)


def _watch(training: Training, tensorboard: bool = False) -> None:
    with _importing():
        from fromzero import display
        from fromzero.events import EVENTS, write_events
        from fromzero.terminal import lasting_console, say

    console = lasting_console()
    say(console, display.header(training))
    has_events = tensorboard or (training.run.path / EVENTS).exists()
    display.watch(training, console, write_events if has_events else None)


def _summary(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe)
    from fromzero.networks import summary

    height, width, channels = arguments.image_shape
    print(summary(recipe.network, (height, width, channels), arguments.classes))


def _runs(arguments: argparse.Namespace) -> None:
    _check_tensorboard(arguments)
    from rich.console import Console

    from fromzero.display import run_columns, runs_table
    from fromzero.events import write_events
    from fromzero.runs import list_runs

    if not arguments.runs_dir.is_dir():
        raise InputError(f"no folder {arguments.runs_dir}; name the one that holds the runs by --runs-dir")
    runs = list_runs(arguments.runs_dir)
    if not runs:
        in_studies = next(iter(sorted(arguments.runs_dir.glob("studies/*/cells"))), None)
        more = "" if in_studies is None else f"; the runs of studies are in other folders: --runs-dir {in_studies}"
        print(f"no runs under {arguments.runs_dir}{more}")
        return
    shown: list[dict[str, str]] = []
    with_changes: dict[str, list[str]] = {}
    with_events = False
    for run in runs:
        try:
            shown.append(run_columns(run))
            if (told := in_words(run.recipe, but=["epochs"])) != run.recipe.name:  # which the table shows
                with_changes.setdefault(told, []).append(run.name)
            if arguments.tensorboard:
                write_events(run)
                with_events = True
        except FromzeroError as error:
            _warn(error)
    on_test = any("*" in line["val"] for line in shown)
    console = Console(emoji=False)
    table, width, hidden = runs_table(shown, console.width if sys.stdout.isatty() else None)
    console.width = max(width, console.width)
    console.print(table)
    if hidden:
        print(f"not shown, as the terminal is narrow: {', '.join(hidden)}")
    unended = " · … not ended: fromzero resume RUN" if any("…" in line["epochs"] for line in shown) else ""
    print(f"train: evaluation mode, last epoch · running: during training, as Keras prints it · best: of val{unended}")
    for changes, names in with_changes.items():
        print(printable(f"{some(names, most=8)}: {changes}"))
    if on_test:
        print("* validated on the test images; best is the best epoch on them, so it flatters")
    if with_events:
        print(f"their curves: {command_line('tensorboard', '--logdir', arguments.runs_dir)}")


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.FOLDER is not None and arguments.data_dir is not None:
        raise InputError(f"--data-dir is where a run's own images are, and others are scored: {arguments.FOLDER}")
    with _importing():
        from fromzero import scores
        from fromzero.trained import proposing_others

    if arguments.FOLDER is None:
        trained = _trained(arguments)
        with proposing_others(trained.checkpoint):
            _warn_of_views(trained.run.recipe, arguments.tta)
            record = scores.own_scores(trained, arguments.tta)
    else:
        classifier = _classifier(arguments)
        with proposing_others(classifier.checkpoint):
            _warn_of_views(classifier.run.recipe, arguments.tta)
            record = scores.scores_on(arguments.FOLDER, classifier, arguments.tta)
    print(json.dumps(record) if arguments.json else printable(scores.scores_text(record)))


def _classifier(arguments: argparse.Namespace) -> Classifier:
    """The weights that are to look at other pictures."""
    with _importing():
        from fromzero.trained import load_classifier

    options = _options(arguments, "runs_dir", "precision", "device", "threads")
    return load_classifier(arguments.RUN, arguments.checkpoint, **options)


def _warn_of_views(recipe: Recipe, views: str) -> None:
    """Say that test-time augmentation shows mirror images where training showed none."""
    if views != "none" and recipe.augment.flip == "none":
        _warn(f"--tta {views} shows mirror images, and this run was trained without them: it may well do worse")


def _predict(arguments: argparse.Namespace) -> None:
    with _importing():
        from fromzero.data.decoding import unreadable
        from fromzero.data.listing import pictures_at
        from fromzero.scores import doubts
        from fromzero.trained import proposing_others

    pictures: Sequence[Path | bytes]
    if arguments.PICTURE == ["-"]:
        if sys.stdin is None:
            raise InputError("-: there is no standard input")
        paths, notes = [Path("-")], list[str]()
        pictures = [sys.stdin.buffer.read()]
    else:
        paths, notes = pictures_at([Path(picture) for picture in arguments.PICTURE])
        pictures = paths
    classifier = _classifier(arguments)
    for note in [*notes, *(f"{classifier.run.path}: {doubt}" for doubt in doubts(classifier))]:
        _warn(note)
    names = classifier.class_names
    pixels, read, wrong = classifier.read(pictures)
    if read:
        _warn_of_views(classifier.run.recipe, arguments.tta)
        with proposing_others(classifier.checkpoint):
            found = classifier.predict(pixels, arguments.tta)
        likeliest = found.topk(min(arguments.top or (len(names) if arguments.json else 1), len(names)))
        longest = max(map(len, names))
        for index, values, labels in zip(read, likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            says = [(names[label], probability) for label, probability in zip(labels, values, strict=True)]
            if arguments.json:
                classes = {
                    name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"): value for name, value in says
                }
                print(json.dumps({"picture": _text(paths[index]), "classes": classes}))
                continue
            told = "  ".join(f"{printable(name):<{longest}}  {probability:.4f}" for name, probability in says)
            shown = printable(one_line(str(paths[index])))
            print(f"{told}  {shown}")
    if wrong and arguments.json:
        for index, of in wrong.items():
            print(json.dumps({"picture": _text(paths[index]), "error": of.why}))
    if wrong:
        raise InputError(unreadable(paths, wrong))


def _text(path: Path) -> str:
    """A path as text, whatever its bytes are."""
    return os.fsencode(path).decode(errors="replace")


def _export(arguments: argparse.Namespace) -> None:
    with _importing():
        from fromzero.card import card
        from fromzero.export import export
        from fromzero.runs import check_named, write_named
        from fromzero.scores import doubts
        from fromzero.trained import load_classifier

    options = {"runs_dir": arguments.runs_dir, "precision": "float32", "device": "cpu"}
    classifier = load_classifier(arguments.RUN, arguments.checkpoint, **options)
    path = arguments.FILE or classifier.run.path / f"{classifier.run.name}.onnx"
    page = ""
    if arguments.card is not None:
        check_named(arguments.card, ".md")
        if not arguments.card.parent.is_dir():
            raise InputError(f"{arguments.card}: no folder {arguments.card.parent}")
        page = card(classifier)
    for doubt in doubts(classifier):
        _warn(f"{classifier.run.path}: {doubt}")
    difference = export(classifier, path, page)
    shape = ", ".join(map(str, classifier.image_shape))
    print(f"{path}: pixels uint8 (N, {shape}) → probabilities float32 (N, {len(classifier.class_names)})")
    print(
        f"  {path.stat().st_size / 1e6:.1f} MB; log-probabilities match float32 here to {difference:.1g} nats; its"
        " metadata list the classes and how to prepare pictures"
    )
    if page:
        write_named(arguments.card, page.encode(errors="replace"), ".md")
        print(f"{arguments.card}: its card")
    if (trained_in := classifier.run.provenance["machine"]["precision"]) != "float32":
        print(f"  predict and evaluate compute in {trained_in}, as it was trained: --precision float32 to compare")


def _trained(arguments: argparse.Namespace) -> Trained:
    """The run that is to be looked at."""
    with _importing():
        from fromzero.trained import load_trained

    which, precision = getattr(arguments, "checkpoint", "last"), getattr(arguments, "precision", None)
    options = _options(arguments, "runs_dir", "device", "threads", "data_dir", "offline")
    return load_trained(arguments.RUN, which, precision=precision, **options)


def _check_whole(trained: Trained) -> None:
    """Refuse to speak of a run whose records are not all there, or by the weights that it began with, when it has come
    further."""
    trained.run.check()
    if trained.run.metrics() and not trained.checkpoint.epochs:
        raise FromzeroError(
            f"{trained.run.path}: no epoch of it has been saved yet: wait for its next save, if it is being trained, or"
            f" go on with it: {trained.run.resume_command}"
        )


def _diagnose(arguments: argparse.Namespace) -> None:
    with _importing():
        from rich.console import Console

        from fromzero.diagnosis import diagnose
        from fromzero.findings import diagnosis_header, diagnosis_text, remarks, write_findings
        from fromzero.probe import evidence_of
        from fromzero.terminal import can_redraw, say

    trained = _trained(arguments)
    _check_whole(trained)
    run = trained.run
    console = Console(emoji=False)
    try:
        rows = trained.rows()
        say(console, diagnosis_header(run, rows, trained.reached if trained.steps_beyond else ""))
        if can_redraw(console):
            with console.status("") as status:
                evidence = evidence_of(trained, say=lambda doing: status.update(f"  {doing} …"))
        else:
            evidence = evidence_of(trained, say=lambda doing: say(console, f"  {doing} …"))
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{trained.checkpoint.file}: {error}; a lower --optimizer.learning_rate or a warm-up keeps them small"
        ) from None
    found = diagnose(evidence)
    said = remarks(run, evidence, found)
    studies, failure = {}, None
    try:
        at = trained.checkpoint.epochs, trained.steps_beyond
        studies = write_findings(run, found, said, evidence.measures, trained.images.source, *at)
    except FromzeroError as error:
        failure = error
    columns = min(console.width, 110)
    text = diagnosis_text(run, found, studies, said, columns)
    say(console, text)
    if failure is not None:
        raise failure


def _compare(arguments: argparse.Namespace) -> None:
    if arguments.FOLDER is not None and arguments.data_dir is not None:
        raise InputError(f"--data-dir is where the runs' own images are, and others are scored: {arguments.FOLDER}")
    with _importing():
        from fromzero.compare import compare_runs, comparison_text
        from fromzero.runs import load_run

    record = compare_runs(
        load_run(arguments.RUN, arguments.runs_dir),
        load_run(arguments.OTHER, arguments.runs_dir),
        arguments.FOLDER,
        arguments.checkpoint,
        **_options(arguments, "data_dir", "offline", "device", "threads"),
    )
    print(json.dumps(record) if arguments.json else printable(comparison_text(record)))


def _report(arguments: argparse.Namespace) -> None:
    with _importing():
        from fromzero.data.listing import SPLITS
        from fromzero.report import report
        from fromzero.runs import Run, check_named, write_named
        from fromzero.trained import proposing_others

    trained = _trained(arguments)
    _check_whole(trained)
    path = arguments.FILE or trained.run.path
    if Run(path).is_there and not path.samefile(trained.run.path):
        raise InputError(f"{path} is another run; a page is about one: {command_line('fromzero', 'report', path)}")
    names, own = trained.images.class_names, trained.run.path.resolve()
    places = [path, *(path / split for of_split in SPLITS.values() for split in of_split)]
    holds_classes = path.name in names or any((place / name).is_dir() for place in places for name in names)
    if path.is_dir() and holds_classes and path.resolve() != own:
        scores = command_line("fromzero", "evaluate", trained.run.path, path)
        raise InputError(f"{path}: is a folder of pictures, which {scores} scores; name another place for the page")
    path = path / "report.html" if path.is_dir() else path
    check_named(path, ".html", ".htm")
    with proposing_others(trained.checkpoint):
        page = report(trained, **_options(arguments, "pictures"))
    write_named(path, page.encode(errors="replace"), ".html", ".htm")  # of file names that are no text
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, to open in a browser")


def _demo(arguments: argparse.Namespace) -> None:
    with _importing():
        from fromzero.data import load_images
        from fromzero.sessions import new_training

    images = load_images("digits")
    print(
        f"The notes' three networks on {len(images.train):,} handwritten digits, {DEMO_EPOCHS} epochs each."
        " For the notes' own data: fromzero train cifar10 --recipe train3\n"
    )
    measured = {}
    for name in NOTES:
        changes = {"dataset": "digits", "epochs": DEMO_EPOCHS, "validation.source": "split"}
        training = new_training(load_recipe(name).override(changes), images, runs_dir=arguments.runs_dir)
        _watch(training)
        measured[name] = training.run.summary or {}
        print()
    print(f"{'':<8}│ {'the notes, CIFAR-10':^28} │ {'measured here, digits':^37}")
    columns = f"{'epochs':>6} {'running':>8}"
    print(f"{'':<8}│ {columns} {'val':>11}  │ {columns} {'clean':>7} {'val':>7} {'test':>6}")
    for name, (running, val, epochs) in NOTES.items():
        row = measured[name]
        print(
            f"{name:<8}│ {epochs:>6} {running:>8} {val:>11}  │ {row['epoch']:>6} {row['train/running_accuracy']:>8.3f}"
            f" {row['train/accuracy']:>7.3f} {row['val/accuracy']:>7.3f} {row['test/accuracy']:>6.3f}"
        )
    print("\nrunning and clean: train accuracy as Keras prints it (dropout on), and in evaluation mode.")
    print("Digits are far easier than CIFAR-10: the figures show that everything works, not what the notes found.")


def _verify_resume(arguments: argparse.Namespace) -> None:
    import shutil
    import tempfile

    from fromzero.verify import verify_resume

    load_recipe(arguments.recipe)
    folder = Path(tempfile.mkdtemp(prefix="fromzero-verify-"))
    keep = False
    try:
        found = verify_resume(
            arguments.recipe,
            folder,
            epochs=arguments.epochs,
            interruptions=arguments.interruptions,
            seed=arguments.seed,
            threads=arguments.threads,
            say=lambda line: print(line, flush=True),
        )
        if found.difference:
            keep = True
            raise FromzeroError(f"resuming is not exact here: {found.difference}; both runs are kept in {folder}")
        _print_verification(found, arguments.interruptions)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _print_verification(found: Verification, wanted: int) -> None:
    from fromzero import checkpoint

    tensors = checkpoint.load(found.straight.checkpoints / checkpoint.LAST).tensors
    values = sum(tensor.numel() for tensor in tensors.values())
    happened = len(found.interruptions)
    interrupted = counted(happened, "interruption")
    if happened < wanted:
        interrupted += f"; the run ended before the other {wanted - happened} (more --epochs make room for them)"
    print(
        f"exact: {len(tensors)} tensors ({values:,} values of the state), {len(found.straight.metrics())}"
        f" rows of metrics and the best weights are bit-identical after {interrupted}"
    )


def _study(arguments: argparse.Namespace) -> None:
    from fromzero.files import finite, write_json
    from fromzero.study.definition import load_study

    study = load_study(arguments.STUDY, arguments.scale, seeds=arguments.seeds, first_seed=arguments.first_seed)
    from fromzero.study import page
    from fromzero.study.answers import answer, record
    from fromzero.study.display import study_header, watch_cells
    from fromzero.study.execution import PICTURE, RESULT, prepare_study
    from fromzero.study.results import read_result
    from fromzero.terminal import lasting_console, say

    names = ("runs_dir", "jobs", "threads", "device", "tune", "keep_weights", "data_dir", "offline")
    execution = prepare_study(study, place=arguments.on, **_options(arguments, *names))
    console = lasting_console()
    say(console, study_header(execution))
    watch_cells(study.name, [*execution.trials, *execution.cells], execution.images, execution, console)
    result = read_result(execution.folder)
    page.draw_result(result, execution.folder / PICTURE)
    write_json(execution.folder / RESULT, finite(record(result)), alone=False)
    say(console, "\n".join(answer(result)))
    say(console, f"runs, picture and result.json: {execution.folder}")
    if not result.is_complete:
        raise FromzeroError(
            f"{study.name}: some runs failed; the same command tries them again, though what overflowed will do so"
            f" again: {execution.command}"
        )


def _lessons(arguments: argparse.Namespace) -> None:
    from fromzero.study import page
    from fromzero.study.results import by_lesson, list_results

    if arguments.runs_dir.exists() and not arguments.runs_dir.is_dir():
        raise InputError(f"{arguments.runs_dir} is a file; name the folder that holds the runs by --runs-dir")
    results = list_results(arguments.runs_dir)
    if arguments.write is not None:
        page.write_lessons(results, arguments.write, arguments.STUDY)
        print(f"written: {arguments.write}, its pictures in {arguments.write.with_suffix('')}/")
        return
    listed = list(by_lesson(results, arguments.STUDY))
    for study, found in listed:
        print(f"{study.name}: {study.claim}")
        for r in found:
            said = f"{r.so_far} ({r.num_runs})"
            print(f"  {r.title}: {said}{'' if r.is_complete else f', not finished: {r.resume_command} goes on'}")
            for caution in r.cautions:
                print(f"    note: {caution}")
        if not found:
            print(f"  not run yet: fromzero study {study.name}")
    if not all(found for _, found in listed):
        print("What came out when these lessons were run for fromzero: docs/lessons.md in its repository.")


def _cross_validate(arguments: argparse.Namespace) -> None:
    with _importing():
        from fromzero.runs import load_run
        from fromzero.study import folds
        from fromzero.study.display import watch_cells
        from fromzero.terminal import lasting_console, say

    options = _options(arguments, "jobs", "threads", "device", "data_dir", "offline")
    found = folds.prepare_folds(load_run(arguments.RUN, arguments.runs_dir), arguments.folds, **options)
    console = lasting_console()
    say(console, folds.fold_header(found))
    watch_cells("folds", found.cells, found.images, found, console)
    say(console, folds.fold_text(found, folds.fold_result(found)))


def _recipes(arguments: argparse.Namespace) -> None:
    for name in recipe_names():
        default = " The default." if name == DEFAULT_RECIPE else ""
        print(f"{name:<7} {load_recipe(name).epochs:>3} epochs  {recipe_purpose(name)}{default}")
    print("fromzero summary NAME prints a recipe's network")


def _options(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options as functions take them, by the same names; those not given and without a default are left out."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": _train,
    "resume": _resume,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "diagnose": _diagnose,
    "compare": _compare,
    "cross-validate": _cross_validate,
    "report": _report,
    "runs": _runs,
    "summary": _summary,
    "study": _study,
    "lessons": _lessons,
    "recipes": _recipes,
    "verify-resume": _verify_resume,
    "demo": _demo,
}
