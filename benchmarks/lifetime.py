"""Whole runs of fromzero: a worker for what happens inside a run, and cold starts of the command itself."""

import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.timing import ENVIRONMENT, ROOT, WorkerError, main_of_worker

RECIPE = "train3"
RESULT = re.compile(r"\btest [01]\.\d+ \(")  # the line that says how a run has ended
LINEAR_RECIPE, LINEAR_IMAGES, LINEAR_STEPS = "train1", (3_200, 6_400, 12_800), 25
# How old two runs are whose steps are compared: past an epoch of CIFAR-10 and what comes at its end, and hardly begun.
LATE_STEPS, WARM_UP_STEPS = 411, 20
BLOCKS, BLOCK_STEPS = 10, 10
NO_CHECKPOINT = 10_000  # minutes: one would count as the steps that it falls between


def measure(what, **task):
    return {"start": start, "epoch": epoch, "on_demand": on_demand}[what](**task)


def start(started, data_dir, threads):
    """Seconds from the start of this process (`started`, time.time() of who started it) to the end of the first step
    on CIFAR-10."""
    with tempfile.TemporaryDirectory() as folder:
        training = new_training_of(cifar10(data_dir), folder, threads)
        next(iter(training))
        seconds = time.time() - started
        training.close()
    return {"seconds": seconds}


def epoch(data_dir, threads):
    """An epoch on CIFAR-10 as a run: what its steps take, what evaluating 10,000 images takes (with the row of metrics
    that it ends in), the memory that the run says it needed."""
    with tempfile.TemporaryDirectory() as folder:
        training = new_training_of(cifar10(data_dir), folder, threads, checkpoint_minutes=NO_CHECKPOINT)
        ends, evaluated = [], 0.0
        for progress in training:
            if progress.loss is not None:
                ends.append(time.perf_counter())
            elif progress.row:
                evaluated = time.perf_counter()
        summary = training.run.summary
    return {
        "recipe": RECIPE,
        "epoch_seconds": seconds_of(ends),
        "evaluation_seconds": evaluated - ends[-1],
        "peak_bytes": summary["memory/peak_bytes"],
    }


def late_by_early(data_dir, threads):
    """Seconds of steps of a run that has trained an epoch over those of a run that has just begun, block by block in
    turn, each run in a process of its own: 1 when a step costs the same all along. In turn, because over an epoch the
    machine's own speed changes by more than what is looked for."""
    task = {"recipe": RECIPE, "data_dir": data_dir, "threads": threads}
    with pace(**task) as late, pace(**task) as early:
        late(LATE_STEPS)
        early(WARM_UP_STEPS)
        ratios = [late(BLOCK_STEPS) / early(BLOCK_STEPS) for _ in range(BLOCKS)]
    return {"recipe": RECIPE, "block_steps": BLOCK_STEPS, "ratios": ratios}


def with_fewer_and_more(threads):
    """Seconds of so many steps of runs on fewer and more images, block by block in turn as above."""
    with ExitStack() as stack:
        task = {"recipe": LINEAR_RECIPE, "threads": threads}
        runs = {count: stack.enter_context(pace(**task, images=count)) for count in LINEAR_IMAGES}
        for run in runs.values():
            run(WARM_UP_STEPS)
        blocks = [{count: run(LINEAR_STEPS) for count, run in runs.items()} for _ in range(BLOCKS)]
    seconds = {count: [block[count] for block in blocks] for count in LINEAR_IMAGES}
    return {"recipe": LINEAR_RECIPE, "block_steps": LINEAR_STEPS, "seconds": seconds}


@contextmanager
def pace(**task):
    """A run in a process of its own, `on_demand` of that task, that trains when it is told to: a function from a number
    of steps to the seconds that so many more of them take. It raises WorkerError."""
    task["what"] = "on_demand"
    command = [sys.executable, "-m", "benchmarks.lifetime", json.dumps(task)]
    with tempfile.TemporaryFile("w+") as said:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes)

        def seconds(steps):
            try:
                process.stdin.write(f"{steps}\n")
                process.stdin.flush()
                return float(process.stdout.readline())
            except (OSError, ValueError) as error:
                process.kill()
                status = process.wait()
                said.seek(0)
                raise WorkerError(f"on_demand ({status}): {said.read().strip()[-2000:]}") from error

        try:
            yield seconds
            process.communicate(timeout=60)  # no more lines: it removes its run and ends
        finally:
            process.kill()
            process.communicate()


def on_demand(recipe, threads, images=None, data_dir=None):
    """So many training steps as each line of the standard input says, on so many random images or on CIFAR-10; prints
    the seconds that they take, evaluations between them left out."""
    from benchmarks.steps_torch import random_images

    with tempfile.TemporaryDirectory() as folder:
        options = {"recipe": recipe, "epochs": 1000, "checkpoint_minutes": NO_CHECKPOINT}
        training = new_training_of(random_images(images) if images else cifar10(data_dir), folder, threads, **options)
        progresses = iter(training)
        for line in sys.stdin:
            seconds, left = 0.0, int(line)
            while left:
                began = time.perf_counter()
                if next(progresses).row is None:
                    seconds, left = seconds + time.perf_counter() - began, left - 1
            print(seconds, flush=True)
        training.close()
    return {}


def cifar10(data_dir):
    from fromzero import load_images

    return load_images("cifar10", data_dir=data_dir)


def new_training_of(images, folder, threads, recipe=RECIPE, epochs=1, **options):
    """So many epochs on all train images, validated on the test images, about to begin."""
    from fromzero import load_recipe, new_training

    changes = {"epochs": epochs, "clean_train_images": 10, "validation.source": "test"}
    recipe = load_recipe(recipe).override(changes)
    return new_training(recipe, images, runs_dir=folder, device="cpu", threads=threads, **options)


def seconds_of(ends):
    """The time that all steps take, from the moments at which they ended: the first began unseen and counts as the
    mean of the others."""
    return (ends[-1] - ends[0]) * len(ends) / (len(ends) - 1)


def cold_run(recipe, seed, data_dir=None, threads=None, dataset="cifar10", environment=ENVIRONMENT, precision="auto"):
    """`fromzero train DATASET --recipe RECIPE --seed SEED` as a user types it: seconds from the start of its process
    until the test accuracy is printed and until its end, and that accuracy (as its summary has it)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fromzero", "train", dataset, "--recipe", recipe, "--runs-dir", folder]
        command += ["--seed", str(seed)]
        command += ["--precision", precision] if precision != "auto" else []
        command += ["--data-dir", str(Path(data_dir).resolve())] if data_dir else []
        command += ["--threads", str(threads)] if threads else []
        began, printed, seconds = time.perf_counter(), [], None
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
            for line in process.stdout:
                printed.append(line)
                if RESULT.search(line):
                    seconds = time.perf_counter() - began
        end_seconds = time.perf_counter() - began
        if process.returncode != 0 or seconds is None:
            raise WorkerError(f"{recipe}: {''.join(printed).strip()[-2000:]}")
        (summary,) = Path(folder).glob("*/summary.json")
        accuracy = json.loads(summary.read_text("utf-8"))["test/accuracy"]
        return {"seconds": seconds, "end_seconds": end_seconds, "accuracy": accuracy}


if __name__ == "__main__":
    main_of_worker(measure)
