"""Whether resuming is exact on this machine: the same run straight and interrupted, compared to the bit.

Both runs are processes of their own, started by the command line that a user would type; the second is stopped by
SIGTERM and killed by SIGKILL at random moments and resumed each time.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fromzero import checkpoint
from fromzero.errors import FromzeroError, counted
from fromzero.runs import Run, list_runs

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has none


class Verification(NamedTuple):
    """The run straight through, the interruptions of the other that took place, and where the two differ first (None:
    nowhere)."""

    straight: Run
    interruptions: tuple[str, ...]
    difference: str | None


def verify_resume(
    recipe: str,
    folder: Path,
    *,
    epochs: int,
    interruptions: int,
    seed: int,
    threads: int | None,
    say: Callable[[str], None],
) -> Verification:
    """Train `recipe` on the digits straight, and once more with interruptions, under `folder`.

    seed: of the kinds and moments of the interruptions. Raises FromzeroError when one of the trainings fails.
    """
    rng = random.Random(seed)
    options = ["--checkpoint-minutes", "0.01"] + (["--threads", str(threads)] if threads else [])
    command = ["train", "digits", "--recipe", recipe, "--epochs", str(epochs), "--validation.source", "split", *options]
    say(f"training {recipe} on the digits for {counted(epochs, 'epoch')}, straight through")
    seconds = _finish(_start([*command, "--runs-dir", str(folder / "straight")]))
    straight = _only_run(folder / "straight")
    happened: list[str] = []
    process = _start([*command, "--runs-dir", str(folder / "interrupted")])
    try:
        for _ in range(interruptions):
            number = rng.choice([signal.SIGTERM, KILL])
            ran_out = not _interrupt(process, number, rng.uniform(0.0, 0.5) * seconds)
            run = _only_run(folder / "interrupted")
            if ran_out or run.summary is not None:  # it was faster than the signal
                break
            happened.append(f"{signal.Signals(number).name} after {_position(run)}")
            say(f"interrupted by {happened[-1]}; resuming")
            process = _start(["resume", str(run.path), *options])
        else:
            _finish(process)
    finally:
        process.kill()
    if not happened:
        raise FromzeroError("no interruption came before the end: give more --epochs")
    interrupted = _only_run(folder / "interrupted")
    return Verification(straight, tuple(happened), first_difference(straight, interrupted))


def _only_run(folder: Path) -> Run:
    runs = list_runs(folder)
    if not runs:
        raise FromzeroError(f"{folder}: the training was stopped before it had made its run folder; try again")
    return runs[0]


def first_difference(one: Run, two: Run) -> str | None:
    """Where two finished runs differ first: metrics in the order of epochs, then every tensor of the last and the best
    checkpoint, then the rest of their state. None when they are equal to the bit, times left aside."""
    rows = [run.metrics() for run in (one, two)]
    for first, second in zip(*rows, strict=False):
        for key in first:
            if not key.startswith("time/") and first[key] != second.get(key):
                return f"metrics: {key} of epoch {first['epoch']} is {first[key]!r} and {second.get(key)!r}"
    if len(rows[0]) != len(rows[1]):
        return f"metrics: {len(rows[0])} and {len(rows[1])} rows"
    for name in (checkpoint.LAST, checkpoint.BEST):
        a, b = (checkpoint.load(run.checkpoints / name) for run in (one, two))
        if a.tensors.keys() != b.tensors.keys():
            return f"{name}: different tensors: {sorted(a.tensors.keys() ^ b.tensors.keys())}"
        for key, tensor in a.tensors.items():
            if not torch.equal(_bits(tensor), _bits(b.tensors[key])):
                where = (tensor != b.tensors[key]).nonzero()
                place = where[0].tolist() if len(where) else "in the sign of a zero or the bits of a NaN"
                return f"{name}: {key} differs in {len(where):,} of {tensor.numel():,} values, first at {place}"
        states = [{k: v for k, v in found.state.items() if "seconds" not in k} for found in (a, b)]
        if states[0] != states[1]:
            key = next(k for k in states[0] if states[0][k] != states[1].get(k))
            return f"{name}: {key} is {states[0][key]!r} and {states[1].get(key)!r}"
    return None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bytes, so that -0 and 0 differ and a NaN equals itself."""
    return tensor.reshape(-1).view(torch.uint8)


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fromzero", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a Ctrl-C meant for us is not for it
    )


def _finish(process: subprocess.Popen[str]) -> float:
    """Seconds from the first line printed to the end. Raises FromzeroError when it failed."""
    assert process.stdout is not None
    printed = process.stdout.readline()
    started = time.monotonic()
    printed += process.stdout.read()
    _check(process.wait(), printed)
    return time.monotonic() - started


def _check(code: int, printed: str) -> None:
    """Raise FromzeroError, by the last line printed, where a training failed."""
    if code:
        raise FromzeroError(f"a training failed: {(printed.strip().splitlines() or ['?'])[-1]}")


def _interrupt(process: subprocess.Popen[str], number: int, seconds: float) -> bool:
    """Send a signal so many seconds after the first line was printed. False when it was over before that."""
    assert process.stdout is not None
    first = process.stdout.readline()
    try:
        _check(process.wait(seconds), first + process.stdout.read())
        return False
    except subprocess.TimeoutExpired:
        pass
    process.send_signal(number)
    process.stdout.read()
    process.wait()
    return True


def _position(run: Run) -> str:
    found = checkpoint.load_last(run.checkpoints)
    saved = f"saved at step {found.state['step']}" if found else "nothing saved"
    return f"{counted(len(run.metrics()), 'epoch')}, {saved}"
