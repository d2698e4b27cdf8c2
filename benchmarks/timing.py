"""Measuring: a stopwatch for a loop of steps, and processes that measure one thing each.

Every measurement has a process of its own, started anew: allocator, thread and compiler settings belong to a process.
A worker is a module of this package that reads its task as JSON from its one argument and prints its result as the
last line, JSON too.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# For all sides: how long torch's threads spin before they sleep, which fromzero sets itself. By default so long that
# other work on the machine slows plain PyTorch far more than fromzero.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", **os.environ}

# What holds PyTorch, oneDNN (in TensorFlow, too), MKL and XLA to AVX2, and a compiler that holds fromzero's kernels to
# it: laptops have no more. Its version says so, by which kernels are kept; under the names of all compilers that
# fromzero looks for, as it would take what another one has made before.
COMPILERS = ("cc", "gcc", "clang")
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
}
AVX2_COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then {cc} --version | sed '1s/$/ -march=haswell/'; else exec {cc} "$@" -march=haswell; fi
"""

WARM_UP_SECONDS, MEASURE_SECONDS, MIN_STEPS = 2.0, 5.0, 5


class Stopwatch:
    """Images a second of a loop that calls `tick` after each step and leaves when it returns True. The first step
    (compilation, allocation) and a warm-up are not counted."""

    def __init__(self, warm_up=WARM_UP_SECONDS, seconds=MEASURE_SECONDS, clock=time.perf_counter):
        self.warm_up, self.seconds, self.clock = warm_up, seconds, clock
        self.first = self.start = self.last = None
        self.images = self.steps = 0

    def tick(self, images):
        self.last = self.clock()
        if self.first is None:
            self.first = self.last
        if self.last - self.first < self.warm_up or self.start is None:
            self.start = self.last
            return False
        self.images, self.steps = self.images + images, self.steps + 1
        return self.last - self.start >= self.seconds and self.steps >= MIN_STEPS

    @property
    def images_per_second(self):
        return self.images / (self.last - self.start)


def run_worker(module, task, python=sys.executable):
    """What `module` (of this package) measured for `task`. Raises WorkerError with the end of what it printed."""
    command = [str(python), "-m", f"benchmarks.{module}", json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode != 0:
        raise WorkerError(f"{module} {task}: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def hold_to_avx2(folder):
    """Hold all that this process and its workers compute with to AVX2, before any of it is imported. Raises WorkerError
    where the compiler, put into `folder`, does not hold to it."""
    folder.mkdir(parents=True, exist_ok=True)
    places = [place for place in os.environ.get("PATH", os.defpath).split(os.pathsep) if place != str(folder)]
    for name in COMPILERS:
        (folder / name).write_text(AVX2_COMPILER.format(cc=shutil.which("cc", path=os.pathsep.join(places))), "utf-8")
        (folder / name).chmod(0o755)
    asked = [str(folder / "cc"), "-march=native", "-dM", "-E", "-x", "c", os.devnull]
    said = subprocess.run(asked, capture_output=True, text=True)
    if "__AVX2__" not in said.stdout or "__AVX512F__" in said.stdout:
        raise WorkerError(f"the compiler cannot be held to AVX2: {said.stderr.strip() or 'it compiles for another'}")
    path = os.pathsep.join([str(folder), *places])
    for environment in (os.environ, ENVIRONMENT):
        environment.update(AVX2, CC="cc", PATH=path)


def default_data_dir():
    """Where the tests look for CIFAR-10, if it is there; else None, and fromzero looks where it always does."""
    folder = ROOT.parent / "shared" / "data"
    return str(folder) if (folder / "cifar-10-batches-bin").is_dir() else None


def main_of_worker(measure):
    """The main of a worker: its task in, its result out."""
    print(json.dumps(measure(**json.loads(sys.argv[1]))))


class WorkerError(RuntimeError):
    """A measurement that did not come about."""
