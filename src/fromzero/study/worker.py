"""A worker: a process that trains one cell after another, so that torch and the images are loaded once.

`python -m fromzero.study.worker` reads a line of JSON for each cell and answers with lines of JSON. When whoever
started it is gone, it saves and goes as well. A cell leaves nothing behind in the process: its result is the same to
the bit as that of `fromzero train` with the same recipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from functools import cache
from typing import Any, TextIO

import pydantic

from fromzero.data import ImageSet, load_images
from fromzero.errors import FromzeroError, StoppedError
from fromzero.study.cells import Cell, Setting, train_cell

REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """What a worker is given: a cell, and how to compute it."""

    cell: Cell
    setting: Setting


TASKS = pydantic.TypeAdapter(Task)


def serve() -> None:
    """Train what comes in, until the input ends or a training is stopped."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
    busy, ending = threading.Event(), threading.Event()

    def read() -> None:
        for line in sys.stdin:
            tasks.put(TASKS.validate_python(json.loads(line)))
        ending.set()
        tasks.put(None)
        if busy.is_set():
            signal.raise_signal(signal.SIGTERM)  # the training saves and stops; os.kill would not let it on Windows

    threading.Thread(target=read, daemon=True).start()
    while (task := tasks.get()) is not None:
        busy.set()
        if ending.is_set() or not _train(task, answers):
            return
        busy.clear()


def outcome_of(task: Task, report: Any = lambda **content: None) -> dict[str, Any]:
    """Train the cell of a task to its end: {"done": True}, {"stopped": True} or {"failed": why in one line}. `report`
    is told `progress=` and `note=` on the way."""
    import torch  # more than a second, which who only hands tasks out need not wait for

    try:
        reported = 0.0
        images = images_of(task.setting)
        for share in train_cell(task.cell, images, task.setting, lambda line: report(note=line)):
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic() if share > 0 else 0.0  # the first step is news at once
                report(progress=share)
        return {"done": True}
    except StoppedError:
        return {"stopped": True}
    except FromzeroError as error:
        return {"failed": str(error).splitlines()[0]}
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, torch.AcceleratorError):  # of a GPU: all that this process asks of it fails from now on
            os._exit(1)
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # others train on this GPU, too


@cache
def images_of(setting: Setting) -> ImageSet:
    """The images of a study, read once a process."""
    return load_images(setting.dataset, data_dir=setting.data_dir, offline=setting.offline)


def _train(task: Task, answers: TextIO) -> bool:
    """Answer one task; False when the worker is to go."""

    def answer(**content: Any) -> None:
        with contextlib.suppress(OSError):  # nobody listens; then the input ends as well, which stops the training
            answers.write(json.dumps(content) + "\n")

    outcome = outcome_of(task, answer)
    answer(**outcome)
    return "stopped" not in outcome


if __name__ == "__main__":
    serve()
