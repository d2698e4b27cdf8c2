"""What the command line understands: commands, options, and a recipe's fields as options. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from fromzero.errors import InputError, nearest
from fromzero.recipe import Recipe, field_types, load_recipe, recipe_names

DEFAULT_RECIPE = "strong"
# What Keras, PyTorch and Ultralytics call it, where none of our words is near, or one that means another thing.
ELSEWHERE = {
    "amp": "--precision bfloat16",
    "class-weight": "--logit_adjustment 1, where rare classes are to count as much as others",
    "class-weights": "--logit_adjustment 1, where rare classes are to count as much as others",
    "dropout": "--network.block_dropout and --network.dense_dropout",
    "early-stopping": "--epochs; the best epoch's weights are kept beside the last",
    "gpu": "--device cuda",
    "gpus": "--device cuda",
    "image-size": "@PIXELS behind the folder, as in photos@64",
    "img-size": "@PIXELS behind the folder, as in photos@64",
    "imgsz": "@PIXELS behind the folder, as in photos@64",
    "lr0": "--optimizer.learning_rate",
    "mixup": "--augment.cutmix",
    "model": "--recipe",
    "num-workers": "--threads",
    "output": "--runs-dir",
    "patience": "--epochs; the best epoch's weights are kept beside the last",
    "pretrained": "--from RUN, of fromzero's own; it has no weights trained by others",
    "project": "--runs-dir",
    "resume": "fromzero resume RUN",
    "val-split": "--validation.fraction",
    "validation-split": "--validation.fraction",
    "wd": "--optimizer.weight_decay",
    "weights": "--from RUN",
    "workers": "--threads",
}
COMMANDS_ELSEWHERE = {
    "confusion": "report",
    "fit": "train",
    "help": "--help",
    "list": "runs",
    "lr-find": "diagnose",
    "sweep": "study",
    "test": "evaluate",
    "tune": "study",
    "val": "evaluate",
}


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see: {self.prog} --help")


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, `command` being the name of the command. Raises InputError for what does not fit."""
    parser, commands = _parsers(_recipe_to_show(argv))
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        raise InputError(f"unknown option {argv[0]} before a command; see: fromzero --help")
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        if argv[0] in COMMANDS_ELSEWHERE:
            raise InputError(f"unknown command {argv[0]!r}; here it is: fromzero {COMMANDS_ELSEWHERE[argv[0]]}")
        raise InputError(f"unknown command {argv[0]!r}{nearest(argv[0], commands) or '; see: fromzero --help'}")
    if not argv or argv[0] not in commands:
        parser.parse_args(argv)
        parser.print_help()
        raise SystemExit(0)
    words = _with_known_spelling(argv, commands)[1:]
    known = [s for action in commands[argv[0]]._actions for s in action.option_strings if s.startswith("--")]
    for word in words[words.index("--") :] if "--" in words else ():
        if (name := word.partition("=")[0]) in known:
            raise InputError(f"{name} stands behind --, which ends the options; see: fromzero {argv[0]} --help")
    command = commands[argv[0]]
    # The one gives arguments the words that stand among options, the other those behind a --, and neither does both.
    parse_words = command.parse_known_args if "--" in words else command.parse_known_intermixed_args
    arguments, left = parse_words(words, argparse.Namespace(command=argv[0]))
    if left:
        word = left[0].partition("=")[0]
        if word.startswith("-"):
            here = ELSEWHERE.get(word.lstrip("-").replace("_", "-"))
            if here and (argv[0] == "train" or (here.split()[0] in known and here != "--runs-dir")):
                raise InputError(f"unknown option {word}; here it is: {here}")
            hint = nearest(word.lstrip("-"), [name.lstrip("-") for name in known])
            hint = hint.replace("nearest: ", "nearest: --") or f"; see: fromzero {argv[0]} --help"
            raise InputError(f"unknown option {word}{hint}")
        raise InputError(f"unexpected argument {left[0]!r}; see: fromzero {argv[0]} --help")
    return arguments


def _with_known_spelling(argv: list[str], commands: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """The words with options as they are declared: `--batch-size` is `--batch_size`, `--data_dir` is `--data-dir`."""
    known = {name.replace("_", "-"): name for name in commands[argv[0]]._option_string_actions}
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(known.get(name.replace("_", "-"), name) + equals + value if word.startswith("--") else word)
    return words


def _recipe_to_show(argv: list[str]) -> Recipe | None:
    """The recipe whose values the help of `train` shows, where that is asked for."""
    if argv[:1] != ["train"] or not {"-h", "--help"} & set(argv):
        return None
    named = _Parser(prog="fromzero train", add_help=False, allow_abbrev=False)
    named.add_argument("--recipe", default=DEFAULT_RECIPE)
    return load_recipe(named.parse_known_args(argv)[0].recipe)


def _parsers(recipe: Recipe | None) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """All of fromzero's options, and those of each command by its name; the help of recipe fields with the values of
    `recipe`."""
    parser = _Parser(prog="fromzero", description=metadata.metadata("fromzero")["Summary"], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fromzero {metadata.version('fromzero')}")
    adder = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    commands: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = adder.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(command=name)
        commands[name] = command
        return command

    def add_of_run(name: str, text: str) -> argparse.ArgumentParser:
        command = add(name, text)
        command.add_argument("RUN", type=_path, help="a run's folder or name")
        return command

    train = add("train", "train a network from a recipe into a run folder")
    train.usage = "%(prog)s [DATASET] [--recipe NAME|FILE] [--OPTION VALUE ...] [--FIELD VALUE ...]"  # there are dozens
    train.add_argument(
        "DATASET", nargs="?", help="cifar10, digits, a folder of pictures, or CIFAR's files (as the recipe says)"
    )
    train.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"{', '.join(recipe_names())} or a TOML file (strong)")
    train.add_argument("--run-name", metavar="NAME", help="of the run's folder (data set and number of parameters)")
    train.add_argument("--from", type=_path, metavar="RUN", help="start from the last weights of that run")
    train.add_argument("--partial", action="store_true", help="with --from: take the weights that fit")
    _add_shared(train, "runs", "data", "machine", "saving", "tensorboard")
    shown = recipe.fields() if recipe else {}
    about = (
        f"each overrides one field of the recipe; in brackets: its value in {recipe.name if recipe else 'it'};"
        " - and _ are interchangeable"
    )
    sections = {"": train.add_argument_group("recipe fields", about)}
    for path, (_, description) in field_types().items():
        text = f"{description} ({json.dumps(shown[path])})" if shown else description
        section = path.rpartition(".")[0]
        if section not in sections:
            sections[section] = train.add_argument_group(f"recipe, {section}")
        text = text.replace("%", "%%")
        sections[section].add_argument(f"--{path}", metavar="VALUE", default=argparse.SUPPRESS, help=text)

    resume = add_of_run("resume", "continue a stopped run, bit for bit; or extend one with --epochs")
    resume.add_argument("--epochs", type=_count, help="a new total of epochs")
    resume.add_argument("--allow-inexact", action="store_true", help="go on even if the machine differs")
    recorded = "as recorded"
    _add_shared(resume, "runs", "data", "machine", "saving", "tensorboard", device=recorded, threads=recorded)
    resume.set_defaults(device=None)

    evaluate = add_of_run("evaluate", "score a run's weights again, on its own images or on others")
    evaluate.add_argument("FOLDER", nargs="?", type=_path, help="pictures to score it on, one folder for each class")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _add_weights(evaluate)
    _add_shared(evaluate, "runs", "data", "machine")

    predict = add_of_run("predict", "classify pictures with a run's weights")
    predict.add_argument(
        "PICTURE", nargs="+", type=_picture, help="a picture, a folder of them, or - for one from standard input"
    )
    predict.add_argument("--top", type=_count, metavar="N", help="how many classes, likeliest first (1; --json: all)")
    predict.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object for each picture: its name and the network's probability of each class",
    )
    _add_weights(predict)
    _add_shared(predict, "runs", "machine")

    export = add_of_run("export", "write a run's weights as an ONNX model, for other programs")
    export.add_argument("FILE", nargs="?", type=_path, help="the model's file (in the run's folder, with its name)")
    export.add_argument("--card", type=_path, metavar="FILE.md", help="write a model card there, and into the model")
    _add_checkpoint(export)
    _add_shared(export, "runs")

    diagnose = add_of_run("diagnose", "say what is wrong with a run: evidence, remedy, and the study that tests it")
    _add_shared(diagnose, "runs", "data", "machine")

    compare = add_of_run("compare", "compare two runs image by image: what differs, what these images tell")
    compare.add_argument("OTHER", type=_path, help="the run to compare it with")
    compare.add_argument(
        "FOLDER", nargs="?", type=_path, help="pictures to compare on (else validation images of both)"
    )
    compare.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _add_checkpoint(compare)
    _add_shared(compare, "runs", "data", "machine")

    cross_validate = add_of_run(
        "cross-validate", "judge every train image by a network that has not seen it: accuracy, doubtful labels"
    )
    cross_validate.add_argument("--folds", type=_count, default=5, metavar="K", help="as many parts and networks (5)")
    cross_validate.add_argument("--jobs", type=_count, metavar="N", help="runs at a time (one a core; one on a GPU)")
    _add_shared(cross_validate, "runs", "data", "machine", threads="one a run")

    report = add_of_run("report", "write a page about a run: curves, findings, confusions, surest mistakes")
    report.add_argument(
        "FILE", nargs="?", type=_path, help="the page's file, or a folder for report.html (the run's folder)"
    )
    report.add_argument(
        "--pictures", type=_count, metavar="N", help="how many mistakes of each split and doubtful labels (24)"
    )
    _add_checkpoint(report)
    _add_shared(report, "runs", "data", "machine")

    runs = add("runs", "list the runs")
    _add_shared(runs, "runs", "tensorboard")

    summary = add("summary", "print a recipe's network as Keras's summary() does")
    summary.add_argument("recipe", help=f"{', '.join(recipe_names())} or a TOML file")
    summary.add_argument(
        "--image-shape", type=_count, nargs=3, default=(32, 32, 3), metavar=("H", "W", "C"), help="(32 32 3)"
    )
    summary.add_argument("--classes", type=_count, default=10, help="number of classes (10)")

    study = add("study", "run a study: arms that differ in one thing, several seeds, an answer with an interval")
    study.add_argument("STUDY", help="a study that comes with fromzero (fromzero lessons lists them) or a TOML file")
    study.add_argument("--scale", default="screen", help="the study's: screen, in most full, in some medium (screen)")
    study.add_argument("--seeds", type=int, metavar="N", help="runs of each arm (as the scale says)")
    study.add_argument(
        "--first-seed",
        type=int,
        metavar="N",
        help="seed of the first runs (as the scale says); others for one anew",
    )
    study.add_argument("--jobs", type=_count, metavar="N", help="runs at a time (one a core; one on a GPU)")
    study.add_argument("--tune", action="store_true", help="first find each arm's best rate, with equal budgets")
    study.add_argument("--on", choices=("local", "ray"), default="local", help="where the runs train (local)")
    study.add_argument("--keep-weights", action="store_true", help="keep the checkpoints of runs that have ended")
    _add_shared(study, "runs", "data", "machine", threads="one a run")

    lessons = add("lessons", "list the notes' lessons and your own studies, with their verdicts so far")
    lessons.add_argument("STUDY", nargs="*", help="only these, by name")
    lessons.add_argument(
        "--write", type=_path, metavar="FILE", help="write them as a page with pictures, from the runs"
    )
    _add_shared(lessons, "runs")

    add("recipes", "list the recipes that come with fromzero")

    verify = add("verify-resume", "show that resuming is exact on this machine, in about a minute")
    verify.add_argument("recipe", nargs="?", default="train3", help=f"{', '.join(recipe_names())} or a file (train3)")
    verify.add_argument("--epochs", type=_count, default=4, help="epochs on the digits (4)")
    verify.add_argument("--interruptions", type=_count, default=4, help="how many times to interrupt (4)")
    verify.add_argument("--seed", type=int, default=0, help="for the kinds and times of interruption (0)")
    verify.add_argument("--threads", type=_count, help="CPU threads (one a core)")

    demo = add("demo", "train the notes' three networks on handwritten digits, in a minute or two")
    _add_shared(demo, "runs")
    return parser, commands


def _count(text: str) -> int:
    """A whole number from 1 to 999,999,999."""
    if not text.strip().isdecimal() or len(text.strip()) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:20]} is not a whole number from 1 to 999,999,999")
    return int(text)


def _minutes(text: str) -> float:
    """A number from 0 to 10,000."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 10_000:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text[:20]} is not from 0 to 10,000")


def _path(text: str) -> Path:
    """A path that is named: an empty one, as of an unset variable, would be the folder that one is in."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("an empty name" if not text else "a name with a NUL character")
    return Path(text)


def _picture(text: str) -> Path | str:
    """A path; or -, standard input, which ./- is not."""
    return text if text == "-" else _path(text)


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which weights (last)")


def _add_weights(command: argparse.ArgumentParser) -> None:
    _add_checkpoint(command)
    command.add_argument(
        "--tta",
        choices=("none", "mirror", "multicrop"),
        default="none",
        help="test-time augmentation: average over views of an image (none)",
    )
    command.add_argument(
        "--precision", choices=("bfloat16", "float32"), help="what to compute in (as the run was trained)"
    )


def _add_shared(
    command: argparse.ArgumentParser,
    *groups: str,
    device: str = "cuda where there is one",
    threads: str = "one a core",
) -> None:
    """Options of these groups; device, threads: in words, what they are where they are not given."""
    if "runs" in groups:
        command.add_argument("--runs-dir", type=_path, default=Path("runs"), help="where run folders are kept (runs)")
    if "data" in groups:
        command.add_argument("--data-dir", type=_path, help="where CIFAR-10 is, or where a run's images are now")
        command.add_argument("--offline", action="store_true", help="never download")
    if "machine" in groups:
        command.add_argument("--device", default="auto", help=f"cpu, cuda or cuda:N ({device})")
        command.add_argument("--threads", type=_count, help=f"CPU threads ({threads})")
    if "saving" in groups:
        command.add_argument(
            "--checkpoint-minutes",
            type=_minutes,
            metavar="M",
            help="save every M minutes (1, more where saving is slow)",
        )
        command.add_argument(
            "--keep", type=_count, metavar="N", help="checkpoints to keep (2; on resume as many as there are)"
        )
    if "tensorboard" in groups:
        command.add_argument(
            "--tensorboard", action="store_true", help="write curves to run folders as TensorBoard event files"
        )
