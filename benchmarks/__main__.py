"""Everything in one run: make bench, or

    python -m benchmarks [--parts steps lifetime cold] [--rounds 5] [--cold quick strong best] [--render]
    python -m benchmarks --held-to AVX2
    python -m benchmarks --optimizer adam

Prints medians, ratios with their spread and the processor's ceiling, and writes docs/benchmarks.md (held to AVX2,
docs/benchmarks-avx2.md; with Adam, docs/benchmarks-adam.md), or the page that --output names, and a picture. What was
measured stays in build, in a file of the page's name, and --render writes the page from it again; what a run measured
that then failed is in build/benchmarks-unfinished.json. Keras runs in an environment of its own, .venv-bench, which the
Makefile makes.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

from benchmarks import figures, lifetime, networks, page
from benchmarks.targets import FROMZERO, GOALS, IDLE, KERAS_FLOAT32, PLAIN_FLOAT32, POLICIES, SIDES
from benchmarks.timing import ROOT, WorkerError, default_data_dir, hold_to_avx2, run_worker

RESULTS = ROOT / "build" / "benchmarks.json"
PAGE = ROOT / "docs" / "benchmarks.md"
UNFINISHED = RESULTS.with_name("benchmarks-unfinished.json")  # of a run under way, or of one that failed
PEERS_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
RECIPES = ("train1", "train2", "train3")
WAYS = ("fit", "train_on_batch", "fit, XLA", "train_on_batch, XLA")  # of steps_keras, which needs TensorFlow to import
PATHS = ("--data-dir", "--peers-python", "--output")
KERAS_TRIES = 3  # of each way to train
OPTIMIZERS = {  # on all sides
    "sgd": {"learning_rate": 0.01, "momentum": 0.9},
    "adam": {"learning_rate": 5e-4},
}


def main():
    arguments = parse()
    if not arguments.render:
        measure_parts(arguments)
    kept = results_of(arguments)
    try:
        results = json.loads(kept.read_text("utf-8"))
        lines = page.verdict_lines(results)
        written = page.write(results, arguments.output)
    except FileNotFoundError as error:
        sys.exit(f"benchmarks: {error.filename} is not there: measure first, without --render")
    except OSError as error:
        sys.exit(f"benchmarks: {error.filename}: {error.strerror}; mend that, then write the page with --render")
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # damaged, or of a version before this
        sys.exit(f"benchmarks: {kept} does not hold what the page shows ({error!r}): measure again")
    print("\n".join([*lines, *(f"wrote {path}" for path in written)]))


def measure_parts(arguments):
    """Measure the parts that are asked for, into `results_of` them when all are done."""
    started = time.time()
    if arguments.held_to:
        hold_to_avx2(RESULTS.parent / "held-to-avx2")
    results = {"about": about(arguments)}
    if results["about"]["load_before"] > IDLE:
        say(
            f"the load average is {results['about']['load_before']:.2f}: other work runs here, do not trust the figures"
        )
    parts = {"steps": run_steps, "lifetime": run_lifetime, "cold": run_cold}
    for name in arguments.parts:
        try:
            parts[name](arguments, results)
        finally:  # what was measured before something failed took as long
            results["about"] |= {"minutes": (time.time() - started) / 60, "load_after": os.getloadavg()[0]}
            UNFINISHED.parent.mkdir(exist_ok=True)
            UNFINISHED.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    UNFINISHED.replace(results_of(arguments))


def results_of(arguments):
    """The file with what was measured last in this form."""
    return RESULTS.with_stem(arguments.form)


def run_steps(arguments, results):
    """Training steps: in every round each side once for each network, and the processor's ceiling beside them."""
    from fromzero import load_recipe

    descriptions = {name: networks.describe(load_recipe(name).network) for name in arguments.recipes}
    results["work"] = {
        name: {"parameters": networks.num_parameters(d), "flop": networks.training_flop(d)}
        for name, d in descriptions.items()
    }
    results["ways"] = {name: {} for name in descriptions}
    results["steps"] = {name: {side: [] for side in arguments.sides} for name in descriptions}
    results["ceiling"], ceiling = [], {"threads": arguments.threads}
    if arguments.held_to:  # of bfloat16 it would take minutes
        ceiling["precisions"] = [arguments.precision]
    say("which way of training is fastest for Keras")
    for name, description in descriptions.items():
        for side in arguments.sides:
            if side in POLICIES:
                results["ways"][name][side] = keras_ways(arguments, description, side)
    for number in range(1, arguments.rounds + 1):
        say(f"round {number} of {arguments.rounds}, images a second")
        results["ceiling"].append(run_worker("ceiling", ceiling))
        for name, description in descriptions.items():
            for side in arguments.sides[:: 1 if number % 2 else -1]:  # a place in the order favours none
                if side in POLICIES:
                    found = keras_steps(arguments, description, side, fastest(results["ways"][name][side]))
                    results["about"]["versions"] |= found["versions"]
                else:
                    found = torch_steps(arguments, name, description, side)
                if found["parameters"] != (expected := results["work"][name]["parameters"]):
                    raise WorkerError(f"{side} has {found['parameters']:,} parameters in {name}, not {expected:,}")
                results["steps"][name][side].append(found["images_per_second"])
            say(f"  {name}: " + ", ".join(f"{side} {rates[-1]:,.0f}" for side, rates in results["steps"][name].items()))
    for line in page.step_lines(results):
        print(line, flush=True)


def run_lifetime(arguments, results):
    """Whether cost grows as the work does."""
    found = results["lifetime"] = {}
    on_cifar10 = {"data_dir": arguments.data_dir, "threads": arguments.threads}

    def start_seconds():
        return run_worker("lifetime", {"what": "start", "started": time.time(), **on_cifar10})["seconds"]

    measurements = {
        "linear": (
            "steps with fewer and more images, in turn",
            partial(lifetime.with_fewer_and_more, arguments.threads),
        ),
        "start_seconds": ("process start to first step on CIFAR-10", start_seconds),
        "epochs": (
            "an epoch of train 3 on CIFAR-10",
            partial(run_worker, "lifetime", {"what": "epoch", **on_cifar10}),
        ),
        "late_by_early": (
            "steps after an epoch of it and steps of a run just begun, in turn",
            partial(lifetime.late_by_early, **on_cifar10),
        ),
    }
    for name, (what, measure) in measurements.items():
        say(what)
        found[name] = []
        try:
            for _ in range(arguments.rounds):
                found[name].append(measure())
        except WorkerError as error:  # the rounds before it stand
            found.setdefault("not_measured", {})[what] = str(error).splitlines()[-1]
            say(f"  failed in round {len(found[name]) + 1}: {found['not_measured'][what]}")


def run_cold(arguments, results):
    """Cold runs of recipes, in turn with Keras's training steps of train 3: Keras, run, Keras, run …, Keras. A run is
    compared with the mean of the two beside it."""
    from fromzero import load_recipe
    from fromzero.recipe import recipe_names

    description = networks.describe(load_recipe("train3").network)
    tried = results.get("ways", {}).get("train3", {}).get(KERAS_FLOAT32)
    way = fastest(tried or keras_ways(arguments, description, KERAS_FLOAT32))
    results["cold"], results["cold_failed"] = {}, {}

    def keras_epoch_seconds():
        found = keras_steps(arguments, description, KERAS_FLOAT32, way)
        return figures.epoch_seconds(found["images_per_second"])

    for name in arguments.cold:
        if name not in recipe_names():
            say(f"recipe {name} is not there yet: left out")
            continue
        say(f"cold runs of {name}")
        runs, keras = [], [keras_epoch_seconds()]
        try:
            for seed in range(arguments.rounds if name == "quick" else arguments.long_rounds):
                run = lifetime.cold_run(
                    name, seed, arguments.data_dir, arguments.threads, precision=arguments.precision
                )
                keras.append(keras_epoch_seconds())
                runs.append(run)
                say(f"  {runs[-1]['seconds']:.1f} s, test accuracy {runs[-1]['accuracy']:.4f}")
        except WorkerError as error:  # the runs before it stand
            results["cold_failed"][name] = str(error).splitlines()[-1]
            say(f"  failed in run {len(runs) + 1}: {results['cold_failed'][name]}")
        if not runs:
            continue
        results["cold"][name] = {
            "seconds": [run["seconds"] for run in runs],
            "end_seconds": [run["end_seconds"] for run in runs],
            "accuracy": [run["accuracy"] for run in runs],
            "keras_epoch_seconds": [(a + b) / 2 for a, b in pairwise(keras)],
            "keras_way": way,
        }


def keras_ways(arguments, description, side):
    """Images a second of each way to train that network, the median of KERAS_TRIES in turn."""
    tried = {way: [] for way in arguments.keras_ways}
    for _ in range(KERAS_TRIES if len(tried) > 1 else 1):
        for way, rates in tried.items():
            rates.append(keras_steps(arguments, description, side, way)["images_per_second"])
    medians = {way: statistics.median(rates) for way, rates in tried.items()}
    say(f"  {side}: " + ", ".join(f"{way} {rate:,.0f}" for way, rate in medians.items()))
    return medians


def keras_steps(arguments, description, side, way):
    task = {"description": description, "policy": POLICIES[side], "way": way, **common(arguments)}
    return run_worker("steps_keras", task, arguments.peers_python)


def torch_steps(arguments, name, description, side):
    task = {"side": side, "recipe": name, "description": description, "precision": arguments.precision}
    task |= common(arguments)
    return run_worker("steps_torch", task)


def common(arguments):
    optimizer = {"name": arguments.optimizer, **OPTIMIZERS[arguments.optimizer]}
    return {"batch_size": arguments.batch_size, "threads": arguments.threads, "optimizer": optimizer}


def fastest(rates):
    return max(rates, key=rates.get)


def about(arguments):
    """Machine, versions, date and command, as the page shows them."""
    from fromzero import machine
    from fromzero.provenance import describe_program
    from fromzero.resources import usable_cores

    program = describe_program()
    here = machine.prepare(arguments.precision, device="cpu", threads=arguments.threads)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": command_without_paths(sys.argv[1:]),
        "commit": program["commit"],
        "processor": here.processor,
        "instructions": arguments.held_to or here.instructions,
        "held_to": arguments.held_to,
        "precision": here.precision,
        "kernels": here.kernels,
        "cores": len(usable_cores()),
        "threads": here.threads,
        "python": program["python"],
        "versions": {"fromzero": here.fromzero, "torch": here.torch},
        "rounds": arguments.rounds,
        "batch_size": arguments.batch_size,
        "optimizer": arguments.optimizer,
        "load_before": os.getloadavg()[0],
    }


def command_without_paths(options):
    """The command line, but for the options that say where things are on this machine."""
    shown = [
        option
        for before, option in pairwise(["", *options])
        if option.partition("=")[0] not in PATHS and before not in PATHS
    ]
    return f"python -m benchmarks {shlex.join(shown)}".strip()


def say(line):
    print(line, flush=True)


def parse():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What fromzero costs beside others.")
    choices = ["steps", "lifetime", "cold"]
    parser.add_argument("--parts", nargs="+", choices=choices)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is measured, in turn (5)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--keras-ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--cold", nargs="*", default=["quick"], help=f"recipes to run from a cold start: {list(GOALS)}")
    parser.add_argument("--long-rounds", type=int, default=1, help="cold runs of recipes other than quick (1)")
    parser.add_argument("--held-to", choices=["AVX2"], help="hold all sides to that, in float32: no lifetime, no bf16")
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="sgd", help="of training steps (sgd); adam: only them"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, help="CPU threads of every side, by default each side's own choice")
    parser.add_argument("--data-dir", default=default_data_dir(), help="where CIFAR-10 is")
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON, help="a Python with TensorFlow and Keras")
    parser.add_argument("--output", type=Path, help="the page (docs/benchmarks.md); its picture lies beside it")
    parser.add_argument("--render", action="store_true", help="write the page from what the last run measured")
    arguments = parser.parse_args()
    allowed_parts, allowed_sides, arguments.precision, arguments.form = choices, SIDES, "auto", "benchmarks"
    if arguments.held_to:
        arguments.form += f"-{arguments.held_to.lower()}"
        allowed_parts, allowed_sides = ["steps", "cold"], (KERAS_FLOAT32, PLAIN_FLOAT32, FROMZERO)
        arguments.precision = "float32"
    if arguments.optimizer != "sgd":  # the others train recipes, which have their own
        arguments.form += f"-{arguments.optimizer}"
        allowed_parts = ["steps"]
    arguments.output = arguments.output or PAGE.with_stem(arguments.form)
    for what, allowed in (("parts", allowed_parts), ("sides", allowed_sides)):
        chosen = getattr(arguments, what) or allowed
        setattr(arguments, what, chosen)
        if refused := set(chosen) - set(allowed):
            adam = arguments.optimizer == "adam"
            option = " ".join(["--held-to AVX2"] * bool(arguments.held_to) + ["--optimizer adam"] * adam)
            parser.error(f"{option} does without --{what} {', '.join(sorted(refused))}")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except WorkerError as error:
        sys.exit(f"benchmarks: {error}")
